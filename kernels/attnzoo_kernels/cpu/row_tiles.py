"""Row tiles, which read one run of slots each, and the key ranges in which a tile reads what its rows see.

Letters: B batch, H heads, T rows, S slots, M query blocks; b and h are 1 where batch or heads agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnzoo_kernels.layouts.entries import list_entries
from attnzoo_kernels.layouts.memo import remembered
from attnzoo_kernels.spec.call import Call
from attnzoo_kernels.spec.token_rule import TokenRule

CELL = 64
"""Rows that stay together: torch's kernel takes as many at a time."""
HEIGHTS = (3, 4, 8)
"""Cells in a row tile; of these, what costs least."""
RANGE_COST = 1 << 15
"""Scores that take about as long as one more key range of a tile."""
LEAST_INSIDE = 128
"""Slots that all rows of a tile must see for a key range of their own, without a mask."""


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
        lo: The first slot that a row sees, int64 ``[b, h, T]``.
        hi: The slot behind the last; as ``lo`` or less where there is none.
    """

    head_groups: tuple[HeadGroup, ...]
    lo: Tensor
    hi: Tensor

    @cached_property
    def dead(self) -> Tensor | None:
        """Rows that see nothing, bool ``[b, h, T]``; ``None`` where every row sees something."""
        dead = self.lo >= self.hi
        return dead if bool(dead.any()) else None

    @cached_property
    def hides(self) -> bool:
        """Whether a row computes something that it does not see."""
        return self.dead is not None or any(keys.late or keys.early or keys.causal for keys in self._key_ranges())

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
        return float((self.hi - self.lo).clamp(min=0).double().mean())

    def computed(self, batch: int, heads: int) -> float:
        """Slots that are computed for a row, on average over batch and heads."""
        total = 0
        for group in self.head_groups:
            items = len(range(batch)[group.items])
            groups = len(range(heads // group.ratio)[group.groups])
            total += sum(tile.area for tile in group.tiles) * items * groups
        return total / (batch * heads * self.lo.shape[2])


@dataclass(frozen=True)
class _Runs:
    """The run of blocks that each query block lists: int64 ``[b, h, M]`` each; ``last`` is behind it."""

    first: Tensor
    last: Tensor


def lists_runs(call: Call) -> bool:
    """Whether the blocks of every list follow one another."""
    return _runs(call) is not None


def _runs(call: Call) -> _Runs | None:
    return remembered(replace(call, rule=TokenRule(causal=False), origins=None), _find_runs)


def _find_runs(call: Call) -> _Runs | None:
    entries, _ = list_entries(call)
    rows = entries.shape[0] * entries.shape[1] * entries.shape[2]
    blocks = call.grid[1]
    first = entries.col.new_full((rows,), blocks).scatter_reduce_(0, entries.row, entries.col, "amin")
    last = entries.col.new_zeros(rows).scatter_reduce_(0, entries.row, entries.col + 1, "amax")
    count = torch.bincount(entries.row, minlength=rows)
    if not bool(((last - first).clamp(min=0) == count).all()):
        return None
    return _Runs(first.view(entries.shape), last.view(entries.shape))


def row_tiles_of(call: Call, together: int) -> RowTiles | None:
    """The row tiles of a call, or ``None`` where some row's slots do not follow one another.

    Args:
        call: The call; without a sink beside a window.
        together: KV heads that are computed together where heads differ.
    """
    return remembered(call, _finder(together))


@cache
def _finder(together: int) -> Callable[[Call], RowTiles | None]:
    return partial(_find_row_tiles, together=together)


def _find_row_tiles(call: Call, together: int) -> RowTiles | None:
    runs = _runs(call)
    rule = call.rule
    _, heads, groups, seq_q, seq_k = call.shape
    if runs is None:
        return None
    pos = rule.positions(seq_q, seq_k, call.col.device)
    window = rule.window.long().view(1, -1, 1) if isinstance(rule.window, Tensor) else rule.window
    lo, hi = rule.span(pos, window, seq_k)
    whole = bool((runs.last - runs.first == call.grid[1]).all())
    if whole and rule.q_pos is None and rule.window is None and (not rule.causal or seq_q <= seq_k):
        inside = seq_k - seq_q if rule.causal else seq_k
        ends = (KeyRange(0, inside), KeyRange(inside, seq_k, causal=True))
        tiles = (RowTile(slice(0, seq_q), tuple(keys for keys in ends if keys.first < keys.last)),)
        return RowTiles(_for_all_heads(tiles, heads // groups), lo, hi)
    if not whole:
        each = heads // runs.first.shape[1] if runs.first.shape[1] > 1 else 1
        first, last = (_by_row(x, call, each) * call.block_k for x in (runs.first, runs.last))
        lo = torch.maximum(lo, first)
        hi = torch.minimum(hi, last)
    lo, hi = torch.broadcast_tensors(lo, hi)
    return RowTiles(tuple(_head_groups(call, lo, hi, together)), lo, hi)


def _by_row(x: Tensor, call: Call, each: int) -> Tensor:
    """Values of query blocks ``[b, h, M]`` for each row and, ``each`` times, for each head."""
    return x.repeat_interleave(each, 1).repeat_interleave(call.block_q, 2)[:, :, : call.q.shape[2]]


def _for_all_heads(tiles: tuple[RowTile, ...], ratio: int) -> tuple[HeadGroup, ...]:
    return tuple(HeadGroup(tiles, slice(None), slice(None), head, ratio) for head in range(ratio))


def _head_groups(call: Call, lo: Tensor, hi: Tensor, together: int) -> Iterator[HeadGroup]:
    _, heads, groups, _, _ = call.shape
    ratio = heads // groups
    far = 1 << 60
    batch, own_heads, rows = lo.shape
    live = lo < hi
    sides = torch.stack([
        torch.where(live, lo, far), torch.where(live, -lo, far), torch.where(live, hi, far), torch.where(live, -hi, far)
    ], -1)  # fmt: skip
    cells = pad(sides, (0, 0, 0, -rows % CELL), value=far).unflatten(2, (-1, CELL)).amin(3)  # [b, h, cells, 4]
    if batch == own_heads == 1:
        yield from _for_all_heads(_cheapest(cells[0, 0].tolist(), rows, call.k.shape[0] * groups), ratio)
        return
    for item in range(batch):
        items = slice(item, item + 1) if batch > 1 else slice(None)
        width = groups if own_heads == 1 else together
        for head, group in product(range(ratio), range(0, groups, width)):
            here = slice(group, min(group + width, groups))
            own = cells[item] if own_heads == 1 else cells[item, head::ratio][here]
            yield HeadGroup(_cheapest(own.amin(0).tolist(), rows, width), items, here, head, ratio)


def _cheapest(cells: list[list[int]], rows: int, heads: int) -> tuple[RowTile, ...]:
    """The tiles of least cost for so many heads, of rows whose cells have these least lo, -lo, hi and -hi."""

    def cost(tiles: tuple[RowTile, ...]) -> int:
        return sum(heads * tile.area + RANGE_COST * len(tile.ranges) for tile in tiles)

    return min((tuple(_of_height(cells, height, rows)) for height in HEIGHTS), key=cost)


def _of_height(cells: list[list[int]], height: int, rows: int) -> Iterator[RowTile]:
    """Row tiles of so many cells; what is left over joins the last, if it is less than half a tile."""
    begin = 0
    while begin < len(cells):
        end = begin + height
        if len(cells) - end < (height + 1) // 2:
            end = len(cells)
        first, highest, least, last = (min(side) for side in zip(*cells[begin:end], strict=True))
        ranges = _key_ranges(first, -highest, least, -last) if first < 1 << 60 else ()
        yield RowTile(slice(begin * CELL, min(end * CELL, rows)), ranges)
        begin = end


def _key_ranges(first: int, highest: int, least: int, last: int) -> tuple[KeyRange, ...]:
    """The ranges of rows that begin at slots from ``first`` to ``highest`` and end before slots ``least`` to ``last``.

    A range that not all rows see whole holds a slot of each of them.
    """
    begin = highest + 1 if first < highest else first
    end = least - 1 if least < last else last
    if end - begin < LEAST_INSIDE:
        return (KeyRange(first, last, late=first < highest, early=least < last),)
    sides = (KeyRange(first, begin, late=True), KeyRange(begin, end), KeyRange(end, last, early=True))
    return tuple(keys for keys in sides if keys.first < keys.last)
