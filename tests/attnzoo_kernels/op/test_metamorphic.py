"""Laws between two calls: what must not change, and what must change in step."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tests.attnzoo_kernels.op.test_agreement import both, run, seeds_of
from tests.attnzoo_kernels.op.test_torture import assert_bitwise
from tests.attnzoo_kernels.oracle import Answer, Problem
from tests.strategies import Numbers, layout_of

CLOSE = 1e-11
seeds = st.integers(0, 9999)


def near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=CLOSE, atol=CLOSE)


def blocks(seed: int, *, queries: int = 4, keys: int = 3, heads: int = 1, causal: bool = False, **rule: Any) -> Problem:
    """Whole blocks of 8 queries and 6 keys, in double precision: 4 heads on 2."""
    n = Numbers.of(seed)
    keep = n.chance(0.6, 2, heads, queries, keys)
    q, k, v = n.normal(2, 4, 8 * queries, 5), n.normal(2, 2, 6 * keys, 5), n.normal(2, 2, 6 * keys, 3)
    return Problem(q, k, v, keep, 8, 6, causal, **rule)


def solved(p: Problem, impl: str = "blocked", given: tuple[Tensor, Tensor] | None = None) -> Answer:
    return run(p, layout_of(p), seeds_of(p) if given is None else given, impl)


def shuffle(x: Tensor, dim: int, order: Tensor, block: int) -> Tensor:
    return x.unflatten(dim, (-1, block)).index_select(dim, order).flatten(dim, dim + 1)


@given(seeds)
def test_permuted_key_blocks_give_the_same_and_permuted_gradients(seed: int) -> None:
    p = blocks(seed)
    order = Numbers.of(seed + 1).order(3)
    moved = p.change(k=shuffle(p.k, 2, order, 6), v=shuffle(p.v, 2, order, 6), keep=p.keep[..., order])
    one, other = solved(p), solved(moved)
    for name in ("out", "lse", "dq"):
        near(getattr(other, name), getattr(one, name))
    near(other.dk, shuffle(one.dk, 2, order, 6))
    near(other.dv, shuffle(one.dv, 2, order, 6))


@given(seeds)
def test_permuted_query_blocks_give_permuted_results_and_the_same_key_gradients(seed: int) -> None:
    p = blocks(seed)
    order = Numbers.of(seed + 1).order(4)
    dout, dlse = seeds_of(p)
    moved = p.change(q=shuffle(p.q, 2, order, 8), keep=p.keep[:, :, order])
    one = solved(p)
    other = solved(moved, given=(shuffle(dout, 2, order, 8), shuffle(dlse, 2, order, 8)))
    for name in ("out", "lse", "dq"):
        near(getattr(other, name), shuffle(getattr(one, name), 2, order, 8))
    near(other.dk, one.dk)
    near(other.dv, one.dv)


@given(seeds, st.booleans())
def test_items_and_groups_computed_alone_are_those_computed_together(seed: int, causal: bool) -> None:
    p = blocks(seed, heads=4, causal=causal)
    together = solved(p)
    for b in range(2):
        for g in range(2):
            heads, items, group = slice(2 * g, 2 * g + 2), slice(b, b + 1), slice(g, g + 1)
            alone = p.change(q=p.q[items, heads], k=p.k[items, group], v=p.v[items, group], keep=p.keep[items, heads])
            answer = solved(alone, given=tuple(x[items, heads] for x in seeds_of(p)))
            for name in ("out", "lse", "dq"):
                near(getattr(answer, name), getattr(together, name)[items, heads])
            near(answer.dk, together.dk[items, group])
            near(answer.dv, together.dv[items, group])


@given(seeds, st.sampled_from((-50.0, 0.7, 300.0)))
def test_a_constant_bias_moves_the_log_sum_exp_alone(seed: int, constant: float) -> None:
    p = blocks(seed, key_bias=torch.zeros(1, 1, 18, dtype=torch.float64))
    one = solved(p)
    other = solved(p.change(key_bias=p.key_bias + constant))
    near(other.lse, one.lse + constant)
    for name in ("out", "dq", "dk", "dv"):
        torch.testing.assert_close(getattr(other, name), getattr(one, name), rtol=1e-10, atol=1e-10)


@given(seeds)
def test_two_problems_side_by_side_are_the_two(seed: int) -> None:
    a, b = blocks(seed), blocks(seed + 1, queries=2, keys=4)
    keep = torch.zeros(2, 1, 6, 7, dtype=torch.bool)
    keep[:, :, :4, :3], keep[:, :, 4:, 3:] = a.keep, b.keep
    joined = Problem(*(torch.cat(pair, 2) for pair in ((a.q, b.q), (a.k, b.k), (a.v, b.v))), keep, 8, 6, False)
    given_seeds = [torch.cat(pair, 2) for pair in zip(seeds_of(a), seeds_of(b), strict=True)]
    whole = solved(joined, given=(given_seeds[0], given_seeds[1]))
    for name, at in (("out", 32), ("lse", 32), ("dq", 32), ("dk", 18), ("dv", 18)):
        near(getattr(whole, name)[:, :, :at], getattr(solved(a), name))
        near(getattr(whole, name)[:, :, at:], getattr(solved(b), name))


@given(seeds, st.booleans())
def test_every_block_listed_is_dense_attention(seed: int, causal: bool) -> None:
    p = blocks(seed, queries=3, keys=4, causal=causal)
    p.keep[:] = True
    q, k, v = (x.clone().requires_grad_() for x in (p.q, p.k, p.v))
    out = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    seed_out, seed_lse = seeds_of(p)
    answer = solved(p, given=(seed_out, torch.zeros_like(seed_lse)))
    near(answer.out, out)
    for mine, true in zip(answer[2:5], torch.autograd.grad(out, (q, k, v), seed_out), strict=True):
        near(mine, true)


@given(seeds, st.booleans())
def test_a_finer_layout_of_the_same_blocks_is_the_same(seed: int, causal: bool) -> None:
    p = blocks(seed, causal=causal)
    fine = p.change(keep=p.keep.repeat_interleave(4, 2).repeat_interleave(3, 3), block_q=2, block_k=2)
    for one, other in zip(solved(p)[:5], solved(fine)[:5], strict=True):
        near(other, one)


@both
def test_a_power_of_two_moves_between_queries_and_scale_without_a_bit_changed(impl: str) -> None:
    p = blocks(1, scale=0.5)
    one, other = solved(p, impl), solved(p.change(q=p.q * 8, scale=0.5 / 8), impl)
    assert torch.equal(other.out, one.out)
    assert torch.equal(other.lse, one.lse)
    assert torch.equal(other.dk, one.dk)
    assert torch.equal(other.dq * 8, one.dq)


@given(seeds, st.booleans())
def test_outputs_follow_values_linearly_and_empty_rows_stay_zero(seed: int, causal: bool) -> None:
    p = blocks(seed, causal=causal)
    one, other = solved(p), solved(p.change(v=3 * p.v + 2))
    full = one.lse > -math.inf
    near(other.out[full], 3 * one.out[full] + 2)
    assert not other.out[~full].any()


def test_unread_blocks_appended_change_no_bit() -> None:
    p = blocks(1, heads=4)
    junk = torch.full((2, 2, 11, 5), math.nan, dtype=torch.float64)
    wide = torch.cat([p.keep, torch.zeros(2, 4, 4, 2, dtype=torch.bool)], -1)
    longer = p.change(k=torch.cat([p.k, junk], 2), v=torch.cat([p.v, junk[..., :3]], 2), keep=wide)
    one, other = solved(p), solved(longer)
    assert_bitwise(other._replace(dk=other.dk[:, :, :18], dv=other.dv[:, :, :18]), one)
    assert not other.dk[:, :, 18:].any()
    assert not other.dv[:, :, 18:].any()


@given(seeds, st.booleans())
def test_shared_keys_are_repeated_keys_with_their_gradients_summed(seed: int, causal: bool) -> None:
    p = blocks(seed, heads=2, causal=causal)
    repeated = p.change(**{name: getattr(p, name).repeat_interleave(2, 1) for name in ("k", "v", "keep")})
    one, other = solved(p), solved(repeated)
    for name in ("out", "lse", "dq"):
        near(getattr(other, name), getattr(one, name))
    for name in ("dk", "dv"):
        near(getattr(other, name).unflatten(1, (2, 2)).sum(2), getattr(one, name))


@both
def test_a_causal_prefix_does_not_depend_on_what_follows(impl: str) -> None:
    n = Numbers.of(1)
    keep = n.chance(0.7, 1, 2, 5, 5)
    p = Problem(n.normal(1, 4, 40, 5), n.normal(1, 2, 40, 5), n.normal(1, 2, 40, 3), keep, 8, 8)
    whole = solved(p, impl)
    p.q[:, :, 24:], p.k[:, :, 24:], p.v[:, :, 24:] = math.nan, math.nan, math.nan
    spoilt = solved(p, impl)
    assert torch.equal(spoilt.out[:, :, :24], whole.out[:, :, :24])
    assert torch.equal(spoilt.dq[:, :, :24], whole.dq[:, :, :24])
    short = p.change(q=p.q[:, :, :24], k=p.k[:, :, :24], v=p.v[:, :, :24], keep=keep[:, :, :3, :3])
    near(solved(short, impl).out, whole.out[:, :, :24])


@given(seeds)
def test_every_key_doubled_adds_log_two(seed: int) -> None:
    p = blocks(seed)
    one = solved(p)
    twice = p.change(k=p.k.repeat_interleave(2, 2), v=p.v.repeat_interleave(2, 2), block_k=12)
    other = solved(twice)
    near(other.out, one.out)
    near(other.lse, one.lse + math.log(2))


@given(seeds, st.booleans())
def test_value_gradients_add_up_to_the_output_gradients_of_live_rows(seed: int, causal: bool) -> None:
    p = blocks(seed, causal=causal)
    answer = solved(p)
    dout = seeds_of(p)[0].masked_fill((answer.lse == -math.inf).unsqueeze(-1), 0.0)
    near(answer.dv.sum(2), dout.unflatten(1, (2, 2)).sum((2, 3)))


@given(seeds)
def test_equal_keys_give_no_query_gradient_but_that_of_the_log_sum_exp(seed: int) -> None:
    p = blocks(seed)
    p = p.change(k=p.k[:, :, :1].expand(-1, -1, 18, -1))
    dlse = seeds_of(p)[1]
    answer = solved(p)
    live = (answer.lse > -math.inf).unsqueeze(-1)
    expected = dlse.unsqueeze(-1) * p.k[:, :, :1].repeat_interleave(2, 1) / math.sqrt(5) * live
    near(answer.dq, expected)


@given(seeds, st.integers(1, 20))
def test_positions_spelt_out_are_the_default_ones(seed: int, window: int) -> None:
    p = blocks(seed, queries=2, keys=4, causal=True, window=window)
    spelt = p.change(q_pos=(torch.arange(16, dtype=torch.int32) + 8).view(1, 1, 16))
    for one, other in zip(solved(p)[:5], solved(spelt)[:5], strict=True):
        near(other, one)


@given(seeds, st.integers(1, 20), st.integers(0, 9))
def test_one_number_for_all_heads_is_that_number_for_each(seed: int, window: int, sink: int) -> None:
    p = blocks(seed, causal=True, window=window, sink=sink)
    each = p.change(window=torch.full((4,), window).int(), sink=torch.full((4,), sink).int())
    for one, other in zip(solved(p)[:5], solved(each)[:5], strict=True):
        near(other, one)


@given(seeds, st.integers(1, 23))
def test_a_prompt_in_two_chunks_is_the_prompt(seed: int, cut: int) -> None:
    n = Numbers.of(seed)
    q, k, v = n.normal(1, 4, 24, 5), n.normal(1, 2, 24, 5), n.normal(1, 2, 24, 3)
    whole = solved(Problem(q, k, v, torch.ones(1, 1, 3, 4).bool(), 8, 6, window=9, sink=2))
    later = torch.ones(1, 1, -(-(24 - cut) // 8), 4).bool()
    second = solved(Problem(q[:, :, cut:], k, v, later, 8, 6, window=9, sink=2))
    near(second.out, whole.out[:, :, cut:])
    near(second.lse, whole.lse[:, :, cut:])
