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
    with torch.inference_mode(False):
        return BlockLayout.dense(block, block, tokens, slots, device=device)


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
    with torch.inference_mode(False):
        return _sink_window(block, tokens, slots, cover, device)
