"""Row tiles, and the key ranges in which a tile reads what its rows see.

Letters: B batch, H heads, T rows, S slots; b and h are 1 where batch or heads agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import chain, product

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnzoo_kernels.layouts.memo import remembered
from attnzoo_kernels.layouts.row_spans import RowSpans, lists_all, row_spans
from attnzoo_kernels.spec.call import Call

CELL = 64
"""Rows that stay together: torch's kernel takes as many at a time."""
HEIGHTS = (3, 4, 8)
"""Cells in a row tile; of these, what costs least."""
RANGE_COST = 1 << 15
"""Scores that take about as long as one more key range of a tile."""
LEAST_INSIDE = 128
"""Slots that all rows of a tile must see for a key range of their own, beside ranges with a mask."""
MOST_SEGMENTS = 8
"""Segments of straight edges that rows are cut into."""


@dataclass(frozen=True)
class KeyRange:
    """Slots that a tile reads together.

    Attributes:
        first: The first slot.
        last: The slot behind the last.
        late: Whether some row begins to see behind the first.
        early: Whether some row does not see up to the last.
        causal: Whether row i sees the first i + 1 of them.
    """

    first: int
    last: int
    late: bool = False
    early: bool = False
    causal: bool = False

    @property
    def hides(self) -> bool:
        """Whether some row does not see all of them."""
        return self.late or self.early or self.causal

    @property
    def slots(self) -> slice:
        """The slots."""
        return slice(self.first, self.last)


