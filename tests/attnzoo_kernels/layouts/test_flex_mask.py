"""FlexAttention's masks with their token rule: what is read shows exactly what the mask shows, or is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask

from attnzoo_kernels import (
    BlockLayout,
    Extras,
    UnsupportedError,
    block_sparse_attention,
    read_block_mask,
)
from tests.strategies import Numbers

BATCH, HEADS = 2, 4
Sizes = tuple[int, int, int, int]
"""Rows, slots, and the sides of a block."""


def made(rule: Any, sizes: Sizes, batch: int = BATCH, heads: int = HEADS) -> BlockMask:
    rows, slots, *blocks = sizes
    return create_block_mask(rule, batch, heads, rows, slots, device="cpu", BLOCK_SIZE=tuple(blocks))


def shown_by(mask: BlockMask) -> Tensor:
    """What a mask shows, from its lists and its rule: bool ``[B, H, T, S]``."""
    rows, slots = mask.seq_lengths
    batch, heads, _ = mask.kv_num_blocks.shape
    seen = create_mask(mask.mask_mod, batch, heads, rows, slots, device="cpu")
    partial, full = _lists(mask, mask.kv_num_blocks, mask.kv_indices), torch.zeros_like(seen)
    if mask.full_kv_num_blocks is not None:
        full = _lists(mask, mask.full_kv_num_blocks, mask.full_kv_indices)
    return (partial & seen) | full


def _lists(mask: BlockMask, count: Tensor, index: Any) -> Tensor:
    rows, slots = mask.seq_lengths
    listed = torch.zeros(*count.shape, -(-slots // mask.BLOCK_SIZE[1]), dtype=torch.bool)
    for at in torch.cartesian_prod(*map(torch.arange, count.shape)).tolist():
        listed[(*at, index[tuple(at)][: count[tuple(at)]].long())] = True
    wide = listed.repeat_interleave(mask.BLOCK_SIZE[0], 2).repeat_interleave(mask.BLOCK_SIZE[1], 3)
    return wide[:, :, :rows, :slots]


def seen_by(arguments: dict[str, Any], sizes: Sizes, batch: int = BATCH, heads: int = HEADS) -> Tensor:
    """What a call sees: of equal scores and unit values, all that has a weight."""
    rows, slots, *_ = sizes
    v = torch.eye(slots, dtype=torch.float64).expand(batch, heads, -1, -1)
    q, k = torch.zeros(batch, heads, rows, 2), torch.zeros(batch, heads, slots, 2)
    return block_sparse_attention(q.double(), k.double(), v, impl="reference", **arguments) > 0


LENGTHS = torch.tensor([17, 40])
OFFSETS = torch.tensor([0, 9])
WINDOWS = torch.tensor([3, 50, 12, 20])

RULES: dict[str, Callable[[int, int], Any]] = {
    "causal at the first key": lambda t, s: lambda b, h, q, k: k <= q,
    "causal at the last key": lambda t, s: lambda b, h, q, k: k <= q + s - t,
    "everything": lambda t, s: lambda b, h, q, k: k >= 0,
    "window": lambda t, s: lambda b, h, q, k: (k <= q) & (q - k < 13),
    "window at the last key": lambda t, s: lambda b, h, q, k: (k <= q + s - t) & (q + s - t - k < 13),
    "window and sink": lambda t, s: lambda b, h, q, k: (k <= q) & ((q - k < 9) | (k < 5)),
    "windows of heads": lambda t, s: lambda b, h, q, k: (k <= q) & (q - k < WINDOWS[h]),
    "sinks of heads": lambda t, s: lambda b, h, q, k: (k <= q) & ((q - k < 9) | (k < h)),
    "window ahead too": lambda t, s: lambda b, h, q, k: (q - k).abs() < 13,
    "prefix": lambda t, s: lambda b, h, q, k: (k <= q) | (k < 11),
    "strictly causal": lambda t, s: lambda b, h, q, k: k < q,
    "lengths of items": lambda t, s: lambda b, h, q, k: k < LENGTHS[b],
    "chunk at offsets of items": lambda t, s: lambda b, h, q, k: k <= q + OFFSETS[b],
    "some heads causal": lambda t, s: lambda b, h, q, k: (k <= q) | (h > 1),
    "absent rows": lambda t, s: lambda b, h, q, k: (k <= q) & (q > 6),
}
SIZES = st.tuples(st.integers(1, 50), st.integers(1, 60), st.sampled_from([4, 8, 16]), st.sampled_from([4, 8, 16]))


@settings(max_examples=15)
@given(name=st.sampled_from(sorted(RULES)), sizes=SIZES, separate=st.booleans())
def test_the_rules_that_a_call_can_say_are_read_exactly_and_go_back_as_they_were(
    name: str, sizes: Sizes, separate: bool
) -> None:
    mask = made(RULES[name](sizes[0], sizes[1]), sizes)
    if not separate:
        mask = _unsplit(mask)
    call, shown = read_block_mask(mask), shown_by(mask)
    assert torch.equal(seen_by(call.arguments, sizes), shown)
    back = call.to_block_mask()
    assert (back.BLOCK_SIZE, back.seq_lengths) == (mask.BLOCK_SIZE, mask.seq_lengths)
    assert (back.full_kv_num_blocks is None) == (not separate)
    assert torch.equal(shown_by(back).expand_as(shown), shown)


def _unsplit(mask: BlockMask) -> BlockMask:
    rows, slots = mask.seq_lengths
    blocks = [-(-n // block) for n, block in zip((rows, slots), mask.BLOCK_SIZE, strict=True)]
    keep = torch.zeros(*mask.kv_num_blocks.shape, blocks[1], dtype=torch.bool)
    for count, index in (
        (mask.kv_num_blocks, mask.kv_indices),
        (mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        keep |= _lists(mask, count, index)[:, :, :: mask.BLOCK_SIZE[0], :: mask.BLOCK_SIZE[1]]  # type: ignore[arg-type]
    order = torch.argsort((~keep).byte(), dim=-1, stable=True).int()
    lists = keep.sum(-1, dtype=torch.int32), order
    return BlockMask.from_kv_blocks(
        *lists, BLOCK_SIZE=mask.BLOCK_SIZE, mask_mod=mask.mask_mod, seq_lengths=(rows, slots)
    )


@given(seed=st.integers(0, 10**6), density=st.sampled_from([0.02, 0.5, 0.97]), causal=st.booleans(), sizes=SIZES)
def test_any_other_mask_is_read_exactly_or_refused_by_name(
    seed: int, density: float, causal: bool, sizes: Sizes
) -> None:
    rows, slots, *_ = sizes
    keep = Numbers.of(seed).chance(density, rows, slots)

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return keep[q, k] & (k <= q + slots - rows) if causal else keep[q, k]

    mask = made(rule, sizes, 1, 1)
    try:
        call = read_block_mask(mask)
    except UnsupportedError as error:
        assert str(error).startswith("block_mask: ")
        return
    assert torch.equal(seen_by(call.arguments, sizes, 1, 1), shown_by(mask))


@given(
    seed=st.integers(0, 10**6),
    sizes=SIZES,
    causal=st.booleans(),
    window=st.sampled_from([None, 5, "heads"]),
    placed=st.booleans(),
)
def test_a_layout_with_a_rule_becomes_a_mask_that_shows_what_the_call_sees(
    seed: int, sizes: Sizes, causal: bool, window: Any, placed: bool
) -> None:
    n, (rows, slots, block_q, block_k) = Numbers.of(seed), sizes
    keep = n.chance(0.6, BATCH, HEADS, -(-rows // block_q), -(-slots // block_k))
    layout = BlockLayout.from_mask(keep, block_q, block_k, rows, slots)
    extras = Extras(
        window=n.integers(1, 20, HEADS).int() if window == "heads" else window,
        sink=seed % 7,
        q_pos=n.integers(-1, slots - 1, BATCH, 1, rows).int() if placed else None,
    )
    mask = layout.to_block_mask(causal=causal, extras=extras)
    assert torch.equal(shown_by(mask), seen_by({"layout": layout, "causal": causal, "extras": extras}, sizes))


@pytest.mark.parametrize(
    "rule",
    [lambda b, h, q, k: k >= 0, lambda b, h, q, k: q // 16 == k // 16],
    ids=["everything", "blocks on the diagonal"],
)
def test_a_layout_never_loses_a_rule_without_a_word(rule: Any) -> None:
    mask = made(rule, (64, 64, 16, 16), 1, 1)
    with pytest.warns(UserWarning, match=r"causal=False.*read_block_mask") as caught:
        BlockLayout.from_block_mask(mask)
    assert caught[0].filename == __file__
    with pytest.raises(ValueError, match="causal: expected False"):
        BlockLayout.from_block_mask(mask, causal=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layout = BlockLayout.from_block_mask(mask, causal=False)
    seen = seen_by({"layout": layout, "causal": False}, (64, 64, 16, 16), 1, 1)
    assert torch.equal(seen, shown_by(mask))


@pytest.mark.parametrize(
    "name", ["window", "causal at the first key", "prefix", "strictly causal", "window ahead too", "sinks of heads"]
)
def test_a_layout_alone_refuses_rules_that_it_does_not_hold(name: str) -> None:
    mask = made(RULES[name](48, 64), (48, 64, 16, 16))
    with pytest.raises(UnsupportedError, match=r"block_mask: .*token rule.*read_block_mask"):
        BlockLayout.from_block_mask(mask)


def test_the_extras_that_a_mask_does_not_say_are_refused() -> None:
    layout = BlockLayout.dense(16, 16, 32, 32)
    with pytest.raises(UnsupportedError, match="key_bias: a BlockMask"):
        layout.to_block_mask(extras=Extras(key_bias=torch.zeros(1, 1, 32)))
    with pytest.raises(UnsupportedError, match="gate: a BlockMask"):
        layout.to_block_mask(extras=Extras(gate="last"))
    with pytest.raises(TypeError, match="causal: expected a bool or None, got int"):
        BlockLayout.from_block_mask(layout.to_block_mask(), causal=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("more", [13, 14, 20], ids=["one", "two", "some"])
@pytest.mark.parametrize("name", ["window", "window and sink"])
def test_a_window_that_is_wider_in_a_single_row_is_no_window(name: str, more: int) -> None:
    window = 13 if name == "window" else 9
    rule = RULES[name](40, 40)

    def wider(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return rule(b, h, q, k) | ((q == 30) & (q - k >= window) & (q - k < window + more - 12))

    mask = made(wider, (40, 40, 8, 8), 1, 1)
    with pytest.raises(UnsupportedError, match="block_mask: "):
        read_block_mask(mask)
    # A layout holds no part of it either.
    with pytest.raises(UnsupportedError, match="block_mask: "):
        BlockLayout.from_block_mask(mask)
