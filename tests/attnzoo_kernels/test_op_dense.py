"""Dense calls on CPUs by torch's fused kernel: against the oracle, and which calls are of that kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attnzoo_kernels import (
    BlockLayout,
    Extras,
    block_sparse_attention,
    block_sparse_attention_with_lse,
    dense,
    dispatch,
)
from attnzoo_kernels.call import Call
from attnzoo_kernels.rule import Rule
from tests.attnzoo_kernels.oracle import Answer, Problem, solve, visible
from tests.attnzoo_kernels.test_mutants import rewrite
from tests.attnzoo_kernels.test_op_agreement import assert_agrees, seeds_of
from tests.bounds import assert_near
from tests.strategies import STRIDES, Numbers, layout_of, strided


@pytest.fixture(autouse=True)
def _from_one_row_on() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "LEAST_ROWS", 1)
        patch.setattr(dense, "route", lambda: "mkl")
        yield


def problem(sizes: tuple[int, int, int, int, int], width: int, stride: str = "contiguous", **rule: Any) -> Problem:
    """Of ``B, G, H / G, T, S``, in blocks of 7 by 5."""
    batch, groups, ratio, queries, keys = sizes
    n = Numbers.of(sum(sizes))
    shapes = ((groups * ratio, queries, width), (groups, keys, width), (groups, keys, width))
    q, k, v = (strided(n.normal(batch, *shape).float(), stride) for shape in shapes)
    keep = torch.ones(1, 1, -(-queries // 7), -(-keys // 5), dtype=torch.bool)
    return Problem(q, k, v, keep, 7, 5, **{"causal": queries == keys, "scale": None, **rule})


def dense_layout(p: Problem) -> BlockLayout:
    return BlockLayout.dense(p.block_q, p.block_k, p.queries, p.keys)


def count_calls(patch: pytest.MonkeyPatch) -> list[str]:
    """The names of the two passes, each time one runs."""
    found: list[str] = []

    def spy(name: str) -> Callable[..., Any]:
        original = getattr(dense, name)

        def counted(*args: Any) -> Any:
            found.append(name)
            return original(*args)

        return counted

    for name in ("forward", "backward"):
        patch.setattr(dense, name, spy(name))
    return found


def without_lse(p: Problem, layout: BlockLayout, dout: Tensor) -> Answer:
    leaves = [x.detach().requires_grad_() for x in (p.q, p.k, p.v)]
    out = block_sparse_attention(*leaves, layout, causal=p.causal, scale=p.scale, impl="blocked")
    with torch.no_grad():
        lse = block_sparse_attention_with_lse(*leaves, layout, causal=p.causal, scale=p.scale, impl="blocked")[1]
    return Answer(out.detach(), lse, *torch.autograd.grad(out, leaves, dout))


def check(p: Problem) -> None:
    dout, dlse = seeds_of(p)
    nothing = torch.zeros_like(dlse)
    mask = visible(p)
    assert_near(without_lse(p, dense_layout(p), dout), solve(p, dout, nothing, mask), p, (dout, nothing), mask)


few = st.integers(1, 3)


@given(
    few, few, few, st.integers(1, 40), st.integers(1, 40), st.integers(1, 20), st.sampled_from(STRIDES), st.booleans()
)
def test_dense_calls_are_the_definition(
    batch: int, groups: int, ratio: int, queries: int, keys: int, width: int, stride: str, causal: bool
) -> None:
    p = problem((batch, groups, ratio, queries, queries if causal else keys), width, stride, causal=causal)
    with pytest.MonkeyPatch.context() as patch:
        calls = count_calls(patch)
        check(p)
        assert calls == ["forward", "forward", "backward"]


def test_a_gradient_of_the_log_sum_exp_is_made_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch)
    p = problem((2, 2, 3, 23, 23), 8)
    assert_agrees(p, dense_layout(p), ("blocked",))
    assert calls == ["forward"]


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_only_the_gradients_that_are_asked_for_come_back(wanted: tuple[int, ...]) -> None:
    p = problem((1, 2, 2, 19, 19), 4)
    given_ = [x.clone().requires_grad_(i in wanted) for i, x in enumerate((p.q, p.k, p.v))]
    out = block_sparse_attention(*given_, dense_layout(p), impl="blocked")
    grads = torch.autograd.grad(out.sum(), [given_[i] for i in wanted])
    whole = [x.clone().requires_grad_() for x in (p.q, p.k, p.v)]
    every = torch.autograd.grad(block_sparse_attention(*whole, dense_layout(p), impl="reference").sum(), whole)
    for i, grad in zip(wanted, grads, strict=True):
        torch.testing.assert_close(grad, every[i], rtol=1e-5, atol=1e-5)


BASE = (1, 2, 1, 21, 21)
OTHERS: dict[str, Callable[[], tuple[Problem, Extras]]] = {
    "a block missing": lambda: (_without_a_block(problem(BASE, 4)), Extras()),
    "a window": lambda: (problem(BASE, 4), Extras(window=5)),
    "positions": lambda: (problem(BASE, 4), Extras(q_pos=torch.arange(21, dtype=torch.int32).view(1, 1, 21))),
    "a bias": lambda: (problem(BASE, 4), Extras(key_bias=torch.zeros(1, 1, 21))),
    "fewer queries than keys": lambda: (problem((1, 2, 1, 9, 21), 4, causal=True), Extras()),
    "double precision": lambda: (_as(problem(BASE, 4), torch.float64), Extras()),
    "half precision": lambda: (_as(problem(BASE, 4), torch.bfloat16), Extras()),
    "narrower values": lambda: (problem(BASE, 4).change(v=torch.randn(1, 2, 21, 3)), Extras()),
    "gates": lambda: (problem(BASE, 4), Extras(gate="last")),
}


def _without_a_block(p: Problem) -> Problem:
    keep = p.keep.clone()
    keep[..., -1, 0] = False
    return p.change(keep=keep)


def _as(p: Problem, dtype: torch.dtype) -> Problem:
    return p.change(q=p.q.to(dtype), k=p.k.to(dtype), v=p.v.to(dtype))


@pytest.mark.parametrize("name", OTHERS)
def test_other_calls_stay_with_the_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch)
    p, extras = OTHERS[name]()
    q, k, v = (x.clone().requires_grad_() for x in (p.q, p.k, p.v))
    layout = dense_layout(p) if bool(p.keep.all()) else layout_of(p)
    out = block_sparse_attention(q, k, v, layout, causal=p.causal, extras=extras, impl="blocked")
    wanted = block_sparse_attention(q, k, v, layout, causal=p.causal, extras=extras, impl="reference")
    torch.testing.assert_close(out, wanted, rtol=2e-2, atol=2e-2)
    out.sum().backward()
    assert not calls


def test_a_shared_list_with_holes_stays_with_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch)
    p = problem(BASE, 4)
    layout = dense_layout(p)
    count = layout.count.clone()
    count[..., -1] -= 1
    holed = BlockLayout(7, 5, 21, 21, layout.start, count, layout.col)
    q = p.q.clone().requires_grad_()
    out = block_sparse_attention(q, p.k, p.v, holed, impl="blocked")
    torch.testing.assert_close(out, block_sparse_attention(q, p.k, p.v, holed, impl="reference"), rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(block_sparse_attention(q, p.k, p.v, holed, impl="reference").sum(), q)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), q), wanted, rtol=1e-5, atol=1e-5)
    assert not calls


def test_where_another_library_multiplies_dense_calls_stay_with_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "route", lambda: "onednn")
    calls = count_calls(monkeypatch)
    check(problem(BASE, 4))
    assert not calls


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_dense_calls_are_those_of_eager_mode(dynamic: bool) -> None:
    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layout = BlockLayout.dense(8, 8, q.shape[2], k.shape[2])
        return block_sparse_attention(q, k, v, layout).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (24, 31):
        n = Numbers.of(tokens)
        leaves = [n.normal(1, h, tokens, 8).float().requires_grad_() for h in (4, 2, 2)]
        found = torch.autograd.grad(compiled(*leaves), leaves)
        torch.testing.assert_close(found, torch.autograd.grad(step(*leaves), leaves), rtol=1e-5, atol=1e-5)


def test_the_op_keeps_its_promises_of_shape_and_stride() -> None:
    p = problem((2, 2, 2, 16, 16), 8)
    layout = dense_layout(p)
    for need_lse in (False, True):
        out, lse = dispatch.forward("blocked", _call(p, layout), need_lse=need_lse)
        assert out.is_contiguous()
        assert lse.is_contiguous()
        assert lse.shape == ((2, 4, 16) if need_lse else (0,))


def _call(p: Problem, layout: BlockLayout) -> Call:
    return Call(
        p.q, p.k, p.v, layout.start, layout.count, layout.col, None, Rule(p.causal), p.block_q, p.block_k, 0.25
    )  # fmt: skip


MUTANTS = {
    "causality aligned at the first key": ("may_take", "not rule.causal or seq_q == seq_k", "True"),
    "lists that are not looked at": ("takes", "bool((call.count == call.grid[1]).all())", "True"),
    "windows overlooked": ("may_take", "and rule.window is None", ""),
    "query heads in another order": ("_joined", "torch.stack(parts, 2)", "torch.stack(parts, 1)"),
    "gradients of one query head for its group": ("backward", "sum(dk[1:], dk[0])", "dk[0]"),
    "the scale forgotten": ("forward", ", scale=call.scale", ""),
    "the scale forgotten on the way back": ("backward", ", scale=call.scale", ""),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS.keys())
def test_a_wrong_one_is_found_out(mutant: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite(monkeypatch, dense, *mutant)
    with pytest.raises((AssertionError, RuntimeError)):
        check(problem((1, 2, 3, 21, 21), 4, scale=0.3))
        for name in ("a window", "fewer queries than keys"):
            test_other_calls_stay_with_the_blocks(name, monkeypatch)
        test_a_shared_list_with_holes_stays_with_the_blocks(monkeypatch)
