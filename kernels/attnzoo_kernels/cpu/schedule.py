"""Buckets of query blocks that read equally many key blocks, and the chunks in which they are computed.

A schedule is a pure function of layout, rule and sizes, in plain tensors. Its rows are query blocks ``(b, h, m)``, each
of which has a source row (:mod:`attnzoo_kernels.layouts.entries`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from attnzoo_kernels.layouts.entries import Spans, classify, list_entries, spans_of
from attnzoo_kernels.layouts.memo import remembered
from attnzoo_kernels.runtime.store import bytes_of, note_growth
from attnzoo_kernels.spec.call import Call

CHUNK_SCORES = 1 << 18
"""Scores in one chunk and thread: what stays in a core's cache between the two products."""

MOST_LIMITS = 1 << 20
"""Limits that are made beforehand for a single call."""


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
        whole, rest = divmod(self.hi.shape[0], size)
        return self.split_by([size] * whole + [rest] * (rest > 0))

    def split_by(self, sizes: list[int]) -> list[Limits]:
        """The limits of so many rows each."""
        parts = [[None] * len(sizes) if x is None else x.split(sizes) for x in self]
        return [Limits(*chunk) for chunk in zip(*parts, strict=True)]

    def common(self) -> Limits:
        """Those of a single row where they are all rows', else all."""
        hi, lo, sink = self
        agree = all(x is None or bool((x == x[:1]).all()) for x in self)
        return Limits(hi[:1], None if lo is None else lo[:1], None if sink is None else sink[:1]) if agree else self

    def of_rows(self, partial: int) -> Limits:
        """Those of ``[R * partial, block_q, 1]`` entries, ``partial`` to a row, as ``[R, block_q, partial]``."""

        def by_row(x: Tensor) -> Tensor:
            return x.view(-1, partial, x.shape[1]).transpose(1, 2).contiguous()

        hi, lo, sink = self
        return Limits(by_row(hi), None if lo is None else by_row(lo), None if sink is None else by_row(sink))


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
        runs: Whether each row's blocks follow one another.
        row_indices: The rows as numbers.
        firsts: The first block of each row, as in ``kv``, as numbers.
    """

    rows: Tensor
    cols: Tensor
    kv: Tensor
    origin: Tensor | None
    partial: int
    safe: bool
    limits: Limits | None
    runs: bool
    row_indices: list[int]
    firsts: list[int]

    @cached_property
    def span(self) -> slice | None:
        """The rows as a slice, where they follow one another."""
        first = self.row_indices[0]
        last = self.row_indices[-1]
        return slice(first, last + 1) if last - first == len(self.row_indices) - 1 else None

    def split(self, size: int) -> Iterator[Bucket]:
        """The bucket in chunks of at most so many rows."""
        if len(self.row_indices) <= size:
            yield self
            return
        limits = None if self.limits is None else self.limits.split(size)
        origin = None if self.origin is None else self.origin.split(size)
        parts = zip(self.rows.split(size), self.cols.split(size), self.kv.split(size), strict=True)
        for i, (rows, cols, kv) in enumerate(parts):
            here = slice(i * size, (i + 1) * size)
            yield Bucket(
                rows, cols, kv, None if origin is None else origin[i], self.partial, self.safe,
                None if limits is None else limits[i], self.runs, self.row_indices[here], self.firsts[here],
            )  # fmt: skip


@dataclass(frozen=True)
class Schedule:
    """The buckets of a call, and where its rows stand.

    Attributes:
        buckets: The rows that read something.
        pos: Row positions, int64 ``[B|1, H|1, M, block_q]``.
        source: The source row of each row, int64 ``[B * H * M]``.
        spans: What the source rows see; nothing where no bucket needs a mask.
    """

    buckets: tuple[Bucket, ...]
    pos: Tensor
    source: Tensor
    spans: Spans
    _chunks: dict[int, list[Bucket]] = field(default_factory=dict)

    def chunks(self, scores: int, block_q: int, block_k: int) -> list[Bucket]:
        """The rows in chunks of about so many scores, ordered by their first rows.

        Neighbouring rows read much the same keys, which are still in the cache then.
        """
        if scores not in self._chunks:
            parts: list[Bucket] = []
            for bucket in self.buckets:
                parts += bucket.split(max(1, scores // (block_q * bucket.cols.shape[1] * block_k)))
            self._chunks[scores] = sorted(parts, key=lambda part: part.row_indices[0])
            note_growth(bytes_of(self._chunks[scores]))
        return self._chunks[scores]

    @property
    def entries(self) -> int:
        """Key blocks read, counted once for each row that reads them."""
        return sum(bucket.cols.numel() for bucket in self.buckets)

    def reads_often(self, call: Call) -> bool:
        """Whether keys are read more than once on average."""
        batch, _, groups, _, seq_k = call.shape
        return self.entries * call.block_k > batch * groups * seq_k

    def limits_in(self, call: Call, part: Bucket) -> Limits:
        """The limits of a chunk's partial columns, made now unless they were beforehand."""
        if part.limits is not None:
            return part.limits
        return limits_of(call, self.spans, self.source[part.rows], part.cols[:, part.cols.shape[1] - part.partial :])

    def positions(self, rows: Tensor, heads: int) -> Tensor:
        """Positions of the rows of some query blocks, int64 ``[R, block_q]``."""
        batch, pos_heads, blocks_q, _ = self.pos.shape
        if batch == pos_heads == 1:
            return self.pos[0, 0].index_select(0, rows % blocks_q)
        head = rows // blocks_q
        block = rows % blocks_q
        at_batch = head // heads if batch > 1 else torch.zeros_like(head)
        at_head = head % heads if pos_heads > 1 else torch.zeros_like(head)
        return self.pos[at_batch, at_head, block]


