"""What the tests on a GPU share: the device, calls of all kinds, and how far a result may be from fp64. No hypothesis.

The budgets are those of the other tests. u is the unit roundoff of the inputs, S the largest sum that a score is made
of, M the largest value of a result, e what plain torch loses that does every step in the inputs' dtype:
- fp16, bf16: ``2 e + 2 u M``; fp32: ``2 e + 8 u (1 + S) M``; gradients have ``3 e``;
- lse: ``16 u (1 + S)`` with u of fp32.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from attnzoo_kernels import reference, selftest
from attnzoo_kernels.selftest import UNIT, CaseInputs, CaseSizes
from attnzoo_kernels.spec.call import Call

CPU = torch.device("cpu")
REASON = "no CUDA device"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def short(value: Any) -> str:
    """A name for a test."""
    return str(value).removeprefix("torch.").replace(" ", "_")


def find_device() -> torch.device:
    """The device to test; ATTNZOO_TEST_DEVICE=cpu tries these tests themselves, in the interpreter."""
    asked = os.environ.get("ATTNZOO_TEST_DEVICE", "cuda")
    if asked == "cuda" and not torch.cuda.is_available():
        pytest.skip(REASON)
    if asked == "cuda" and os.environ.get("TRITON_INTERPRET") == "1":
        pytest.fail("TRITON_INTERPRET=1: the kernels would run in Python, and nothing would be tested")
    return torch.device(asked)


class InItsOwnDtype(Call):
    """A call whose every step is done in the dtype of its inputs."""

    @property
    def acc_dtype(self) -> torch.dtype:
        return self.q.dtype


@contextmanager
def everything_rounded() -> Iterator[None]:
    """Within, the reference computes in the inputs' dtype: the error that plain torch makes."""
    real = reference.attend

    def attend(call: Call) -> tuple[Tensor, Tensor]:
        return real(InItsOwnDtype(**{field.name: getattr(call, field.name) for field in fields(Call)}))

    reference.attend = attend
    try:
        yield
    finally:
        reference.attend = real


def score_of(given: CaseInputs) -> float:
    """The largest sum of absolute values that a score is made of."""
    group = given.q.shape[1] // given.k.shape[1]
    parts = given.q.abs() @ given.k.repeat_interleave(group, 1).abs().transpose(-1, -2)
    if given.extras.aux is not None:
        q_aux, k_aux = given.extras.aux
        parts = parts + q_aux.abs() @ k_aux.repeat_interleave(group, 1).abs().transpose(-1, -2)
    bias = given.extras.key_bias
    added = 0.0 if bias is None else float(bias[bias.isfinite()].abs().max())
    return float(parts.max()) / math.sqrt(given.q.shape[3]) + added


@functools.lru_cache(maxsize=8)
def truth_of(name: str, sizes: CaseSizes, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """What fp64 says on inputs rounded to a dtype, what plain torch says in that dtype, and the score's size."""
    rounded = selftest.make(name, sizes).to(dtype, CPU)
    exact = rounded.to(torch.float64, CPU)
    truth = selftest.solve(exact, "reference", dtype)
    with everything_rounded():
        plain = selftest.solve(rounded, "reference", dtype)
    return truth, plain, score_of(exact)


def assert_within(name: str, sizes: CaseSizes, dtype: torch.dtype, found: dict[str, Tensor]) -> None:
    """Fails if a result or gradient is further from fp64 than its budget, or empty elsewhere."""
    truth, plain, score = truth_of(name, sizes, dtype)
    unit = UNIT[dtype]
    assert set(found) == set(truth)
    for quantity, true in truth.items():
        mine = found[quantity]
        assert not mine.isnan().any(), quantity
        assert torch.equal(mine == -math.inf, true == -math.inf), f"{quantity}: -inf in other places"
        live = true.isfinite()
        off, largest = (float(x[live].abs().max()) if live.any() else 0.0 for x in (mine - true, true))
        if quantity == "lse":
            limit = 16 * UNIT[torch.float32] * (1 + score)
        else:
            usual = float((plain[quantity] - true)[live].nan_to_num(0.0).abs().max())
            slack = 8 * unit * (1 + score) if dtype == torch.float32 else 2 * unit
            limit = (2 if quantity == "out" else 3) * usual + slack * largest
        assert off <= limit, f"{quantity}: off by {off:.3g}, {limit:.3g} allowed"
    empty = truth["lse"] == -math.inf
    assert not found["out"][empty].any()
    assert not found["dq"][empty].any()


def run(
    name: str, sizes: CaseSizes, dtype: torch.dtype, device: torch.device, impl: str = "triton"
) -> dict[str, Tensor]:
    """Results and gradients of a case on a device."""
    return selftest.solve(selftest.make(name, sizes).to(dtype, device), impl, dtype)
