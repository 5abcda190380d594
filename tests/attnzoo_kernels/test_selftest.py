"""The self-test's own promises: its bounds, its truth, and what it must find."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attnzoo_kernels import selftest
from attnzoo_kernels.cpu import blocked

CPU = torch.device("cpu")


def checks(patch: pytest.MonkeyPatch, *cases: str) -> list[selftest.Check]:
    patch.setattr(selftest, "CASES", cases)
    real = selftest.why_not
    # The interpreter takes its time, and has tests of its own.
    patch.setattr(selftest, "why_not", lambda impl, *a, **k: ("no",) if impl == "triton" else real(impl, *a, **k))
    return list(selftest.run([CPU], lambda *_: None))


@pytest.mark.parametrize("width", [4, 64])
def test_the_bound_on_scores_is_near_the_largest_score(width: int) -> None:
    for case in ("plain", "key bias", "auxiliary channels"):
        given = selftest.make(case, selftest.CaseSizes(width=width))
        q = given.q.flatten(0, 2) @ given.k.flatten(0, 2).T * width**-0.5
        most = float(q.abs().max())
        if given.extras.aux is not None:
            a, b = (x.flatten(0, 2) for x in given.extras.aux)
            most += float((a @ b.T).abs().max()) * width**-0.5
        if given.extras.key_bias is not None:
            most += float(given.extras.key_bias[given.extras.key_bias.isfinite()].abs().max())
        assert most <= given.score * (1 + 1e-12)
        assert given.score < 3 * most + 9


def test_a_gradient_of_the_log_sum_exp_that_is_lost_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = blocked.backward

    def without(call: Any, dout: Tensor, dlse: Tensor | None, need: Any) -> Any:
        return real(call, dout, None, need)

    monkeypatch.setattr(blocked, "backward", without)
    wrong = [check for check in checks(monkeypatch, "plain", "gate keys") if not check.holds]
    assert {(check.impl, check.case) for check in wrong} == {("blocked", "plain"), ("blocked", "gate keys")}


def test_the_truth_is_that_of_double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference in half precision rounds: were the truth computed so too, its error would be 0."""
    found = [check for check in checks(monkeypatch, "plain") if check.impl == "reference"]
    assert {check.dtype for check in found} == {"float64", "float32", "bfloat16"}
    for check in found:
        assert check.holds
        assert (check.error > 0) == (check.dtype != "float64")
        assert math.isfinite(check.limit)


def test_where_triton_does_not_run_everything_else_is_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    found = checks(monkeypatch, "decoding")
    assert {(check.impl, check.dtype) for check in found} == {
        (impl, dtype) for impl in ("reference", "blocked") for dtype in ("float64", "float32", "bfloat16")
    }
