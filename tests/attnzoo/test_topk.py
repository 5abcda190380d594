"""Choosing blocks against a sort of pairs, and what ties, missing blocks and bad scores do."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnzoo.topk import top_blocks

scores_of = st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.5, 0.5000001, 3.0]), min_size=1, max_size=9)


@settings(max_examples=200, deadline=None)
@given(scores=scores_of, count=st.integers(1, 10), seed=st.integers(0, 1 << 16))
def test_it_is_a_sort_of_pairs(scores: list[float], count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.rand(len(scores), generator=generator) < 0.7
    forced = torch.rand(len(scores), generator=generator) < 0.2
    rank = [
        (0 if must else 1, 0.0 if must else -score, n)
        for n, (score, may, must) in enumerate(zip(scores, allowed.tolist(), forced.tolist(), strict=True))
        if may or must
    ]
    chosen = sorted(n for _, _, n in sorted(rank)[:count])
    expected = chosen + [-1] * (count - len(chosen))
    assert top_blocks(torch.tensor(scores), count, allowed=allowed, forced=forced).tolist() == expected


def test_ties_go_to_the_lowest_index_in_any_size() -> None:
    for blocks in (3, 64, 1000):
        equal = torch.zeros(2, 3, blocks)
        assert torch.equal(top_blocks(equal, 3), torch.arange(3).expand(2, 3, 3))


def test_rows_do_not_know_each_other() -> None:
    scores = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    whole = top_blocks(scores, 4)
    poisoned = scores.clone()
    poisoned[1] = torch.nan
    assert torch.equal(top_blocks(poisoned, 4)[0], whole[0])
    assert torch.equal(top_blocks(scores[:, 1:2], 4), whole[:, 1:2])


def test_blocks_that_are_not_allowed_may_hold_anything() -> None:
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0])
    allowed = torch.tensor([True, True, False, True])
    for bad in (torch.nan, torch.inf, -torch.inf):
        scores[2] = bad
        assert top_blocks(scores, 2, allowed=allowed).tolist() == [1, 3]


def test_infinite_scores_do_not_displace_forced_blocks_nor_disappear() -> None:
    scores = torch.tensor([torch.inf, torch.inf, 0.0, -torch.inf])
    forced = torch.tensor([False, False, True, False])
    assert top_blocks(scores, 2, forced=forced).tolist() == [0, 2]
    assert top_blocks(scores, 4, forced=forced).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_any_dtype_works_and_nothing_has_a_gradient(dtype: torch.dtype) -> None:
    scores = torch.tensor([1, 5, 3]).to(dtype)
    if dtype.is_floating_point:
        scores.requires_grad_()
    chosen = top_blocks(scores, 2)
    assert chosen.tolist() == [1, 2]
    assert chosen.dtype == torch.int64
    assert not chosen.requires_grad


def test_no_blocks_give_none() -> None:
    assert top_blocks(torch.zeros(2, 0), 3).tolist() == [[-1] * 3] * 2
    assert top_blocks(torch.zeros(0, 4), 3).shape == (0, 3)
    assert math.prod(top_blocks(torch.zeros(2, 4), 0).shape) == 0