@dataclass(frozen=True)
class RowTile:
    """Neighbouring rows, and the ranges that they read; no range where none of them sees anything."""

    rows: slice
    ranges: tuple[KeyRange, ...]

    @property
    def area(self) -> int:
        """(row, slot) pairs that are computed."""
        rows = self.rows.stop - self.rows.start
        return sum(rows * (rows + 1) // 2 if p.causal else rows * (p.last - p.first) for p in self.ranges)

    @property
    def squares(self) -> int:
        """The same where half of a square costs as much as all of it: the kernel takes 512 slots at a time."""
        return sum((self.rows.stop - self.rows.start) * (p.last - p.first) for p in self.ranges)


@dataclass(frozen=True)
class HeadGroup:
    """Heads that are computed together, and their tiles.

    Attributes:
        tiles: From the first row to the last.
        items: Batch items.
        groups: KV heads.
        head: Which query head of each of them.
        ratio: Query heads of a KV head.
    """

    tiles: tuple[RowTile, ...]
    items: slice
    groups: slice
    head: int
    ratio: int

    def of_rows(self, x: Tensor) -> Tensor:
        """Their share ``[i, g, T, ..]`` of ``[B, H, T, ..]``; either of the first two may be 1 in both. A view."""
        if x.shape[1] > 1:
            x = x.unflatten(1, (-1, self.ratio))[:, self.groups, self.head]
        return x[self.items] if x.shape[0] > 1 else x

    def of_slots(self, x: Tensor) -> Tensor:
        """Their share ``[i, g, S, D]`` of ``[B, G, S, D]``; a view."""
        return x[self.items, self.groups]


@dataclass(frozen=True)
class RowTiles:
    """The row tiles of a call.

    Attributes:
        head_groups: Head by head.
        spans: What each row sees.
    """

    head_groups: tuple[HeadGroup, ...]
    spans: RowSpans

    @cached_property
    def dead(self) -> Tensor | None:
        """Rows that see nothing, bool ``[b, h, T]``; ``None`` where every row sees something."""
        dead = self.spans.lo >= self.spans.hi
        return dead if bool(dead.any()) else None

    @cached_property
    def hides(self) -> bool:
        """Whether a row computes something that it does not see."""
        return self.dead is not None or any(keys.hides for keys in self._key_ranges())

    def _key_ranges(self) -> Iterator[KeyRange]:
        return (keys for group in self.head_groups for tile in group.tiles for keys in tile.ranges)

    @cached_property
    def lone_range(self) -> KeyRange | None:
        """What all rows of all heads read, where they do so together and without a mask."""
        ranges = list(self._key_ranges())
        masked = self.dead is not None or any(keys.late or keys.early for keys in ranges)
        return ranges[0] if len(ranges) == 1 and not masked else None

    @cached_property
    def visible(self) -> float:
        """Slots that a row sees, on average."""
        spans = self.spans
        of_sink = 0.0 if spans.apart is None else spans.sink * float(spans.apart.double().mean())
        return float((spans.hi - spans.lo).clamp(min=0).double().mean()) + of_sink

    def computed(self, batch: int, heads: int) -> float:
        """Slots that are computed for a row, on average over batch and heads."""
        total = 0
        for group in self.head_groups:
            items = len(range(batch)[group.items])
            groups = len(range(heads // group.ratio)[group.groups])
            total += sum(tile.area for tile in group.tiles) * items * groups
        return total / (batch * heads * self.spans.lo.shape[2])


def row_tiles_of(call: Call, together: int) -> RowTiles | None:
    """The row tiles of a call, or ``None`` where rows see something else than one run, or one and the sink.

    Args:
        call: The call.
        together: KV heads that are computed together where heads differ.
    """
    return remembered(call, _finder(together))


@cache
def _finder(together: int) -> Callable[[Call], RowTiles | None]:
    return partial(_find_row_tiles, together=together)


def _find_row_tiles(call: Call, together: int) -> RowTiles | None:
    spans = row_spans(call)
    if spans is None:
        return None
    rule = call.rule
    batch, heads, groups, seq_q, seq_k = call.shape
    ratio = heads // groups
    if rule.q_pos is None and rule.window is None and (not rule.causal or seq_q <= seq_k) and lists_all(call):
        inside = seq_k - seq_q if rule.causal else seq_k
        ends = (KeyRange(0, inside), KeyRange(inside, seq_k, causal=True))
        tiles = (RowTile(slice(0, seq_q), tuple(keys for keys in ends if keys.first < keys.last)),)
        return RowTiles(_for_all_heads(tiles, ratio), spans)
    if spans.lo.shape[:2] == (1, 1):
        segments = _segments(spans)
        if segments is None:
            return None
        cut = [_cheapest(_cells(spans, one)[0, 0].tolist(), one, batch * groups) for one in segments]
        return RowTiles(_for_all_heads(tuple(chain.from_iterable(cut)), ratio), spans)
    return None if spans.apart is not None else RowTiles(tuple(_head_groups(call, spans, together)), spans)


def _for_all_heads(tiles: tuple[RowTile, ...], ratio: int) -> tuple[HeadGroup, ...]:
    return tuple(HeadGroup(tiles, slice(None), slice(None), head, ratio) for head in range(ratio))


def _head_groups(call: Call, spans: RowSpans, together: int) -> Iterator[HeadGroup]:
    _, heads, groups, _, _ = call.shape
    ratio = heads // groups
    batch, own_heads, rows = spans.lo.shape
    whole = _Segment(0, rows, straight=False)
    cells = _cells(spans, whole)
    for item in range(batch):
        items = slice(item, item + 1) if batch > 1 else slice(None)
        width = groups if own_heads == 1 else together
        for head, group in product(range(ratio), range(0, groups, width)):
            here = slice(group, min(group + width, groups))
            own = cells[item] if own_heads == 1 else cells[item, head::ratio][here]
            yield HeadGroup(_cheapest(own.amin(0).tolist(), whole, width), items, here, head, ratio)


@dataclass(frozen=True)
class _Segment:
    """Neighbouring rows.

    Attributes:
        begin: The first of them.
        end: The row behind the last.
        straight: Whether their runs all begin at one slot or each a slot later than the one before, and end likewise.
        sink: Slots that all of them see before their runs.
    """

    begin: int
    end: int
    straight: bool
    sink: int = 0


def _segments(spans: RowSpans) -> list[_Segment] | None:
    """All rows, cut where what they see changes its course; ``None`` where that is too often beside a sink."""
    lo = spans.lo[0, 0]
    hi = spans.hi[0, 0]
    steps = torch.stack([lo.diff(), hi.diff()])
    jumps = ((steps < 0) | (steps > 1)).any(0) | ((lo < hi).diff())
    bends = pad((steps[:, 1:] != steps[:, :-1]).any(0), (1, 0)) if steps.shape[1] else jumps
    found = (jumps | bends).nonzero().view(-1)[: 2 * MOST_SEGMENTS] + 1
    borders = [0]
    for row, jumped in zip(found.tolist(), jumps[found - 1].tolist(), strict=True):
        # The second row of a segment is what gives it a course.
        if jumped or row > borders[-1] + 1:
            borders.append(row)
    if len(borders) > MOST_SEGMENTS:
        return [_Segment(0, lo.shape[0], straight=False)] if spans.apart is None else None
    apart = [False] * len(borders) if spans.apart is None else spans.apart[0, 0, borders].tolist()
    ends = (*borders[1:], lo.shape[0])
    return [
        _Segment(begin, end, straight=True, sink=spans.sink if beside else 0)
        for begin, end, beside in zip(borders, ends, apart, strict=True)
    ]


def _cells(spans: RowSpans, segment: _Segment) -> Tensor:
    """The least lo, -lo, hi and -hi of each cell of a segment, int64 ``[b, h, cells, 4]``."""
    far = 1 << 60
    lo, hi = (x[..., segment.begin : segment.end] for x in (spans.lo, spans.hi))
    live = lo < hi
    sides = torch.stack([
        torch.where(live, lo, far), torch.where(live, -lo, far), torch.where(live, hi, far), torch.where(live, -hi, far)
    ], -1)  # fmt: skip
    least: Tensor = pad(sides, (0, 0, 0, -lo.shape[2] % CELL), value=far).unflatten(2, (-1, CELL)).amin(3)
    return least


def _cheapest(cells: list[list[int]], segment: _Segment, heads: int) -> tuple[RowTile, ...]:
    """The tiles of least cost for so many heads, of rows whose cells have these least lo, -lo, hi and -hi."""

    def cost(tiles: tuple[RowTile, ...]) -> int:
        return sum(heads * tile.squares + RANGE_COST * len(tile.ranges) for tile in tiles)

    return min((tuple(_of_height(cells, height, segment)) for height in HEIGHTS), key=cost)


def _of_height(cells: list[list[int]], height: int, segment: _Segment) -> Iterator[RowTile]:
    """Row tiles of so many cells; what is left over joins the last, if it is less than half a tile."""
    begin = 0
    of_sink = (KeyRange(0, segment.sink),) if segment.sink else ()
    while begin < len(cells):
        end = begin + height
        if len(cells) - end < (height + 1) // 2:
            end = len(cells)
        first, highest, least, last = (min(side) for side in zip(*cells[begin:end], strict=True))
        ranges: tuple[KeyRange, ...] = ()
        if first < 1 << 60:
            ranges = (*_key_ranges(first, -highest, (least, -last), straight=segment.straight), *of_sink)
        rows = slice(segment.begin + begin * CELL, min(segment.begin + end * CELL, segment.end))
        yield RowTile(rows, ranges)
        begin = end


def _key_ranges(first: int, highest: int, ends: tuple[int, int], *, straight: bool = False) -> tuple[KeyRange, ...]:
    """The ranges of rows that begin at slots from ``first`` to ``highest`` and end before slots from least to last.

    A range that not all rows see whole holds a slot of each of them. Where the rows are those of a straight segment and
    do not end together, the last range is a triangle.
    """
    least, last = ends
    begin = highest + 1 if first < highest else first
    end = least - 1 if least < last else last
    late = first < highest
    early = least < last
    inside = end - begin
    if inside < (0 if straight else LEAST_INSIDE):
        return (KeyRange(first, last, late=late, early=early),)
    ahead: tuple[KeyRange, ...] = (KeyRange(first, begin, late=True), KeyRange(begin, end))
    if inside < LEAST_INSIDE:
        ahead = (KeyRange(first, end, late=late),)
    behind = KeyRange(end, last, causal=straight, early=not straight)
    return tuple(keys for keys in (*ahead, behind) if keys.first < keys.last)
