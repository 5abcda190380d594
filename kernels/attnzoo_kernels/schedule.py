"""What a call's rule makes of a layout: which entries are read, which of them need a mask, in buckets of equal length.

A schedule is a pure function of layout, rule and sizes, in plain tensors. Rows of the schedule are query blocks
``(b, h, m)``; source rows are those of the layout and rule before broadcasting, so that a layout shared by all heads is
examined once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from attnzoo_kernels.call import Call
from attnzoo_kernels.memo import remembered


@dataclass(frozen=True)
class Entries:
    """The listed blocks of all source rows, one after the other.

    Attributes:
        shape: ``Bs, Hs, M`` of the source rows.
        row: int64 ``[nnz]``, the source row of each entry.
        col: int64 ``[nnz]``, its key block.
        place: int64 ``[nnz]``, where it stands in the layout's ``col``.
        pos: int64 ``[B|1, H|1, M, block_q]``, row positions; a ragged tail repeats the last row.
    """

    shape: tuple[int, int, int]
    row: Tensor
    col: Tensor
    place: Tensor
    pos: Tensor


class Limits(NamedTuple):
    """How much of each partial block a row sees, in slots counted from the block's start: ``[R, block_q, partial]``.

    Attributes:
        hi: Slots from here on are hidden.
        lo: Slots before this are hidden, or ``None`` where there is no window.
        sink: Slots before this are seen after all, or ``None`` where there is no sink.
    """

    hi: Tensor
    lo: Tensor | None
    sink: Tensor | None

    def split(self, size: int) -> list[Limits]:
        """The limits of chunks of at most so many rows."""
        parts = [[None] * -(-self.hi.shape[0] // size) if x is None else x.split(size) for x in self]
        return [Limits(*chunk) for chunk in zip(*parts, strict=True)]


@dataclass(frozen=True)
class Bucket:
    """Rows that read equally many blocks.

    Attributes:
        rows: int64 ``[R]``, rows as flat indices into ``[B, H, M]``.
        cols: int64 ``[R, n]``, key blocks; those that need a mask come last.
        kv: int64 ``[R, n]``, the same as flat indices into ``[B, G, N]``.
        origin: int64 ``[R, n]``, rotary origins, or ``None``.
        partial: How many of the last columns need a mask.
        safe: Whether every row surely sees a key, the bias left aside.
        limits: Of the partial columns, where they are the same at every call.
        whole: Whether these are all rows, in order.
        every: Whether these are all rows, and each reads all blocks in order.
    """

    rows: Tensor
    cols: Tensor
    kv: Tensor
    origin: Tensor | None
    partial: int
    safe: bool
    limits: Limits | None = None
    whole: bool = False
    every: bool = False

    def split(self, size: int) -> Iterator[Bucket]:
        """The bucket in chunks of at most so many rows."""
        if self.rows.shape[0] <= size:
            yield self
            return
        limits = None if self.limits is None else self.limits.split(size)
        origin = None if self.origin is None else self.origin.split(size)
        parts = zip(self.rows.split(size), self.cols.split(size), self.kv.split(size), strict=True)
        for i, (rows, cols, kv) in enumerate(parts):
            yield Bucket(
                rows, cols, kv, None if origin is None else origin[i], self.partial, self.safe,
                None if limits is None else limits[i],
            )  # fmt: skip


@dataclass(frozen=True)
class Schedule:
    """The buckets of a call and its row positions, int64 ``[B|1, H|1, M, block_q]``."""

    buckets: tuple[Bucket, ...]
    pos: Tensor

    def positions(self, rows: Tensor, heads: int) -> Tensor:
        """Positions of the rows of some query blocks, int64 ``[R, block_q]``."""
        batch, pos_heads, blocks_q, _ = self.pos.shape
        if batch == pos_heads == 1:
            return self.pos[0, 0].index_select(0, rows % blocks_q)
        head, block = rows // blocks_q, rows % blocks_q
        at_batch = head // heads if batch > 1 else torch.zeros_like(head)
        at_head = head % heads if pos_heads > 1 else torch.zeros_like(head)
        return self.pos[at_batch, at_head, block]


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

    start, count = widen(call.start), widen(call.count)
    ends = count.cumsum(0)
    if room is None:
        row = torch.repeat_interleave(torch.arange(count.shape[0], device=device), count)
        there = torch.ones_like(row, dtype=torch.bool)
    else:
        index = torch.arange(count.shape[0] * room, device=device)
        row = torch.searchsorted(ends, index, right=True).clamp_(max=max(count.shape[0] - 1, 0))
        there = index < ends[-1:]
    within = torch.arange(row.shape[0], device=device) - (ends - count)[row]
    place = start[row] + within
    if room is not None:
        place = torch.where(there, place, 0)
    # Between lists anything may stand, at the very first place too.
    col = torch.where(there, call.col.long()[place], 0)
    tail = torch.arange(blocks_q * call.block_q, device=device).clamp(max=max(seq_q - 1, 0))
    # Positions without a batch or head dimension broadcast against the source rows as they are.
    tiles = pos[..., tail].view(*pos.shape[:2], blocks_q, call.block_q)
    return Entries((src_batch, src_heads, blocks_q), row, col, place, tiles), there


def _tile_values(call: Call, entries: Entries) -> tuple[Tensor, Tensor, Tensor]:
    """First slot seen ``lo``, end ``hi`` and the sink's end, each int64 ``[rows, block_q]`` of the source rows."""
    rule, seq_k = call.rule, call.k.shape[2]
    shape = (*entries.shape, call.block_q)

    def of_head(value: int | Tensor) -> int | Tensor:
        return value.long().view(1, -1, 1, 1) if isinstance(value, Tensor) else value

    window = None if rule.window is None else of_head(rule.window)
    lo, hi = rule.span(entries.pos, window, seq_k)
    sink = torch.zeros_like(lo) if window is None else rule.sink_end(entries.pos, of_head(rule.sink), seq_k)
    lo, hi, sink = (x.expand(shape).reshape(-1, call.block_q) for x in (lo, hi, sink))
    return lo, hi, sink


