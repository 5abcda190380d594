"""The Triton kernels, interpreted, against the oracle: results, log-sum-exps and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnzoo_kernels import BlockLayout, Extras, block_sparse_attention, block_sparse_attention_with_lse, merge_states
from tests.attnzoo_kernels.op.test_agreement import assert_agrees, run, seeds_of
from tests.attnzoo_kernels.op.test_torture import assert_bitwise
from tests.attnzoo_kernels.oracle import Answer, Problem, solve, visible
from tests.attnzoo_kernels.triton.interpreted import (
    TILES,
    grid,
    only_interpreted,
    slow,
    some,
    split_lists,
    tiles_of,
    without_descriptors,
)
from tests.bounds import assert_near, plain_torch
from tests.strategies import Numbers, layout_of, problems, untidy_layout_of

pytestmark = only_interpreted

TRITON = ("triton",)
LOW = (torch.float32, torch.float16, torch.bfloat16)


@some(0.15)
@given(problems(most_tiles=TILES))
def test_it_is_the_definition_in_double_precision(p: Problem) -> None:
    assert_agrees(p, layout_of(p), TRITON)


@some(0.15)
@given(problems(dtypes=LOW, most_tiles=TILES))
def test_it_is_the_definition_as_far_as_the_dtype_goes(p: Problem) -> None:
    assert_agrees(p, layout_of(p), TRITON)


@some(0.15)
@given(problems(longest=24, most_tiles=TILES), st.integers(0, 99))
def test_neither_the_order_of_a_list_nor_what_lies_between_lists_matters(p: Problem, seed: int) -> None:
    assert_agrees(p, untidy_layout_of(p, seed), TRITON)


@some(0.15)
@given(problems(most_tiles=TILES), st.sampled_from((2, 5, 9, 1000)))
def test_lists_cut_into_parts_and_joined_are_the_definition(p: Problem, processors: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        split_lists(patch, processors * p.batch * p.heads)
        assert_agrees(p, layout_of(p), TRITON)


@some(0.15)
@given(problems(most_tiles=6, longest=40), st.sampled_from((16, 32)), st.sampled_from((16, 32)))
def test_tiles_smaller_than_blocks_are_the_definition(p: Problem, rows: int, keys: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        tiles_of(patch, lambda tiles: tiles._replace(rows=rows, keys=keys))
        assert_agrees(p, layout_of(p), TRITON)


def fixed(
    queries: int, keys: int, block_q: int, block_k: int, *, heads: int = 3, kv_heads: int = 1, seed: int = 0
) -> Problem:
    n = Numbers.of(queries + keys + seed)
    keep = n.chance(0.7, 1, 1, -(-queries // block_q), -(-keys // block_k))
    shapes = ((heads, queries, 5), (kv_heads, keys, 5), (kv_heads, keys, 3))
    q, k, v = (n.normal(1, *shape) for shape in shapes)
    return Problem(q, k, v, keep, block_q, block_k)


@grid(keys=[1, 2, 63, 64, 65, 300], processors=[1000, 1])
def test_one_query_against_many_keys_is_the_definition(
    keys: int, processors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    split_lists(monkeypatch, processors)
    assert_agrees(fixed(1, keys, 16, 32, heads=4, kv_heads=2), layout_of(fixed(1, keys, 16, 32)), TRITON)


@grid(lengths=[(1, 1), (2, 5), (5, 2), (17, 33), (33, 17), (64, 64)], blocks=[(16, 16), (51, 24)])
def test_lengths_off_the_blocks_are_the_definition(lengths: tuple[int, int], blocks: tuple[int, int]) -> None:
    p = fixed(*lengths, *blocks)
    assert_agrees(p, layout_of(p), TRITON)


@pytest.mark.parametrize(
    ("block_q", "block_k", "queries", "keys"),
    [
        (1, 1, 3, 4),
        (1, 64, 3, 100),
        (3, 3, 8, 10),
        slow(3, 100, 7, 130),
        slow(16, 256, 20, 300),
        (51, 1, 60, 3),
        (64, 51, 70, 110),
        slow(100, 16, 130, 40),
        (256, 3, 260, 7),
        slow(256, 256, 270, 260),
    ],
)
def test_blocks_of_any_size_are_the_definition(block_q: int, block_k: int, queries: int, keys: int) -> None:
    p = fixed(queries, keys, block_q, block_k)
    assert_agrees(p, layout_of(p), TRITON)


@pytest.mark.parametrize(
    ("width", "value_width"), [(1, 256), (256, 1), (1, 1), (5, 80), (80, 5), (24, 40), (100, 8), (80, 96)]
)
def test_any_width_is_the_definition(width: int, value_width: int) -> None:
    n = Numbers.of(width)
    keep = torch.ones(1, 1, 2, 1, dtype=torch.bool)
    p = Problem(n.normal(1, 2, 20, width), n.normal(1, 2, 13, width), n.normal(1, 2, 13, value_width), keep, 16, 16)
    assert_agrees(p, layout_of(p), TRITON)


@grid(layout_heads=[1, 2, 6], batch=[2, 1])
def test_three_heads_of_a_group_share_a_tile_and_its_list(layout_heads: int, batch: int) -> None:
    n = Numbers.of(layout_heads)
    keep = n.chance(0.6, batch, layout_heads, 2, 2)
    p = Problem(n.normal(2, 6, 13, 4), n.normal(2, 2, 25, 4), n.normal(2, 2, 25, 4), keep, 7, 16)
    assert_agrees(p, layout_of(p), TRITON)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2), (0, 1)])
def test_only_the_gradients_that_are_asked_for_are_made_and_they_are_right(wanted: tuple[int, ...]) -> None:
    p = fixed(21, 30, 16, 16, heads=4, kv_heads=2)
    seeds = seeds_of(p)
    truth = solve(p, seeds[0])[2:5]
    leaves = [x.clone().requires_grad_(i in wanted) for i, x in enumerate((p.q, p.k, p.v))]
    block_sparse_attention(*leaves, layout_of(p), impl="triton").backward(seeds[0])
    for i, (leaf, true) in enumerate(zip(leaves, truth, strict=True)):
        if i in wanted:
            torch.testing.assert_close(leaf.grad, true, rtol=0, atol=1e-12 * float(true.abs().max()) * 10)
        else:
            assert leaf.grad is None


def test_a_loss_of_the_log_sum_exp_alone_has_the_right_gradients() -> None:
    p = fixed(25, 31, 16, 16, heads=4, kv_heads=2)
    seeds = (torch.zeros(1, 4, 25, 3, dtype=torch.float64), seeds_of(p)[1])
    truth = solve(p, *seeds)
    leaves = [x.clone().requires_grad_() for x in (p.q, p.k, p.v)]
    lse = block_sparse_attention_with_lse(*leaves, layout_of(p), impl="triton")[1]
    grads = torch.autograd.grad(lse, leaves, seeds[1], allow_unused=True)
    dv = torch.zeros_like(p.v) if grads[2] is None else grads[2]
    actual = Answer(truth.out, lse.detach(), grads[0], grads[1], dv)
    assert_near(actual, truth, p, seeds, visible(p))


@grid(heads=[1, 2, 4], batch=[2, 1])
def test_the_gradient_of_the_bias_alone_is_right(heads: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    split_lists(monkeypatch)
    n = Numbers.of(8)
    bias = n.normal(batch, heads, 30).masked_fill(n.chance(0.2, batch, heads, 30), -math.inf).requires_grad_()
    keep = n.chance(0.6, 1, 2, 2, 2)
    p = Problem(n.normal(2, 4, 21, 6), n.normal(2, 2, 30, 6), n.normal(2, 2, 30, 7), keep, 16, 16)
    seeds = seeds_of(p)
    results = block_sparse_attention_with_lse(p.q, p.k, p.v, layout_of(p), extras=Extras(key_bias=bias), impl="triton")
    (grad,) = torch.autograd.grad(results, bias, seeds)
    true = solve(p.change(key_bias=bias), *seeds).dbias
    torch.testing.assert_close(grad, true, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_mean_error_in_half_precision_is_no_larger_than_that_of_plain_torch(dtype: torch.dtype) -> None:
    n = Numbers.of(9)
    q, k, v = (n.normal(1, 2, 96, 32).to(dtype) for _ in range(3))
    p = Problem(q, k, v, n.chance(0.8, 1, 1, 2, 2), 48, 48)
    seeds, mask = seeds_of(p), visible(p)
    mine, true = run(p, layout_of(p), seeds, "triton"), solve(p, *seeds, mask)
    plain = plain_torch(p, *seeds, mask, dtype)
    for name in ("out", "dq", "dk", "dv"):
        off, usual = ((getattr(x, name).double() - getattr(true, name)).abs().mean() for x in (mine, plain))
        assert off <= 1.1 * usual, f"{name}: {off:.3g} in the mean, plain torch {usual:.3g}"


@some(0.15)
@given(problems(most_tiles=TILES), st.sampled_from(("skewed", "descriptors", "both")))
def test_the_form_of_the_loop_and_the_way_keys_are_read_change_no_bit(p: Problem, change: str) -> None:
    layout, seeds = layout_of(p), seeds_of(p)
    # Rows of 16 bytes are what a descriptor takes.
    wide = p.change(q=torch.cat([p.q, p.q], -1).contiguous(), k=torch.cat([p.k, p.k], -1).contiguous())
    plain = run(wide, layout, seeds, "triton")
    with pytest.MonkeyPatch.context() as patch:
        if change != "descriptors":
            tiles_of(patch, lambda tiles: tiles._replace(form="skewed"))
        if change != "skewed":
            without_descriptors(patch)
        assert_bitwise(run(wide, layout, seeds, "triton"), plain)


def test_the_sum_over_disjoint_layouts_is_their_union() -> None:
    p = fixed(37, 45, 16, 16, heads=4, kv_heads=2)
    whole = p.change(keep=torch.ones(1, 1, 3, 3, dtype=torch.bool))
    parts = [whole.change(keep=p.keep), whole.change(keep=~p.keep)]
    results = [block_sparse_attention_with_lse(p.q, p.k, p.v, layout_of(x), impl="triton") for x in parts]
    outs, lses = zip(*results, strict=True)
    joined = merge_states(list(outs), list(lses))
    true = block_sparse_attention_with_lse(p.q, p.k, p.v, layout_of(whole), impl="triton")
    for mine, expected in zip(joined, true, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("batch", "queries", "keys"), [(0, 5, 5), (2, 0, 5), (2, 5, 0), (2, 0, 0)], ids=["B = 0", "T = 0", "S = 0", "0"]
)
def test_nothing_in_gives_nothing_out(batch: int, queries: int, keys: int) -> None:
    n = Numbers.of(1)
    leaves = [
        n.normal(batch, heads, length, 4).requires_grad_() for heads, length in ((4, queries), (2, keys), (2, keys))
    ]
    layout = BlockLayout.dense(16, 16, queries, keys)
    out, lse = block_sparse_attention_with_lse(*leaves, layout, impl="triton")
    assert out.shape == (batch, 4, queries, 4)
    assert not out.any()
    assert torch.equal(lse, torch.full((batch, 4, queries), -math.inf, dtype=torch.float64))
    (out.sum() + lse.exp().sum()).backward()
    for leaf in leaves:
        assert leaf.grad is not None
        assert leaf.grad.shape == leaf.shape
        assert not leaf.grad.any()
