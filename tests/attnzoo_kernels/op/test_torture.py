"""What breaks attention code: nothing to read, NaN next door, huge scores, odd shapes and odd strides."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from attnzoo_kernels import BlockLayout, block_sparse_attention, block_sparse_attention_with_lse
from tests.attnzoo_kernels.op.test_agreement import assert_agrees, both, run, seeds_of
from tests.attnzoo_kernels.oracle import Answer, Problem, solve, visible
from tests.bounds import assert_near
from tests.strategies import STRIDES, Numbers, layout_of, strided


def problem(
    batch: int = 2, queries: int = 40, keys: int = 40, density: float = 0.6, dtype: Any = torch.float32, **rule: Any
) -> Problem:
    """Four heads on two KV heads, blocks of 8 queries and 16 keys."""
    n = Numbers.of(queries + keys)
    keep = n.chance(density, 1, 2, -(-queries // 8), -(-keys // 16))
    shapes = ((4, queries, 8), (2, keys, 8), (2, keys, 6))
    q, k, v = (n.normal(batch, *shape).to(dtype) for shape in shapes)
    return Problem(q, k, v, keep, 8, 16, **rule)


def answer(p: Problem, impl: str) -> Answer:
    return run(p, layout_of(p), seeds_of(p), impl)


def assert_bitwise(one: Answer, other: Answer) -> None:
    for name, x, y in zip(Answer._fields, one, other, strict=True):
        assert x is y is None or torch.equal(x, y), name


@both
def test_a_layout_that_lists_nothing_gives_zeros_and_no_warning(impl: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = answer(problem(density=0.0), impl)
    assert torch.equal(got.lse, torch.full_like(got.lse, -math.inf))
    assert not any(x.any() for x in (got.out, got.dq, got.dk, got.dv))


@both
def test_one_empty_row_of_blocks_disturbs_no_other(impl: str) -> None:
    p = problem()
    p.keep[:, :, 2] = False
    p.keep[:, :, 3, 0] = True
    assert_agrees(p, layout_of(p), (impl,))
    got = answer(p, impl)
    assert not got.out[:, :, 16:24].any()
    assert not got.dq[:, :, 16:24].any()
    assert (got.lse[:, :, 16:24] == -math.inf).all()
    assert got.out[:, :, 24:32].any()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@both
def test_a_block_that_nobody_reads_may_hold_anything(poison: float, impl: str) -> None:
    p = problem()
    p.keep[..., 1] = False
    clean = answer(p, impl)
    for x in (p.k, p.v):
        x[:, :, 16:32] = poison
    got = answer(p, impl)
    assert_bitwise(got, clean)
    assert not got.dk[:, :, 16:32].any()
    assert not got.dv[:, :, 16:32].any()


@both
def test_a_listed_block_that_causality_hides_is_not_read(impl: str) -> None:
    p = problem(queries=16, keys=40, q_pos=torch.arange(16, dtype=torch.int32).view(1, 1, 16))
    p.keep[:] = True
    clean = answer(p, impl)
    p.k[:, :, 16:], p.v[:, :, 16:] = math.nan, math.nan
    assert_bitwise(answer(p, impl), clean)


@both
def test_a_listed_block_that_the_window_hides_is_not_read(impl: str) -> None:
    p = problem(queries=8, keys=40, window=4)
    p.keep[:] = True
    clean = answer(p, impl)
    p.k[:, :, :16], p.v[:, :, :16] = math.nan, math.nan
    assert_bitwise(answer(p, impl), clean)


@both
def test_a_key_past_the_end_is_not_read_even_where_memory_holds_nan(impl: str) -> None:
    p = problem(keys=37)
    p.keep[:] = True
    clean = answer(p, impl)
    roomy = [torch.full((2, 2, 64, x.shape[3]), math.nan) for x in (p.k, p.v)]
    for room, x in zip(roomy, (p.k, p.v), strict=True):
        room[:, :, :37] = x
    assert_bitwise(answer(p.change(k=roomy[0][:, :, :37], v=roomy[1][:, :, :37]), impl), clean)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@both
def test_padded_keys_in_a_live_block_may_hold_anything(poison: float, impl: str) -> None:
    bias = torch.zeros(2, 1, 40)
    bias[1, :, 21:] = -math.inf
    p = problem(key_bias=bias)
    clean = answer(p, impl)
    p.k[1, :, 21:], p.v[1, :, 21:] = poison, poison
    got = answer(p, impl)
    assert_bitwise(got, clean)
    assert not got.dk[1, :, 21:].any()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@both
def test_a_bias_alone_hides_what_may_hold_anything(poison: float, impl: str) -> None:
    # All to all, in whole blocks: no slot is hidden by anything but the bias.
    bias = torch.zeros(2, 1, 32)
    bias[1, :, 21:] = -math.inf
    p = problem(queries=16, keys=32, causal=False, key_bias=bias)
    p.keep[:] = True
    clean = answer(p, impl)
    p.k[1, :, 21:], p.v[1, :, 21:] = poison, poison
    got = answer(p, impl)
    assert_bitwise(got, clean)
    assert not got.dk[1, :, 21:].any()


@both
def test_an_absent_row_may_hold_nan_and_disturbs_nobody(impl: str) -> None:
    q_pos = torch.arange(40, dtype=torch.int32).view(1, 1, 40).clone()
    q_pos[..., ::3] = -1
    p = problem(q_pos=q_pos)
    clean = answer(p, impl)
    p.q[:, :, ::3] = math.nan
    got = answer(p, impl)
    assert_bitwise(got, clean)
    assert not got.dq[:, :, ::3].any()
    assert (got.lse[:, :, ::3] == -math.inf).all()


@both
def test_an_item_whose_keys_are_all_padding_leaves_the_other_as_if_alone(impl: str) -> None:
    bias = torch.zeros(2, 1, 40)
    bias[1] = -math.inf
    p = problem(key_bias=bias)
    got = answer(p, impl)
    alone = p.change(q=p.q[:1], k=p.k[:1], v=p.v[:1], key_bias=bias[:1])
    seeds = tuple(x[:1] for x in seeds_of(p))
    assert_bitwise(Answer(*(x[:1] for x in got if x is not None)), run(alone, layout_of(alone), seeds, impl))
    assert not any(x[1].any() for x in (got.out, got.dq, got.dk, got.dv))


@both
def test_a_bias_that_hides_the_first_keys_leaves_finite_gradients(impl: str) -> None:
    bias = Numbers.of(1).normal(1, 4, 40).float()
    bias[..., :25] = -math.inf
    p = problem(key_bias=bias)
    assert_agrees(p, layout_of(p), (impl,))


@both
def test_the_least_finite_bias_on_every_key_is_no_hiding(impl: str) -> None:
    p = problem(dtype=torch.float32, causal=False, scale=0.0)
    p.keep[:] = True
    biased = p.change(key_bias=torch.full((1, 1, 40), torch.finfo(torch.float32).min))
    torch.testing.assert_close(
        answer(biased, impl).out, p.v.mean(2, keepdim=True).repeat_interleave(2, 1).expand(2, 4, 40, 6)
    )


@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@both
def test_huge_scores_stay_exact_where_they_can(size: float, dtype: torch.dtype, impl: str) -> None:
    p = problem(dtype=torch.float64, scale=1.0)
    p = p.change(q=torch.ones_like(p.q), k=p.k * 0 + size / 8)
    p = p.change(q=p.q.to(dtype), k=p.k.to(dtype), v=p.v.to(dtype))
    assert_agrees(p, layout_of(p), (impl,))


@both
def test_scores_far_below_any_sentinel_are_still_scores(impl: str) -> None:
    p = problem(scale=1.0)
    p.q[:], p.k[:] = -300.0, 300.0
    assert_agrees(p, layout_of(p), (impl,))


@both
def test_large_values_in_half_precision_do_not_overflow(impl: str) -> None:
    p = problem(dtype=torch.float16)
    p.v[:] = 6e4
    out = answer(p, impl).out
    assert torch.equal(out[out != 0], torch.full_like(out[out != 0], 6e4))


@pytest.mark.parametrize("scale", [0.0, -1.0, 0, 2])
def test_any_scale_is_honoured(scale: float) -> None:
    p = problem(dtype=torch.float64, scale=scale)
    assert_agrees(p, layout_of(p))


@both
def test_nan_in_one_query_stays_in_that_row(impl: str) -> None:
    p = problem(causal=False)
    p.keep[:] = True
    layout = layout_of(p)
    clean = block_sparse_attention(p.q, p.k, p.v, layout, causal=False, impl=impl)
    p.q[0, 1, 5] = math.nan
    out = block_sparse_attention(p.q, p.k, p.v, layout, causal=False, impl=impl)
    assert out[0, 1, 5].isnan().all()
    hit = torch.zeros(2, 4, 40, dtype=torch.bool)
    hit[0, 1, 5] = True
    assert torch.equal(out[~hit], clean[~hit])


@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 5, 5), (2, 0, 5), (2, 5, 0), (2, 0, 0), (0, 0, 0)])
@pytest.mark.parametrize("positions", [False, True], ids=["aligned", "q_pos"])
@both
def test_nothing_in_gives_nothing_out(impl: str, batch: int, queries: int, keys: int, positions: bool) -> None:
    p = problem(batch, queries, keys)
    if positions:
        p = p.change(q_pos=torch.zeros(batch, 1, queries, dtype=torch.int32))
    got = answer(p, impl)
    assert got.out.shape == (batch, 4, queries, 6)
    assert got.lse.shape == (batch, 4, queries)
    assert [g.shape for g in got[2:5]] == [x.shape for x in (p.q, p.k, p.v)]
    assert not got.out.any()
    assert (got.lse == -math.inf).all()


@pytest.mark.parametrize("stride", STRIDES[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_change_no_bit(dtype: torch.dtype, stride: str) -> None:
    p = problem(dtype=dtype)
    seeds = seeds_of(p)
    clean = run(p, layout_of(p), seeds, "blocked")
    odd = p.change(**{name: strided(getattr(p, name), stride) for name in ("q", "k", "v")})
    assert_bitwise(run(odd, layout_of(p), (strided(seeds[0], stride), seeds[1]), "blocked"), clean)


@pytest.mark.parametrize("stride", STRIDES[1:])
def test_strides_change_the_reference_by_rounding_alone(stride: str) -> None:
    p = problem()
    dout, dlse = seeds_of(p)
    mask = visible(p)
    odd = p.change(**{name: strided(getattr(p, name), stride) for name in ("q", "k", "v")})
    got = run(odd, layout_of(p), (strided(dout, stride), dlse), "reference")
    assert_near(got, solve(p, dout, dlse, mask), p, (dout, dlse), mask)


@both
def test_heads_packed_in_one_tensor_change_no_bit(impl: str) -> None:
    packed = Numbers.of(3).normal(2, 40, 3, 4, 8).float()
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    layout = BlockLayout.window(8, 16, 40, 40, window=20)
    plain = block_sparse_attention(*(x.contiguous() for x in (q, k, v)), layout, impl=impl)
    assert torch.equal(block_sparse_attention(q, k, v, layout, impl=impl), plain)


@both
def test_expanded_keys_and_gradients_are_summed_where_they_are_shared(impl: str) -> None:
    p = problem(dtype=torch.float64)
    k, v = (x[:, :1].clone() for x in (p.k, p.v))
    p = p.change(k=k.expand(2, 2, -1, -1), v=v.expand(2, 2, -1, -1))
    truth = solve(p, torch.ones(2, 4, 40, 6))
    leaves = [x.requires_grad_() for x in (k, v)]
    out = block_sparse_attention(p.q, *(x.expand(2, 2, -1, -1) for x in leaves), layout_of(p), impl=impl)
    grads = torch.autograd.grad(out.sum(), leaves)
    for grad, true in zip(grads, (truth.dk, truth.dv), strict=True):
        torch.testing.assert_close(grad, true.sum(1, keepdim=True), rtol=1e-11, atol=1e-11)


@both
def test_the_gradient_of_a_sum_is_that_of_ones(impl: str) -> None:
    p = problem(dtype=torch.float64)
    leaves = [x.clone().requires_grad_() for x in (p.q, p.k, p.v)]
    out = block_sparse_attention(*leaves, layout_of(p), impl=impl)
    summed = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    doubled = torch.autograd.grad(torch.cat([out, out]), leaves, torch.ones(4, 4, 40, 6, dtype=torch.float64) / 2)
    for one, other in zip(summed, doubled, strict=True):
        assert torch.equal(one, other)


@both
def test_the_tensors_of_a_call_are_left_alone(impl: str) -> None:
    q_pos = torch.arange(40, dtype=torch.int32).view(1, 1, 40).repeat(2, 1, 1)
    p = problem(q_pos=q_pos, key_bias=torch.zeros(1, 1, 40), window=Numbers.of(1).integers(1, 9, 4))
    layout = layout_of(p)
    tensors = (p.q, p.k, p.v, p.q_pos, p.key_bias, p.window, layout.start, layout.count, layout.col)
    before = [x.clone() for x in tensors]
    run(p, layout, seeds_of(p), impl)
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))


@both
def test_changing_an_input_in_place_before_backward_gives_no_wrong_gradient(impl: str) -> None:
    p = problem()
    leaf = p.q.clone().requires_grad_()
    (right,) = torch.autograd.grad(block_sparse_attention(leaf, p.k, p.v, layout_of(p), impl=impl).sum(), leaf)
    q = leaf * 1
    loss = block_sparse_attention(q, p.k, p.v, layout_of(p), impl=impl).sum()
    q.mul_(2)
    if impl == "reference":
        # It works on copies of its own.
        assert torch.equal(torch.autograd.grad(loss, leaf)[0], right)
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@both
def test_a_changed_input_is_seen_by_the_next_call_with_the_same_layout(impl: str) -> None:
    p = problem(dtype=torch.float64, window=9)
    layout = layout_of(p)
    answer(p, impl)
    p.k.mul_(-1)
    p.v.add_(1)
    mask = visible(p)
    seeds = seeds_of(p)
    assert_near(run(p, layout, seeds, impl), solve(p, *seeds, mask), p, seeds, mask)


@both
def test_changing_positions_in_place_is_seen_by_the_next_call(impl: str) -> None:
    q_pos = torch.arange(40, dtype=torch.int32).view(1, 1, 40).clone()
    p = problem(dtype=torch.float64, q_pos=q_pos)
    layout = layout_of(p)
    run(p, layout, seeds_of(p), impl)
    q_pos.sub_(7).clamp_(min=-1)
    assert_agrees(p, layout, (impl,))


@both
def test_the_log_sum_exp_is_the_same_whether_asked_for_or_not(impl: str) -> None:
    p = problem()
    layout: BlockLayout = layout_of(p)
    alone: Tensor = block_sparse_attention(p.q, p.k, p.v, layout, impl=impl)
    assert torch.equal(alone, block_sparse_attention_with_lse(p.q, p.k, p.v, layout, impl=impl)[0])
