"""What a call's rule makes of a layout, entry by entry: what is read, and what each row sees of it.

Rows are source rows: those of layout and rule before broadcasting, so that a layout shared by all heads is examined
once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from attnzoo_kernels.spec.call import Call


@dataclass(frozen=True)
class Entries:
    """The listed blocks of all source rows, one after the other.

    Attributes:
        shape: ``Bs, Hs, M`` of the source rows.
        row: int64 ``[nnz]``, the source row of each entry.
        col: int64 ``[nnz]``, its key block.
        index: int64 ``[nnz]``, where it stands in the layout's ``col``.
        pos: int64 ``[B|1, H|1, M, block_q]``, row positions; a ragged tail repeats the last row.
    """

    shape: tuple[int, int, int]
    row: Tensor
    col: Tensor
    index: Tensor
    pos: Tensor


class Spans(NamedTuple):
    """Which slots the rows of the source query blocks see: those in ``[lo, hi)``, and those before ``sink``.

    Each is int64 ``[rows, block_q]``.
    """

    lo: Tensor
    hi: Tensor
    sink: Tensor


def list_entries(call: Call, room: int | None = None) -> tuple[Entries, Tensor]:
    """Lists the layout's entries at the smallest batch and head counts that layout and rule share.

    Args:
        call: The call.
        room: Entries of a row for which there is room; ``None`` reads back how many there are.

    Returns:
        The entries, and which of them there are, bool ``[nnz]``: with ``room``, the last ones stand for none.
    """
    batch, heads, _, seq_q, seq_k = call.shape
    blocks_q, _ = call.grid
    device = call.col.device
    pos = call.rule.positions(seq_q, seq_k, device)
    layout_batch, layout_heads, _ = call.start.shape
    src_batch = batch if max(layout_batch, pos.shape[0]) > 1 else 1
    src_heads = heads if call.rule.is_per_head else layout_heads
    repeat = src_heads // layout_heads

    def widen(x: Tensor) -> Tensor:
        return x.long().repeat_interleave(repeat, 1).expand(src_batch, src_heads, blocks_q).reshape(-1)

    start = widen(call.start)
    count = widen(call.count)
    ends = count.cumsum(0)
    if room is None:
        row = torch.repeat_interleave(torch.arange(count.shape[0], device=device), count)
        there = torch.ones_like(row, dtype=torch.bool)
    else:
        entry = torch.arange(count.shape[0] * room, device=device)
        row = torch.searchsorted(ends, entry, right=True).clamp_(max=max(count.shape[0] - 1, 0))
        there = entry < ends[-1:]
    within = torch.arange(row.shape[0], device=device) - (ends - count)[row]
    index = start[row] + within
    if room is not None:
        index = torch.where(there, index, 0)
    # Between lists anything may stand, at the very first entry too.
    col = torch.where(there, call.col.long()[index], 0)
    tail = torch.arange(blocks_q * call.block_q, device=device).clamp(max=max(seq_q - 1, 0))
    # Positions without a batch or head dimension broadcast against the source rows as they are.
    tiles = pos[..., tail].view(*pos.shape[:2], blocks_q, call.block_q)
    return Entries((src_batch, src_heads, blocks_q), row, col, index, tiles), there


def spans_of(call: Call, entries: Entries) -> Spans:
    """What the source rows see, the layout left aside."""
    rule = call.rule
    seq_k = call.k.shape[2]
    shape = (*entries.shape, call.block_q)

    def of_head(value: int | Tensor) -> int | Tensor:
        return value.long().view(1, -1, 1, 1) if isinstance(value, Tensor) else value

    window = None if rule.window is None else of_head(rule.window)
    lo, hi = rule.span(entries.pos, window, seq_k)
    sink = torch.zeros_like(lo) if window is None else rule.sink_end(entries.pos, of_head(rule.sink), seq_k)
    return Spans(*(x.expand(shape).reshape(-1, call.block_q) for x in (lo, hi, sink)))


def classify(call: Call, entries: Entries, spans: Spans, *, exact: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Which entries are read, are seen in full, and have a first slot that all rows see: bool ``[nnz]`` each.

    Where positions have gaps and there is a window, finding out exactly what is read takes ``nnz * block_q`` numbers;
    without ``exact``, more may count as read.
    """
    lo, hi, sink = spans
    first = entries.col * call.block_k
    last = (first + call.block_k).clamp(max=call.k.shape[2])
    least = lo.amin(1)
    most = lo.amax(1)
    if not exact or call.rule.q_pos is None or call.rule.window is None:
        # Positions run without gaps, or nothing is hidden below: the tile's extremes decide.
        read = (first < hi.amax(1)[entries.row]) & (last > least[entries.row])
        read |= first < sink.amax(1)[entries.row]
    else:
        wide_first = first.unsqueeze(1)
        wide_last = last.unsqueeze(1)
        in_span = torch.maximum(wide_first, lo[entries.row]) < torch.minimum(wide_last, hi[entries.row])
        read = (in_span | (wide_first < sink[entries.row])).any(1)
    lowest_hi = hi.amin(1)[entries.row]
    lowest_sink = sink.amin(1)[entries.row]
    highest_lo = most[entries.row]
    in_window = first >= highest_lo
    full = (last - first == call.block_k) & (((last <= lowest_hi) & in_window) | (last <= lowest_sink))
    anchored = ((first < lowest_hi) & in_window) | (first < lowest_sink)
    return read, full, anchored & read
