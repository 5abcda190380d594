"""The forward in bf16 by torch's kernel, as on CPUs with AMX: against the oracle, and which calls are of that kind."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import example, given
from torch import Tensor

from attnzoo_kernels import Extras, block_sparse_attention, block_sparse_attention_with_lse, why_not
from attnzoo_kernels.cpu import bf16 as half
from attnzoo_kernels.cpu import few_rows, flash, schedule
from tests.attnzoo_kernels.cpu.cpu_classes import PROCESSORS, answering
from tests.attnzoo_kernels.op.test_agreement import seeds_of
from tests.attnzoo_kernels.oracle import Answer, Problem, solve, visible
from tests.attnzoo_kernels.test_mutants import rewrite
from tests.bounds import assert_near
from tests.strategies import Numbers, extras_of, layout_of, problems, unread


@pytest.fixture(autouse=True)
def _as_on_amx() -> Iterator[None]:
    with answering("amx"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(half, "LEAST_BLOCK", 1)
        patch.setattr(few_rows, "MOST_ROWS", 0)
        patch.setattr(flash, "LEAST_ROWS", 10**6)
        patch.setattr(schedule, "CHUNK_SCORES", 1 << 9)
        yield


def listen(patch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call that comes here is computed here."""
    found: list[bool] = []
    original = half.forward

    def spy(*args: Any) -> Tensor | None:
        result = original(*args)
        found.append(result is not None)
        return result

    patch.setattr(half, "forward", spy)
    return found


def check(p: Problem) -> list[bool]:
    """Out and gradients are the oracle's; whether each of the forward's calls was computed here."""
    dout, dlse = seeds_of(p)
    nothing, mask = torch.zeros_like(dlse), visible(p)
    with pytest.MonkeyPatch.context() as patch:
        found = listen(patch)
        leaves = [x.detach().requires_grad_() for x in (p.q, p.k, p.v)]
        rule: dict[str, Any] = {"causal": p.causal, "scale": p.scale, "extras": extras_of(p), "impl": "blocked"}
        out = block_sparse_attention(*leaves, layout_of(p), **rule)
        with torch.no_grad():
            lse = block_sparse_attention_with_lse(*leaves, layout_of(p), **rule)[1]
        grads = torch.autograd.grad(out, leaves, dout)
    actual = Answer(out.detach(), lse, *grads)
    assert_near(actual, solve(p, dout, nothing, mask), p, (dout, nothing), mask)
    return found


def plain(p: Problem) -> Problem:
    v = Numbers.of(3).normal(p.batch, p.kv_heads, p.keys, p.q.shape[3]).to(p.q.dtype)
    return p.change(v=v, key_bias=None)


