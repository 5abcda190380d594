"""Attention over parts of the keys, joined, is attention over all of them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attnzoo_kernels import block_sparse_attention_with_lse, merge_states
from tests.attnzoo_kernels.op.test_agreement import both, seeds_of
from tests.attnzoo_kernels.oracle import Problem, solve, visible
from tests.bounds import LIMIT_FP64
from tests.strategies import Numbers, extras_of, layout_of, problems

State = tuple[Tensor, Tensor]


def states(count: int, seed: int = 0, empty: float = 0.3) -> list[State]:
    """States of 2 heads, 7 rows and width 3, some rows of them empty."""
    n = Numbers.of(seed)
    made = []
    for _ in range(count):
        out, lse, gone = n.normal(2, 7, 3), 5 * n.normal(2, 7), n.chance(empty, 2, 7)
        made.append((out.masked_fill(gone.unsqueeze(-1), 0.0), lse.masked_fill(gone, -math.inf)))
    return made


def merge(parts: list[State]) -> State:
    outs, lses = zip(*parts, strict=True)
    return merge_states(outs, lses)


def assert_same(one: State, other: State) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=LIMIT_FP64, atol=LIMIT_FP64)


@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(1, 4))
def test_merging_is_associative(seed: int, count: int, cut: int) -> None:
    parts = states(count, seed)
    cut = min(cut, count - 1)
    assert_same(merge([merge(parts[:cut]), merge(parts[cut:])]), merge(parts))


@given(st.integers(0, 10_000))
def test_merging_is_commutative(seed: int) -> None:
    parts = states(3, seed)
    assert_same(merge(parts[::-1]), merge(parts))


def test_the_empty_state_changes_no_bit() -> None:
    (state,) = states(1)
    empty = (torch.zeros(2, 7, 3, dtype=torch.float64), torch.full((2, 7), -math.inf, dtype=torch.float64))
    for parts in ([state], [state, empty], [empty, state], [empty, empty, state]):
        assert_same(merge(parts), state)
    nothing = merge([empty, empty])
    assert torch.equal(nothing[0], empty[0])
    assert torch.equal(nothing[1], empty[1])


def test_equal_states_add_up_to_one_with_a_larger_log_sum_exp() -> None:
    (state,) = states(1, empty=0.0)
    out, lse = merge([state] * 3)
    assert_same((out, lse), (state[0], state[1] + math.log(3)))


@pytest.mark.parametrize("shift", [1e4, -1e4, 300.0])
def test_log_sum_exps_of_any_size_merge(shift: float) -> None:
    parts = states(3, empty=0.0)
    out, lse = merge([(o, s + shift) for o, s in parts])
    plain = merge(parts)
    torch.testing.assert_close(out, plain[0], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(lse - shift, plain[1], rtol=1e-11, atol=1e-11)


def test_a_state_with_overwhelming_weight_is_the_result() -> None:
    a, b = states(2, empty=0.0)
    assert_same(merge([(a[0], a[1] + 2000), b]), (a[0], a[1] + 2000))


def test_nan_stays_nan_in_its_row_alone() -> None:
    a, b = states(2, empty=0.0)
    clean = merge([a, b])
    a[0][0, 3], a[1][0, 3] = math.nan, math.nan
    out, lse = merge([a, b])
    assert out[0, 3].isnan().all()
    assert lse[0, 3].isnan()
    others = torch.ones(2, 7, dtype=torch.bool)
    others[0, 3] = False
    assert torch.equal(out[others], clean[0][others])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_result_has_the_dtype_of_the_states_and_is_added_up_in_single_precision(dtype: torch.dtype) -> None:
    parts = [(o.to(dtype), s.float()) for o, s in states(4)]
    out, lse = merge(parts)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    exact = merge([(o.double(), s.double()) for o, s in parts])
    assert torch.equal(out, merge([(o.float(), s) for o, s in parts])[0].to(dtype))
    torch.testing.assert_close(lse.double(), exact[1], rtol=1e-6, atol=1e-6)


def test_the_gradients_are_right_beside_empty_states() -> None:
    parts = [x.requires_grad_() for state in states(3) for x in state]
    seen = merge_states(parts[::2], parts[1::2])[1].detach() > -math.inf

    def call(*tensors: Tensor) -> State:
        out, lse = merge_states(tensors[::2], tensors[1::2])
        return out, lse[seen]

    out, lse = call(*parts)
    grads = torch.autograd.grad(out.square().sum() + lse.sum(), parts)
    assert all(g.isfinite().all() for g in grads)
    assert all(not g[s == -math.inf].any() for g, s in zip(grads[1::2], parts[1::2], strict=True))
    live = [x.requires_grad_() for state in states(3, empty=0.0) for x in state]
    assert torch.autograd.gradcheck(lambda *t: merge_states(t[::2], t[1::2]), live)


@given(problems(longest=20))
def test_disjoint_layouts_merged_are_their_union_with_its_gradients(p: Problem) -> None:
    half = Numbers.of(4).chance(0.5, *p.keep.shape)
    parts = [p.change(keep=p.keep & half), p.change(keep=p.keep & ~half)]
    seeds = seeds_of(p)
    truth = solve(p, *seeds, visible(p))
    for impl in ("reference", "blocked"):
        leaves = [x.detach().requires_grad_() for x in (p.q, p.k, p.v)]
        pieces = [
            block_sparse_attention_with_lse(
                *leaves, layout_of(part), causal=p.causal, scale=p.scale, extras=extras_of(p), impl=impl
            )
            for part in parts
        ]
        out, lse = merge(pieces)
        grads = torch.autograd.grad((out, lse), leaves, seeds)
        for mine, true in zip((out, lse, *grads), truth, strict=False):
            torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-10)


@both
def test_gradients_flow_through_both_results_of_both_parts(impl: str) -> None:
    n = Numbers.of(2)
    p = Problem(n.normal(1, 2, 8, 4), n.normal(1, 1, 16, 4), n.normal(1, 1, 16, 4), torch.ones(1, 1, 1, 4).bool(), 8, 4)
    first = p.change(keep=torch.tensor([True, False, True, False]).view(1, 1, 1, 4))
    second = p.change(keep=~first.keep)
    q = p.q.clone().requires_grad_()
    out, _ = merge([block_sparse_attention_with_lse(q, p.k, p.v, layout_of(x), impl=impl) for x in (first, second)])
    (grad,) = torch.autograd.grad(out.sum(), q)
    torch.testing.assert_close(grad, solve(p, torch.ones(1, 2, 8, 4)).dq, rtol=1e-11, atol=1e-11)
