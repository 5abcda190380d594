"""Lists as the kernels read them: without blocks that the rule hides, those that need no mask first, and transposed.

Plain tensor arithmetic on the layout's device. Where the rule holds no tensors the lists are remembered with the
layout; their number is read back once. Otherwise nothing is read back: room is made for every pair of blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo_kernels.errors import UnsupportedError
from attnzoo_kernels.layouts.entries import Entries, classify, list_entries, spans_of
from attnzoo_kernels.layouts.memo import remembered
from attnzoo_kernels.spec.call import Call

MOST_ROOM = 1 << 24
"""Pairs of blocks for which room is made without reading back how many are listed."""


@dataclass(frozen=True)
class BlockLists:
    """Lists of blocks, one after the other.

    Attributes:
        start: int32 ``[b, h, R]``, R query blocks, or key blocks in transposed lists; b is 1 or B, h is 1, G or H.
        full: int32, as start: up to here entries need no mask.
        end: int32, as start.
        col: int32 ``[nnz]``.
        origin: int32 ``[nnz]`` beside col, or ``None``.
        order: int32, as start: rows with the longest lists first.
    """

    start: Tensor
    full: Tensor
    end: Tensor
    col: Tensor
    origin: Tensor | None
    order: Tensor


@dataclass(frozen=True)
class BlockListPair:
    """Lists of query blocks and transposed lists of key blocks."""

    queries: BlockLists
    keys: BlockLists


def lists_of(call: Call) -> BlockListPair:
    """The lists of a call.

    Raises:
        UnsupportedError: If a CUDA graph is being captured and the lists' number has to be read back.
    """
    return remembered(call, _build)


def _build(call: Call) -> BlockListPair:
    entries, there = _entries(call)
    read, full, _ = classify(call, entries, spans_of(call, entries), exact=False)
    state = torch.where(read & there, torch.where(full, 0, 1), 2)
    batch, heads, blocks_q = entries.shape
    blocks_k = call.grid[1]
    column = torch.div(entries.row, blocks_q, rounding_mode="floor") * blocks_k + entries.col
    origin = None if call.origins is None else call.origins.of_entry[entries.index]
    queries = _sorted(entries.row, state, there, (batch, heads, blocks_q), (entries.col, origin))
    keys = _sorted(column, state, there, (batch, heads, blocks_k), (entries.row % blocks_q, origin))
    return BlockListPair(queries, keys)


def _entries(call: Call) -> tuple[Entries, Tensor]:
    rows = call.start.numel()
    pairs = max(rows, call.q.shape[0] * call.q.shape[1] * call.grid[0]) * call.grid[1]
    if not call.rule.is_static and 0 < pairs <= MOST_ROOM and call.col.shape[0]:
        return list_entries(call, room=call.grid[1])
    if call.col.is_cuda and torch.cuda.is_current_stream_capturing():
        reason = "triton: while a graph is captured, this layout must have been used once before"
        raise UnsupportedError(f"block_sparse_attention: {reason}", (reason,))
    return list_entries(call)


def _sorted(
    row: Tensor, state: Tensor, there: Tensor, shape: tuple[int, int, int], values: tuple[Tensor, Tensor | None]
) -> BlockLists:
    """Entries by row, and by state within it: full, partial, hidden; what is not there comes last."""
    rows = shape[0] * shape[1] * shape[2]
    order = torch.argsort(torch.where(there, row * 3 + state, rows * 3), stable=True)

    def count(chosen: Tensor) -> Tensor:
        return torch.zeros(rows, dtype=torch.int64, device=row.device).index_add_(0, row, chosen.long())

    listed = count(there)
    full = count(there & (state == 0))
    read = count(there & (state < 2))
    start = listed.cumsum(0) - listed
    origin = None if values[1] is None else values[1][order].to(torch.int32)
    longest = torch.argsort(read.view(shape), dim=-1, descending=True, stable=True)
    start, full, end = ((start + length).to(torch.int32).view(shape) for length in (torch.zeros_like(read), full, read))
    return BlockLists(start, full, end, values[0][order].to(torch.int32), origin, longest.to(torch.int32))
