"""Layouts that layers share: one object for all layers of a model, so that its schedule is made once.

Letters: T query tokens, S key tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnzoo.cache.lengths import Lengths
from attnzoo_kernels import BlockLayout, remembers
from attnzoo_kernels.runtime.plain import is_plain


class Cover(NamedTuple):
    """A window in tokens, its sink, whether it is causal, and the slot of the first row (an int, or int64 ``[B]``)."""

    window: int
    sink: int
    causal: bool
    first: int | Tensor


def may_share(x: Tensor) -> bool:
    """Whether a layout made for this tensor may outlive the call: not while tracing, nor on tensors that are none."""
    return is_plain(x)


def dense_layout(block: int, tokens: int, slots: int, like: Tensor) -> BlockLayout:
    """Every block of ``T x S``, on the device of a tensor."""
    if may_share(like):
        return _shared_dense(block, tokens, slots, like.device)
    return BlockLayout.dense(block, block, tokens, slots, device=like.device)


def sink_window_layout(block: int, tokens: int, slots: int, cover: Cover, like: Tensor) -> BlockLayout:
    """The blocks that cover a window and its sink."""
    if may_share(like) and not Lengths(cover.first).differ:
        return _shared_sink_window(block, tokens, slots, cover, like.device)
    return _sink_window(block, tokens, slots, cover, like.device)


@remembers(32)
def _shared_dense(block: int, tokens: int, slots: int, device: torch.device) -> BlockLayout:
    return _dense_blocks(block, -(-tokens // block), -(-slots // block), device).with_lengths(tokens, slots)


@remembers(32)
def _dense_blocks(block: int, rows: int, columns: int, device: torch.device) -> BlockLayout:
    """The lists of all lengths of so many blocks."""
    with torch.inference_mode(False):
        return BlockLayout.dense(block, block, rows * block, columns * block, device=device)


def _sink_window(block: int, tokens: int, slots: int, cover: Cover, device: torch.device) -> BlockLayout:
    return BlockLayout.sink_window(
        block,
        block,
        tokens,
        slots,
        window=cover.window,
        sink=cover.sink,
        causal=cover.causal,
        q_start=cover.first,
        device=device,
    )


@remembers(32)
def _shared_sink_window(block: int, tokens: int, slots: int, cover: Cover, device: torch.device) -> BlockLayout:
    if tokens == 1 and isinstance(cover.first, int):
        return _one_row(block, _of_one_row(block, slots, cover), -(-slots // block), device).with_lengths(1, slots)
    with torch.inference_mode(False):
        return _sink_window(block, tokens, slots, cover, device)


def _of_one_row(block: int, slots: int, cover: Cover) -> tuple[tuple[int, int], ...]:
    """The runs of blocks of a single row: those of the sink outside its window, then the window's."""
    first = cover.first if isinstance(cover.first, int) else int(cover.first)
    blocks = -(-slots // block)
    ahead = 0 if cover.causal else cover.window - 1
    low = max((first - cover.window + 1) // block, 0)
    high = min((first + ahead) // block, blocks - 1)
    sinks = min(-(-cover.sink // block), blocks)
    before = min(sinks, low) if high >= 0 or not cover.causal else 0
    behind = (max(high + 1, before), sinks if not cover.causal else 0)
    return tuple((start, end) for start, end in ((0, before), (low, high + 1), behind) if start < end)


@remembers(32)
def _one_row(block: int, runs: tuple[tuple[int, int], ...], columns: int, device: torch.device) -> BlockLayout:
    """One list, of all lengths of so many blocks; made where it lies, without a copy that would synchronise."""
    with torch.inference_mode(False):
        blocks = [torch.arange(start, end, device=device) for start, end in runs]
        index = torch.cat(blocks) if blocks else torch.arange(0, device=device)
        return BlockLayout.from_indices(index.view(1, 1, 1, -1), block, block, 1, columns * block)