def limits_of(call: Call, spans: Spans, source: Tensor, cols: Tensor) -> Limits:
    """The limits of some blocks.

    Args:
        call: The call.
        spans: What source rows see.
        source: int64 ``[R]``, the source rows.
        cols: int64 ``[R, partial]``, key blocks.
    """
    first = cols.unsqueeze(1) * call.block_k

    def within(end: Tensor) -> Tensor:
        return (end.index_select(0, source).unsqueeze(-1) - first).clamp_(0, call.block_k).to(torch.int32)

    rule = call.rule
    if rule.window is None:
        return Limits(within(spans.hi), None, None)
    has_sink = isinstance(rule.sink, Tensor) or rule.sink > 0
    return Limits(within(spans.hi), within(spans.lo), within(spans.sink) if has_sink else None)


def build_schedule(call: Call) -> Schedule:
    """Builds the schedule of a call with bulk tensor arithmetic; O(entries + rows) memory."""
    batch, heads, _, seq_q, seq_k = call.shape
    if 0 in (batch, heads, seq_q, seq_k):
        nothing = call.col.new_zeros(1, 1, call.grid[0], call.block_q, dtype=torch.int64)
        return Schedule((), nothing, nothing.new_zeros(batch * heads * call.grid[0]), _no_spans(call))
    if call.grid[0] == 1 and call.rule.is_static and call.origins is None:
        quick = _one_block(call)
        if quick is not None:
            return quick
    entries, _ = list_entries(call)
    src_batch, src_heads, blocks_q = entries.shape
    spans = spans_of(call, entries)
    read, full, anchored = classify(call, entries, spans)
    row = entries.row[read]
    partial = ~full[read]
    order = torch.argsort(row * 2 + partial, stable=True)
    rows = src_batch * src_heads * blocks_q
    sources = _Sources(
        count=torch.bincount(row, minlength=rows),
        masked=torch.bincount(row[partial], minlength=rows),
        safe=torch.bincount(entries.row[anchored], minlength=rows) > 0,
        col=entries.col[read][order],
        origin=None if call.origins is None else call.origins.of_entry.long()[entries.index[read][order]],
    )
    source = torch.arange(rows, device=row.device).view(src_batch, src_heads, blocks_q)
    source = source.repeat_interleave(heads // src_heads, 1).expand(batch, heads, blocks_q).reshape(-1)
    return Schedule(tuple(_buckets(call, spans, source, sources)), entries.pos, source, spans)


def _first_blocks(call: Call, rows: Tensor) -> Tensor:
    """The first key blocks, as flat indices into ``[B, G, N]``, of the KV heads that query blocks ``[R]`` read."""
    _, heads, groups, _, _ = call.shape
    blocks_q, blocks_k = call.grid
    head = rows // blocks_q
    group = (head // heads) * groups + (head % heads) // (heads // groups)
    return group * blocks_k


def _one_block(call: Call) -> Schedule | None:
    """The schedule of a decoding step, where all rows read equally many blocks, each of them in full."""
    batch, heads, _, seq_q, seq_k = call.shape
    start = call.start.long().reshape(-1, 1)
    count = call.count.reshape(-1)
    length = int(count[0])
    if length == 0 or not bool((count == length).all()):
        return None
    cols = call.col.long()[start + torch.arange(length, device=start.device)]
    least, most = (int(x) for x in torch.aminmax(cols))
    lo, hi = _seen_by_all(call)
    if least * call.block_k < lo or (most + 1) * call.block_k > hi:
        return None
    rows = torch.arange(batch * heads, device=start.device)
    repeat = heads // call.start.shape[1]
    cols = cols.view(*call.start.shape[:2], length).repeat_interleave(repeat, 1).expand(batch, -1, -1)
    cols = cols.reshape(batch * heads, length)
    runs = int(cols[0, -1] - cols[0, 0]) == length - 1 and bool((cols.diff(dim=1) == 1).all())
    kv = cols + _first_blocks(call, rows).unsqueeze(1)
    row_indices = list(range(batch * heads))
    firsts = kv[:, 0].tolist()
    bucket = Bucket(rows, cols, kv, None, 0, safe=True, limits=None, runs=runs, row_indices=row_indices, firsts=firsts)
    pos = call.rule.positions(seq_q, seq_k, start.device)
    return Schedule((bucket,), pos.view(1, 1, 1, seq_q), torch.zeros_like(rows), _no_spans(call))


def _seen_by_all(call: Call) -> tuple[int, int]:
    """The slots ``[lo, hi)`` that every row of a call sees, its positions being those of the last tokens."""
    rule = call.rule
    _, _, _, seq_q, seq_k = call.shape
    window = rule.window if isinstance(rule.window, int) else None
    first = seq_k - (seq_q if rule.packed is None else rule.packed.tokens)
    last = seq_k - 1
    hi = first + 1 if rule.causal else seq_k if window is None else first + window
    lo = 0 if window is None else last - window + 1
    return max(lo, 0), min(hi, seq_k)


def _no_spans(call: Call) -> Spans:
    nothing = call.col.new_empty(0, call.block_q, dtype=torch.int64)
    return Spans(nothing, nothing, nothing)


@dataclass(frozen=True)
class _Sources:
    """What the source rows read: counts ``[rows]``, and their blocks one after the other, partial ones last."""

    count: Tensor
    masked: Tensor
    safe: Tensor
    col: Tensor
    origin: Tensor | None


def _buckets(call: Call, spans: Spans, source: Tensor, sources: _Sources) -> Iterator[Bucket]:
    """Groups rows by the number of blocks they read; rows that read nothing belong to none."""
    counts = sources.count[source]
    order = torch.argsort(counts, stable=True)[int((counts == 0).sum()) :]
    origin = source[order]
    lengths = sources.count[origin]
    values, sizes = torch.unique_consecutive(lengths, return_counts=True)
    # Entry by entry, in the rows' new order.
    begin = sources.count.cumsum(0) - sources.count
    at_row = lengths.cumsum(0) - lengths
    at = torch.repeat_interleave(begin[origin] - at_row, lengths)
    at += torch.arange(at.shape[0], device=at.device)
    cols = sources.col[at]
    kv = cols + torch.repeat_interleave(_first_blocks(call, order), lengths)
    breaks = torch.zeros_like(cols)
    breaks[1:] = cols.diff() != 1
    breaks[at_row] = 0
    of_row = torch.repeat_interleave(torch.arange(values.shape[0], device=at.device), sizes)
    nothing = torch.zeros_like(values)
    broken = nothing.index_add(0, torch.repeat_interleave(of_row, lengths), breaks).tolist()
    unsafe = nothing.index_add(0, of_row, (~sources.safe[origin]).long()).tolist()
    partial = nothing.scatter_reduce(0, of_row, sources.masked[origin], "amax")
    limits = _limits_by_bucket(call, spans, cols, (origin, lengths, partial[of_row]), (partial * sizes).tolist())
    entries = (values * sizes).tolist()
    rows = order.split(sizes.tolist())
    origins = [None] * len(entries) if sources.origin is None else sources.origin[at].split(entries)
    row_indices = order.tolist()
    firsts = kv[at_row].tolist()
    first = 0
    parts = zip(values.tolist(), rows, cols.split(entries), kv.split(entries), partial.tolist(), strict=True)
    for i, (length, of_bucket, *blocks, masked) in enumerate(parts):
        here = slice(first, first + of_bucket.shape[0])
        first = first + of_bucket.shape[0]
        own_origin = origins[i]
        yield Bucket(
            of_bucket, blocks[0].view(-1, length), blocks[1].view(-1, length),
            None if own_origin is None else own_origin.view(-1, length), masked, not unsafe[i],
            limits[i].of_rows(masked) if masked and limits else None, not broken[i], row_indices[here], firsts[here],
        )  # fmt: skip


def _limits_by_bucket(
    call: Call, spans: Spans, cols: Tensor, rows: tuple[Tensor, Tensor, Tensor], sizes: list[int]
) -> list[Limits]:
    """The limits of each bucket's last columns, ``[entries, block_q, 1]``; none where they would be large for one call.

    Args:
        call: The call.
        spans: What source rows see.
        cols: The entries, row after row.
        rows: Of each row: its source row, how many entries it has, and how many of the last may need a mask.
        sizes: Of each bucket: its entries that may need a mask.
    """
    if not call.rule.is_static and sum(sizes) * call.block_q > MOST_LIMITS:
        return []
    origin, lengths, partial = rows
    left = torch.repeat_interleave(lengths.cumsum(0), lengths) - torch.arange(cols.shape[0], device=cols.device)
    masked = (left <= torch.repeat_interleave(partial, lengths)).nonzero().squeeze(1)
    of_entry = torch.repeat_interleave(origin, partial)
    return limits_of(call, spans, of_entry, cols[masked].unsqueeze(1)).split_by(sizes)


def schedule_for(call: Call, build: Callable[[Call], Schedule] = build_schedule) -> Schedule:
    """The schedule of a call, remembered where the rule holds no tensors."""
    return remembered(call, build)


def chunks_of(call: Call, schedule: Schedule, *, tiled: bool = False) -> list[Bucket]:
    """The call's rows in chunks; larger ones where scores are few beside the keys, or not kept: ``tiled``.

    Gates take twice as many operations for a chunk, which then has to be larger to be worth them.
    """
    few = tiled or call.grid[0] == 1
    larger = 4 if few else 1 if call.gate is None else 2
    budget = CHUNK_SCORES * min(torch.get_num_threads(), 4) * larger
    # Small query blocks gather as many keys as large ones: their chunks are bounded by the keys.
    return schedule.chunks(budget, max(call.block_q, 64), call.block_k)