def problem(queries: int, keys: int, **rule: Any) -> Problem:
    """Random blocks of 5 by 3, four heads in two groups."""
    n = Numbers.of(queries + keys)
    q, k, v = (n.normal(2, h, length, 8).bfloat16() for h, length in ((4, queries), (2, keys), (2, keys)))
    return Problem(q, k, v, n.chance(0.6, 1, 4, -(-queries // 5), -(-keys // 3)), 5, 3, **rule)


CASES = (
    problem(33, 33, scale=0.7),
    problem(20, 50),
    problem(50, 20),
    problem(40, 40, window=7, sink=2),
    problem(40, 40, causal=False, window=9),
    problem(40, 40, q_pos=Numbers.of(1).integers(-1, 42, 2, 4, 40)),
    problem(1, 44),
)


@given(problems(dtypes=(torch.bfloat16,)))
@example(CASES[5])
def test_it_is_the_definition(p: Problem) -> None:
    p = plain(p)
    assert check(p) == [True]


@given(problems(dtypes=(torch.bfloat16,)))
def test_dead_blocks_may_hold_no_numbers(p: Problem) -> None:
    p = plain(p)
    mask = visible(p)
    k, v = (x.masked_fill(unread(p, mask).unsqueeze(-1), math.nan) for x in (p.k, p.v))
    check(p.change(q=p.q.masked_fill(~mask.any(-1, keepdim=True), math.nan), k=k, v=v))


def test_where_something_hidden_spoils_the_result_it_is_computed_in_single_precision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    p = problem(33, 33, q_pos=torch.arange(33).int().view(1, 1, 33) - 1)
    # Nobody sees the last key, but its block is read.
    p = p.change(keep=torch.ones_like(p.keep), k=p.k.index_fill(2, torch.tensor([32]), math.inf))
    assert not bool(visible(p)[..., 32].any())
    calls = listen(monkeypatch)
    with torch.no_grad():
        found = block_sparse_attention(p.q, p.k, p.v, layout_of(p), extras=extras_of(p), impl="blocked")
        k = p.k.index_fill(2, torch.tensor([32]), 0.0)
        wanted = block_sparse_attention(p.q, k, p.v, layout_of(p), extras=extras_of(p), impl="reference")
    assert calls == [False]
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)


OTHERS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "a bias": (torch.bfloat16, {"key_bias": torch.zeros(1, 1, 33)}),
    "auxiliary channels": (
        torch.bfloat16,
        {"aux": (torch.ones(2, 4, 33, 2).bfloat16(), torch.ones(1, 1, 33, 2).bfloat16())},
    ),
    "gates": (torch.bfloat16, {"gate": "last"}),
    "single precision": (torch.float32, {}),
    "the other half": (torch.float16, {}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_calls_are_computed_otherwise(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype, options = OTHERS[name]
    p = problem(33, 33)
    monkeypatch.setattr(half, "forward", lambda *_: pytest.fail("computed here"))
    q, k, v = (x.to(dtype) for x in (p.q, p.k, p.v))
    extras = Extras(**options)
    out = block_sparse_attention(q, k, v, layout_of(p), extras=extras, impl="blocked")
    wanted = block_sparse_attention(q, k, v, layout_of(p), extras=extras, impl="reference")
    torch.testing.assert_close(out, wanted, rtol=3e-2, atol=3e-2)


def test_without_the_units_and_for_small_blocks_it_is_computed_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half, "LEAST_BLOCK", 1000)
    assert check(problem(33, 33)) == []
    monkeypatch.setattr(half, "LEAST_BLOCK", 1)
    for cpu in PROCESSORS:
        with answering(cpu):
            assert check(problem(33, 33)) == ([True] if cpu == "amx" else [])


MUTANTS = {
    "one row's limits for all": (schedule.Limits, "common", "bool((x == x[:1]).all())", "True"),
    "what an earlier chunk hid": (half, "_mask", "mask[..., :-hidden] = 0.0", "pass"),
    "nothing hidden": (half, "_mask", "if not part.partial", "if True"),
    "the scale forgotten": (half, "forward", ", scale=call.scale", ""),
    "keys for values": (half, "forward", '(("k", k), ("v", v))', '(("k", k), ("v", k))'),
    "rows in another order": (half, "forward", "0, part.rows, found", "0, part.rows.flip(0), found"),
}


def battery() -> None:
    for p in CASES:
        assert check(p) == [True]


def test_the_battery_holds() -> None:
    battery()


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS.keys())
def test_a_wrong_one_is_found_out(mutant: tuple[Any, str, str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite(monkeypatch, *mutant)
    with pytest.raises(AssertionError):
        battery()


def test_values_of_another_width_are_a_reason_and_computed_otherwise() -> None:
    p = problem(33, 33)
    wide = p.change(v=Numbers.of(1).normal(2, 2, 33, 12).bfloat16())
    assert why_not("blocked/bf16", p.q, p.k, p.v, layout_of(p)) == ()
    assert why_not("blocked/bf16", wide.q, wide.k, wide.v, layout_of(wide)) == (
        "bf16: keys and values have widths 8 and 12; it takes equal ones",
    )
