"""Layouts to FlexAttention and back, and FlexAttention as a second opinion on the numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask, flex_attention

from attnzoo_kernels import BlockLayout, Extras, UnsupportedError, block_sparse_attention_with_lse
from tests.attnzoo_kernels.oracle import Problem, solve, visible
from tests.strategies import Numbers

CAUSAL_COVER = pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])


def make(seed: int, queries: int = 64, keys: int = 96, block_q: int = 16, block_k: int = 32) -> BlockLayout:
    keep = Numbers.of(seed).chance(0.5, 2, 4, -(-queries // block_q), -(-keys // block_k))
    return BlockLayout.from_mask(keep, block_q, block_k, queries, keys)


@given(st.integers(0, 999), st.booleans(), st.integers(1, 70), st.integers(1, 100))
def test_a_round_trip_through_flex_reads_the_same_blocks(seed: int, causal: bool, queries: int, keys: int) -> None:
    layout = make(seed, queries, keys)
    back = BlockLayout.from_block_mask(layout.to_block_mask(causal=causal))
    expected = layout & BlockLayout.window(16, 32, queries, keys, window=keys) if causal else layout
    assert (back.block_q, back.block_k, back.seq_q, back.seq_k) == (16, 32, queries, keys)
    assert torch.equal(back.to_mask(), expected.to_mask())


@CAUSAL_COVER
def test_flex_attention_gives_the_same_numbers_on_the_same_blocks(causal: bool) -> None:
    n = Numbers.of(1)
    layout = make(2)
    q, k, v = n.normal(2, 4, 64, 8), n.normal(2, 4, 96, 8), n.normal(2, 4, 96, 8)
    flex, flex_lse = flex_attention(q, k, v, block_mask=layout.to_block_mask(causal=causal), return_lse=True)
    truth = solve(Problem(q, k, v, layout.to_mask(), 16, 32, causal), torch.zeros(2, 4, 64, 8))
    for impl in ("reference", "blocked"):
        out, lse = block_sparse_attention_with_lse(q, k, v, layout, causal=causal, impl=impl)
        torch.testing.assert_close(out, flex.double(), rtol=1e-10, atol=1e-10)
        seen = truth.lse > -torch.inf
        torch.testing.assert_close(lse[seen], flex_lse[seen].double(), rtol=1e-6, atol=1e-6)


@CAUSAL_COVER
def test_full_blocks_are_those_that_need_no_token_rule(causal: bool) -> None:
    layout = make(3)
    mask = layout.to_block_mask(causal=causal)
    p = Problem(torch.zeros(2, 4, 64, 1), torch.zeros(2, 4, 96, 1), torch.zeros(2, 4, 96, 1), layout.to_mask(), 16, 32)
    seen = visible(p.change(causal=causal)).unflatten(2, (4, 16)).unflatten(4, (3, 32))
    full = seen.all(5).all(3)
    partial = seen.any(5).any(3) & ~full
    assert mask.full_kv_num_blocks is not None
    assert torch.equal(mask.full_kv_num_blocks, full.sum(-1).int())
    assert torch.equal(mask.kv_num_blocks, partial.sum(-1).int())


def flex_mask(rule: Any, queries: int = 64, keys: int = 64) -> BlockMask:
    return create_block_mask(rule, 1, 1, queries, keys, device="cpu", BLOCK_SIZE=(16, 16))


@pytest.mark.parametrize(
    ("rule", "causal"),
    [
        (lambda b, h, t, s: s <= t, True),
        (lambda b, h, t, s: (s <= t) & (t // 16 - s // 16 < 2), True),
        (lambda b, h, t, s: t // 16 == s // 16, False),
        (lambda b, h, t, s: s >= 0, False),
    ],
    ids=["causal", "causal local blocks", "blocks on the diagonal", "everything"],
)
def test_masks_made_by_flex_are_read(rule: Any, causal: bool) -> None:
    layout = BlockLayout.from_block_mask(flex_mask(rule))
    p = Problem(*torch.zeros(3, 1, 1, 64, 1), layout.to_mask(), 16, 16, causal)
    t, s = torch.arange(64).unsqueeze(1), torch.arange(64)
    assert torch.equal(visible(p)[0, 0], rule(0, 0, t, s).expand(64, 64))


@pytest.mark.parametrize(
    "rule",
    [
        lambda b, h, t, s: (s <= t) & (t - s < 20),
        lambda b, h, t, s: s < t,
        lambda b, h, t, s: (t + s) % 2 == 0,
        lambda b, h, t, s: (s <= t) | (s // 16 == 3),
    ],
    ids=["token window", "strictly causal", "checkerboard", "causal but for one block"],
)
def test_a_mask_whose_token_rule_no_call_can_repeat_is_refused(rule: Any) -> None:
    with pytest.raises(UnsupportedError, match=r"block_mask: .*(token rule|one causality)"):
        BlockLayout.from_block_mask(flex_mask(rule))


def test_origins_do_not_go_to_flex() -> None:
    index = torch.zeros(1, 1, 4, 1, dtype=torch.int32)
    layout = BlockLayout.from_indices(index, 16, 16, 64, 64, origin=index)
    with pytest.raises(UnsupportedError, match="origin"):
        layout.to_block_mask()


@pytest.mark.parametrize("size", [(0, 64), (64, 0)])
def test_flex_has_no_empty_masks(size: tuple[int, int]) -> None:
    with pytest.raises(UnsupportedError, match="empty"):
        BlockLayout.dense(16, 16, *size).to_block_mask()


def test_a_given_layout_is_left_alone() -> None:
    layout = make(4)
    before = [x.clone() for x in (layout.start, layout.count, layout.col)]
    mask: BlockMask = layout.to_block_mask()
    BlockLayout.from_block_mask(mask)
    assert all(torch.equal(x, y) for x, y in zip((layout.start, layout.count, layout.col), before, strict=True))


def test_positions_of_items_and_heads_are_inside_the_mask() -> None:
    """What FlexAttention sees of a call in which items and heads have positions of their own."""
    q_pos = torch.stack(
        [torch.arange(32), (torch.arange(32) - 9).clamp(min=-1), torch.arange(32) // 2, torch.arange(32) + 3]
    )
    extras = Extras(q_pos=q_pos.view(2, 2, 32).int())
    mask = BlockLayout.dense(16, 16, 32, 40).to_block_mask(causal=True, extras=extras)
    shown = create_mask(mask.mask_mod, 2, 2, 32, 40, "cpu")
    assert torch.equal(shown, torch.arange(40) <= q_pos.view(2, 2, 32, 1))