def classify(call: Call, entries: Entries, *, exact: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Which entries are read, are seen in full, and have a first slot that all rows see: bool ``[nnz]`` each.

    Where positions have gaps and there is a window, finding out exactly what is read takes ``nnz * block_q`` numbers;
    without ``exact``, more may count as read.
    """
    lo, hi, sink = _tile_values(call, entries)
    first = entries.col * call.block_k
    last = (first + call.block_k).clamp(max=call.k.shape[2])
    least, most = lo.amin(1), lo.amax(1)
    if not exact or call.rule.q_pos is None or call.rule.window is None:
        # Positions run without gaps, or nothing is hidden below: the tile's extremes decide.
        read = (first < hi.amax(1)[entries.row]) & (last > least[entries.row])
        read |= first < sink.amax(1)[entries.row]
    else:
        wide_first, wide_last = first.unsqueeze(1), last.unsqueeze(1)
        in_span = torch.maximum(wide_first, lo[entries.row]) < torch.minimum(wide_last, hi[entries.row])
        read = (in_span | (wide_first < sink[entries.row])).any(1)
    lowest_hi, lowest_sink = hi.amin(1)[entries.row], sink.amin(1)[entries.row]
    highest_lo = most[entries.row]
    in_window = first >= highest_lo
    full = (last - first == call.block_k) & (((last <= lowest_hi) & in_window) | (last <= lowest_sink))
    anchored = ((first < lowest_hi) & in_window) | (first < lowest_sink)
    return read, full, anchored & read


def limits_of(call: Call, pos: Tensor, rows: Tensor, cols: Tensor) -> Limits:
    """The limits of some blocks.

    Args:
        call: The call.
        pos: Row positions, int64 ``[R, block_q]``.
        rows: int64 ``[R]``, flat indices into ``[B, H, M]``.
        cols: int64 ``[R, partial]``, key blocks.
    """
    rule, seq_k = call.rule, call.k.shape[2]
    head = (rows // call.grid[0]) % call.q.shape[1]

    def of_row(value: int | Tensor) -> int | Tensor:
        return value.long()[head].unsqueeze(1) if isinstance(value, Tensor) else value

    first = cols.unsqueeze(1) * call.block_k

    def within(end: Tensor) -> Tensor:
        return (end.unsqueeze(-1) - first).clamp_(0, call.block_k).to(torch.int32)

    window = None if rule.window is None else of_row(rule.window)
    lo, hi = rule.span(pos, window, seq_k)
    if window is None:
        return Limits(within(hi), None, None)
    has_sink = isinstance(rule.sink, Tensor) or rule.sink > 0
    sink = within(rule.sink_end(pos, of_row(rule.sink), seq_k)) if has_sink else None
    return Limits(within(hi), within(lo), sink)


def build_schedule(call: Call) -> Schedule:
    """Builds the schedule of a call with bulk tensor arithmetic; O(entries + rows) memory."""
    batch, heads, _, seq_q, seq_k = call.shape
    if 0 in (batch, heads, seq_q, seq_k):
        return Schedule((), call.col.new_zeros(1, 1, call.grid[0], call.block_q, dtype=torch.int64))
    if call.grid[0] == 1 and call.rule.is_static and call.origins is None:
        quick = _one_block(call)
        if quick is not None:
            return quick
    entries, _ = list_entries(call)
    src_batch, src_heads, blocks_q = entries.shape
    read, full, anchored = classify(call, entries)
    row, partial = entries.row[read], ~full[read]
    order = torch.argsort(row * 2 + partial, stable=True)
    rows = src_batch * src_heads * blocks_q
    sources = _Sources(
        count=torch.bincount(row, minlength=rows),
        masked=torch.bincount(row[partial], minlength=rows),
        safe=torch.bincount(entries.row[anchored], minlength=rows) > 0,
        col=entries.col[read][order],
        origin=None if call.origins is None else call.origins.of_entry.long()[entries.place[read][order]],
    )
    source = torch.arange(rows, device=row.device).view(src_batch, src_heads, blocks_q)
    source = source.repeat_interleave(heads // src_heads, 1).expand(batch, heads, blocks_q).reshape(-1)
    schedule = Schedule((), entries.pos)
    return Schedule(tuple(_buckets(call, schedule, source, sources)), entries.pos)


def _kv_blocks(call: Call, rows: Tensor, cols: Tensor) -> Tensor:
    """Key blocks ``[R, n]`` of query blocks ``[R]`` as flat indices into ``[B, G, N]``."""
    _, heads, groups, _, _ = call.shape
    blocks_q, blocks_k = call.grid
    head = rows // blocks_q
    group = (head // heads) * groups + (head % heads) // (heads // groups)
    return group.unsqueeze(1) * blocks_k + cols


def _one_block(call: Call) -> Schedule | None:
    """The schedule of a decoding step, where all rows read equally many blocks, each of them in full."""
    batch, heads, _, seq_q, seq_k = call.shape
    start, count = call.start.long().reshape(-1, 1), call.count.reshape(-1)
    length = int(count[0])
    if length == 0 or not bool((count == length).all()):
        return None
    pos = call.rule.positions(seq_q, seq_k, start.device)
    window = call.rule.window if isinstance(call.rule.window, int) else None
    lo, hi = call.rule.span(pos, window, seq_k)
    cols = call.col.long()[start + torch.arange(length, device=start.device)]
    inside = (cols >= -(-int(lo.max()) // call.block_k)) & (cols < int(hi.min()) // call.block_k)
    if not bool(inside.all()):
        return None
    rows = torch.arange(batch * heads, device=start.device)
    repeat = heads // call.start.shape[1]
    cols = cols.view(*call.start.shape[:2], length).repeat_interleave(repeat, 1).expand(batch, -1, -1)
    cols = cols.reshape(batch * heads, length)
    every = length == call.grid[1] and bool((cols == torch.arange(length, device=cols.device)).all())
    bucket = Bucket(rows, cols, _kv_blocks(call, rows, cols), None, 0, safe=True, whole=True, every=every)
    return Schedule((bucket,), pos.view(1, 1, 1, seq_q))


@dataclass(frozen=True)
class _Sources:
    """What the source rows read: counts ``[rows]``, and their blocks one after the other, partial ones last."""

    count: Tensor
    masked: Tensor
    safe: Tensor
    col: Tensor
    origin: Tensor | None


def _buckets(call: Call, schedule: Schedule, source: Tensor, sources: _Sources) -> Iterator[Bucket]:
    """Groups rows by the number of blocks they read; rows that read nothing belong to none."""
    heads, blocks_k = call.shape[1], call.grid[1]
    begin = sources.count.cumsum(0) - sources.count
    lengths = sources.count[source]
    order = torch.argsort(lengths, stable=True)
    values, sizes = torch.unique_consecutive(lengths[order], return_counts=True)
    for length, rows in zip(values.tolist(), order.split(sizes.tolist()), strict=True):
        if length == 0:
            continue
        origin = source[rows]
        at = begin[origin].unsqueeze(1) + torch.arange(length, device=rows.device)
        cols = sources.col[at]
        partial = int(sources.masked[origin].max())
        limits = None
        if partial and call.rule.is_static:
            limits = limits_of(call, schedule.positions(rows, heads), rows, cols[:, length - partial :])
        whole = rows.shape[0] == source.shape[0]
        every = whole and length == blocks_k and bool((cols == torch.arange(length, device=rows.device)).all())
        yield Bucket(
            rows, cols, _kv_blocks(call, rows, cols),
            None if sources.origin is None else sources.origin[at],
            partial, bool(sources.safe[origin].all()), limits, whole, every,
        )  # fmt: skip


def schedule_for(call: Call, build: Callable[[Call], Schedule] = build_schedule) -> Schedule:
    """The schedule of a call, remembered where the rule holds no tensors."""
    return remembered(call, build)
