"""The reference and the blocked implementation against the oracle: results, log-sum-exps and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attnzoo_kernels import BlockLayout, Extras, block_sparse_attention, block_sparse_attention_with_lse
from tests.attnzoo_kernels.oracle import Answer, Problem, solve, visible
from tests.bounds import assert_near, plain_torch
from tests.strategies import Numbers, extras_of, layout_of, lse_dtype, problems, untidy_layout_of

both = pytest.mark.parametrize("impl", ["reference", "blocked"])
SINGLE_AND_HALF = (torch.float32, torch.float16, torch.bfloat16)


def seeds_of(p: Problem, seed: int = 1) -> tuple[Tensor, Tensor]:
    n = Numbers.of(seed)
    shape = (p.batch, p.heads, p.queries)
    return n.normal(*shape, p.v.shape[3]).to(p.q.dtype), n.normal(*shape).to(lse_dtype(p.q.dtype))


def run(p: Problem, layout: BlockLayout, seeds: tuple[Tensor, Tensor], impl: str) -> Answer:
    given = [p.q, p.k, p.v] + ([] if p.key_bias is None else [p.key_bias])
    leaves = [x.detach().requires_grad_() for x in given]
    extras = extras_of(p.change(key_bias=leaves[3] if leaves[3:] else None))
    out, lse = block_sparse_attention_with_lse(
        *leaves[:3], layout, causal=p.causal, scale=p.scale, extras=extras, impl=impl
    )
    assert out.dtype == p.q.dtype
    assert lse.dtype == lse_dtype(p.q.dtype)
    grads = torch.autograd.grad((out, lse), leaves, seeds)
    assert [g.dtype for g in grads] == [x.dtype for x in leaves]
    return Answer(out.detach(), lse.detach(), *grads)


def assert_agrees(p: Problem, layout: BlockLayout, impls: tuple[str, ...] = ("reference", "blocked")) -> None:
    seeds = seeds_of(p)
    mask = visible(p)
    truth = solve(p, *seeds, mask)
    for impl in impls:
        assert_near(run(p, layout, seeds, impl), truth, p, seeds, mask)


@given(problems())
def test_both_are_the_definition_in_double_precision(p: Problem) -> None:
    assert_agrees(p, layout_of(p))


@given(problems(dtypes=SINGLE_AND_HALF))
def test_both_are_the_definition_as_far_as_the_dtype_goes(p: Problem) -> None:
    assert_agrees(p, layout_of(p))


@given(problems(longest=24), st.integers(0, 99))
def test_neither_the_order_of_a_list_nor_what_lies_between_lists_matters(p: Problem, seed: int) -> None:
    assert_agrees(p, untidy_layout_of(p, seed))


@pytest.mark.parametrize("keys", [1, 2, 63, 64, 65, 300])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_one_query_against_many_keys_is_the_definition(keys: int, causal: bool) -> None:
    n = Numbers.of(keys)
    keep = n.chance(0.6, 2, 2, 1, -(-keys // 16))
    p = Problem(n.normal(2, 6, 1, 8), n.normal(2, 2, keys, 8), n.normal(2, 2, keys, 5), keep, 16, 16, causal)
    assert_agrees(p, layout_of(p))


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (2, 5), (5, 2), (17, 33), (33, 17), (64, 64), (65, 130)])
@pytest.mark.parametrize("block", [1, 16, 24, 51])
def test_lengths_off_the_blocks_are_the_definition(queries: int, keys: int, block: int) -> None:
    n = Numbers.of(queries)
    keep = n.chance(0.7, 1, 1, -(-queries // block), -(-keys // block))
    p = Problem(n.normal(1, 2, queries, 4), n.normal(1, 1, keys, 4), n.normal(1, 1, keys, 4), keep, block, block)
    assert_agrees(p, layout_of(p))


@pytest.mark.parametrize(("width", "value_width"), [(1, 256), (256, 1), (24, 40), (100, 8), (80, 96)])
def test_any_width_is_the_definition(width: int, value_width: int) -> None:
    n = Numbers.of(width)
    keep = torch.ones(1, 1, 3, 2, dtype=torch.bool)
    p = Problem(n.normal(1, 2, 20, width), n.normal(1, 2, 13, width), n.normal(1, 2, 13, value_width), keep, 8, 8)
    assert_agrees(p, layout_of(p))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2), (0, 1)])
@both
def test_only_the_gradients_that_are_asked_for_are_made_and_they_are_right(wanted: tuple[int, ...], impl: str) -> None:
    n = Numbers.of(5)
    p = Problem(n.normal(2, 4, 21, 6), n.normal(2, 2, 30, 6), n.normal(2, 2, 30, 7), n.chance(0.6, 1, 2, 3, 4), 8, 8)
    seeds = seeds_of(p)
    truth = solve(p, seeds[0])[2:5]
    leaves = [x.clone().requires_grad_(i in wanted) for i, x in enumerate((p.q, p.k, p.v))]
    block_sparse_attention(*leaves, layout_of(p), impl=impl).backward(seeds[0])
    for i, (leaf, true) in enumerate(zip(leaves, truth, strict=True)):
        if i in wanted:
            torch.testing.assert_close(leaf.grad, true, rtol=0, atol=1e-12 * float(true.abs().max()) * 10)
        else:
            assert leaf.grad is None


@both
def test_a_loss_of_the_log_sum_exp_alone_has_the_right_gradients(impl: str) -> None:
    n = Numbers.of(6)
    p = Problem(n.normal(1, 4, 25, 6), n.normal(1, 2, 31, 6), n.normal(1, 2, 31, 3), n.chance(0.6, 1, 4, 4, 4), 8, 8)
    dlse = n.normal(1, 4, 25)
    truth = solve(p, torch.zeros(1, 4, 25, 3), dlse)
    leaves = [x.clone().requires_grad_() for x in (p.q, p.k, p.v)]
    lse = block_sparse_attention_with_lse(*leaves, layout_of(p), impl=impl)[1]
    grads = torch.autograd.grad(lse, leaves, dlse, allow_unused=True)
    seeds = (torch.zeros(1, 4, 25, 3, dtype=torch.float64), dlse)
    dv = torch.zeros_like(p.v) if grads[2] is None else grads[2]
    actual = Answer(truth.out, lse.detach(), grads[0], grads[1], dv)
    assert_near(actual, truth, p, seeds, visible(p))


@both
def test_the_gradient_of_the_bias_alone_is_right(impl: str) -> None:
    n = Numbers.of(8)
    bias = n.normal(1, 2, 30).masked_fill(n.chance(0.2, 1, 2, 30), -math.inf).requires_grad_()
    p = Problem(n.normal(2, 4, 21, 6), n.normal(2, 2, 30, 6), n.normal(2, 2, 30, 7), n.chance(0.6, 1, 2, 3, 4), 8, 8)
    seeds = seeds_of(p)
    results = block_sparse_attention_with_lse(p.q, p.k, p.v, layout_of(p), extras=Extras(key_bias=bias), impl=impl)
    (grad,) = torch.autograd.grad(results, bias, seeds)
    true = solve(p.change(key_bias=bias), *seeds).dbias
    torch.testing.assert_close(grad, true, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@both
def test_the_mean_error_in_half_precision_is_no_larger_than_that_of_plain_torch(dtype: torch.dtype, impl: str) -> None:
    n = Numbers.of(9)
    q, k, v = (n.normal(1, 2, 96, 32).to(dtype) for _ in range(3))
    p = Problem(q, k, v, n.chance(0.8, 1, 1, 6, 6), 16, 16)
    seeds, mask = seeds_of(p), visible(p)
    mine, true, plain = run(p, layout_of(p), seeds, impl), solve(p, *seeds, mask), plain_torch(p, *seeds, mask, dtype)
    for name in ("out", "dq", "dk", "dv"):
        off, usual = ((getattr(x, name).double() - getattr(true, name)).abs().mean() for x in (mine, plain))
        assert off <= 1.1 * usual, f"{name}: {off:.3g} in the mean, plain torch {usual:.3g}"
