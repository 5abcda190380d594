"""Attention of a call over what an evicting cache holds and over the call's own tokens.

One decoding row reads regions where they lie. For every other call the tokens that its rows may read are put together
in order: where the sequence has gaps, slots are fewer than positions, and rules are followed by slots.

Letters: B batch, T tokens of a call, H query heads, G KV heads, h heads of a region, D head width, Dv value width, M
query blocks, N columns of key blocks, w tokens in a block, L near blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnzoo.base.editing.operation import HeldKeys, OperationCall, attend
from attnzoo.base.editing.reads import CallEdits as CallEdits
from attnzoo.base.padding import add_front, drop_front, front_positions
from attnzoo.base.shared_layouts import Cover, dense_layout, sink_window_layout
from attnzoo.base.steps import HeldInputs, Way, is_training
from attnzoo.cache.evicting.cache import EvictingCache
from attnzoo.cache.evicting.regions import FullRegion, Region, StreamingRegion, column_of
from attnzoo.cache.lengths import Lengths
from attnzoo_kernels import BlockLayout, Extras
from attnzoo_kernels.runtime.plain import is_readable

LAYOUT_BLOCK = 64
"""Tokens in a block of layouts where a rule says nothing about blocks."""


@dataclass(frozen=True, eq=False)
class EvictingInputs(HeldInputs):
    """A call's own tokens and rows; what is remembered lies in a cache that evicts.

    Attributes:
        cache: That cache.
    """

    cache: EvictingCache = field(kw_only=True)


def attend_evicting(inputs: EvictingInputs, scale: float | None, impl: str) -> Tensor:
    """Attention over what a cache holds and over the call's own tokens.

    Args:
        inputs: The call, and its cache.
        scale: The factor on scores; ``None`` means ``D ** -0.5``.
        impl: Which implementation of the operation runs.

    Returns:
        ``[B, H, T, Dv]``, zeros for rows without a token.
    """
    q = inputs.q
    if 0 in q.shape:
        return q.new_zeros(*q.shape[:3], inputs.v.shape[3])
    cache = inputs.cache
    way = Way(q.shape[3] ** -0.5 if scale is None else scale, impl)
    is_whole = not Lengths(inputs.lengths).differ
    is_plain_row = impl == "auto" and is_whole and inputs.edits is None
    if is_plain_row and may_read_in_place(cache, q, inputs.k, inputs.v):
        return cache.attend_row(q, inputs.k, inputs.v, way.scale)
    parts = []
    for region in cache.regions:
        if isinstance(region, FullRegion):
            parts.append(_attend_sequence(inputs, region, way))
        elif region.in_place and region.kept.stride is None:
            parts.append(_attend_window(inputs, region, way))
        else:
            parts.append(_attend_blocks(inputs, region, way))
    return cache.in_order(parts)


def may_read_in_place(cache: EvictingCache, *own: Tensor) -> bool:
    """Whether a call of queries, keys and values ``[B, h, T, D]`` is one row that reads regions where they lie.

    Every item must have a token; nobody wants a record of it, or an implementation by name.
    """
    q = own[0]
    if q.shape[2] != 1 or cache.length is None or not is_readable(q) or is_training(*own):
        return False
    dtype = q.dtype
    if torch.is_autocast_enabled("cpu") or own[1].dtype != dtype or own[2].dtype != dtype:
        return False
    return cache.holds_in(dtype)


def _joined(inputs: EvictingInputs, region: Region, token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The call's queries for a region, and the keys and values ``[B, h, n, D]`` of tokens, held or the call's own."""
    q, k, v = inputs.own_of(region.heads)
    cache = inputs.cache
    return q, cache.read("k", region, k, token), cache.read("v", region, v, token)


def _is_shared(inputs: EvictingInputs) -> bool:
    return not (Lengths(inputs.lengths).differ or Lengths(inputs.cache.offset).differ)


def _attend_sequence(inputs: EvictingInputs, region: FullRegion, way: Way) -> Tensor:
    """Heads that keep everything: plain attention."""
    offset = inputs.cache.offset
    tokens = inputs.q.shape[2]
    slots = inputs.cache.bound + tokens
    token = torch.arange(slots, device=inputs.q.device).view(1, 1, -1)
    q, k, v = _joined(inputs, region, token)
    extras = Extras() if _is_shared(inputs) else Extras(q_pos=inputs.row_slots(offset))
    layout = dense_layout(LAYOUT_BLOCK, tokens, slots, q)
    operation = OperationCall(q=q, k=k, v=v, layout=layout, extras=extras, scale=way.scale, impl=way.impl)
    return attend(operation, inputs.edits, HeldKeys(region.heads))


def _attend_window(inputs: EvictingInputs, region: StreamingRegion, way: Way) -> Tensor:
    """A window of tokens: the sink and the window's past are put together before the call's own tokens."""
    offset = inputs.cache.offset
    tokens = inputs.q.shape[2]
    sink = region.kept.sink
    before = sink + region.local - 1
    # Slots before the first row: all of the past, or the sink and what the first row's window reaches.
    first = Lengths(offset).minimum(Lengths(before))
    slots = min(inputs.cache.bound, before) + tokens
    slot = torch.arange(slots, device=inputs.q.device).view(1, 1, -1)
    gap = offset - first.value
    token = torch.where(slot < sink, slot, slot + Lengths(gap).column(3))
    q, k, v = _joined(inputs, region, token)
    extras = Extras(window=region.local, sink=sink)
    if not _is_shared(inputs):
        extras = Extras(window=region.local, sink=sink, q_pos=inputs.row_slots(first.value))
    cover = Cover(region.local, sink, True, first.value)
    layout = sink_window_layout(LAYOUT_BLOCK, tokens, slots, cover, q)
    operation = OperationCall(q=q, k=k, v=v, layout=layout, extras=extras, scale=way.scale, impl=way.impl)
    return attend(operation, inputs.edits, HeldKeys(region.heads, token))


def _attend_blocks(inputs: EvictingInputs, region: StreamingRegion, way: Way) -> Tensor:
    """Near blocks and kept ones: each head's kept blocks are put together before the near ones and the call's own."""
    cache = inputs.cache
    size = region.block
    tokens = inputs.q.shape[2]
    offset = cache.offset
    device = inputs.q.device
    columns = _Columns.of(region, cache, tokens)
    block = columns.blocks(region, offset, device)  # [B|1, h|1, N]
    token = (block.unsqueeze(-1) * size + torch.arange(size, device=device)).flatten(-2)
    q, k, v = _joined(inputs, region, torch.where(token < 0, 0, token))
    # Query blocks lie on the sequence's own grid.
    block_q = size if tokens >= size else 1
    front = offset % block_q
    rows = Lengths(front).most(block_q - 1) + tokens
    begin = torch.arange(-(-rows // block_q), device=device) * block_q
    own = ((Lengths(offset - front).column() + begin.unsqueeze(0)) // size)[:, None, :, None]  # [B|1, 1, M, 1]
    block = block.unsqueeze(2)  # [B|1, h|1, 1, N]
    phase = region.phase(device)
    kept = region.kept.holds(block, phase.unsqueeze(-1) if isinstance(phase, Tensor) else phase)
    keep = (block >= 0) & (block <= own) & (kept | (own - block < region.local))
    q_pos = inputs.row_slots(offset % size + (columns.kept + columns.near) * size)
    operation = OperationCall(
        q=add_front(q, front, rows),
        k=k,
        v=v,
        layout=BlockLayout.from_mask(keep, block_q, size, rows, k.shape[2]),
        extras=Extras(q_pos=front_positions(q_pos, front, rows)),
        scale=way.scale,
        impl=way.impl,
    )
    return drop_front(attend(operation, inputs.edits, HeldKeys(region.heads, token)), front, tokens)


@dataclass(frozen=True)
class _Columns:
    """The key blocks of a call over near blocks and kept ones, one behind the other.

    Attributes:
        kept: Columns for blocks that a head keeps and that are near to no row; heads may have fewer.
        near: Columns for complete blocks that are near to the first row; an item may have fewer.
        own: Columns from the block on in which the call begins.
    """

    kept: int
    near: int
    own: int

    @classmethod
    def of(cls, region: StreamingRegion, cache: EvictingCache, tokens: int) -> _Columns:
        most = cache.bound // region.block
        kept = max(region.kept.count(max(0, most - region.local + 1), phase) for phase in region.phases)
        within = Lengths(cache.offset % region.block).most(region.block - 1)
        return cls(kept, min(region.local - 1, most), -(-(within + tokens) // region.block))

    def blocks(self, region: StreamingRegion, offset: int | Tensor, device: torch.device) -> Tensor:
        """Which of the sequence's blocks stands in each column, int64 ``[B|1, h|1, N]``; -1 or less for none."""
        current = column_of(offset // region.block, device)
        column = torch.arange(self.kept + self.near + self.own, device=device).view(1, 1, -1)
        phase = region.phase(device)
        gone = torch.as_tensor(current - region.local + 1, device=device).clamp(min=0)
        nth = region.kept.nth(column, phase)
        kept = torch.where(column < region.kept.count(gone, phase), nth, -1)
        return torch.where(column < self.kept, kept, current + column - self.kept - self.near)
