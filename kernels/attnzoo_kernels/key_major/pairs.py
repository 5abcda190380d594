"""Pairs of a row and a key block that it reads, sorted by key block and laid out in tiles of rows.

Where every row has a list of its own, gathering what a row reads costs as many times the keys as there are rows. Sorted
by key block, the rows that read a block lie side by side: it is gathered once for a tile of them, and one product
serves the tile.

Letters: B batch, H query heads, G KV heads, T rows, W rows of a window, E blocks listed for a row, N key blocks,
P places of all tiles, R places of a tile, n tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo_kernels.spec.call import Call

TALLEST = 256
SHORTEST = 8
"""Places of a tile: a product of fewer rows costs as much as this one, one of more is no quicker."""
PAIRS_AT_ONCE = 1 << 18
"""Pairs of a window, which bound what is held beside the inputs."""
FULL = 64
"""Pairs that a window has for each key block at least, on average."""


@dataclass(frozen=True, eq=False)
class Window:
    """Some rows of all heads, and the tiles of what they read.

    Attributes:
        rows: The first row of each head, and the one behind the last.
        row: The row at each place, a flat index into ``[B, H, T]``, int64 ``[P]``; ``B * H * T`` where there is none.
        origin: The rotary origin at each place, int64 ``[P]``, or ``None``.
        seen: Visible slots of the place's block, int64 ``[P]``; all of a block in the first ``whole`` tiles.
        gated: Whether the place's block is not the row's own, bool ``[P]``, or ``None`` without gates.
        block: The key block of each tile, a flat index into ``[B, G, N]``, int64 ``[n]``.
        whole: Tiles whose rows see all slots of their block; the others come behind them.
        height: Places of a tile, R.
        tile_row: Where the row's entries lie, int64 ``[B * H * W, E]``; 0 where there is none.
        listed: Which entries there are, bool ``[B * H * W, E]``.
    """

    rows: tuple[int, int]
    row: Tensor
    origin: Tensor | None
    seen: Tensor
    gated: Tensor | None
    block: Tensor
    whole: int
    height: int
    tile_row: Tensor
    listed: Tensor

    def gated_in(self, places: slice) -> Tensor:
        """Whether the blocks of some places are gated, bool ``[n * R]``."""
        if self.gated is None:
            raise ValueError("gated: expected a call with gates, got one without")
        return self.gated[places]


def windows_of(call: Call) -> Iterator[Window]:
    """The windows of a call with one row in a query block, in order."""
    batch, heads, groups, tokens, _ = call.shape
    most = int(call.count.max()) if call.count.numel() else 0
    if most == 0:
        return
    blocks = batch * groups * call.grid[1]
    # Each block wants a tile full of rows.
    pairs = max(PAIRS_AT_ONCE, blocks * FULL)
    height = max(1, pairs // (batch * heads * most))
    for first in range(0, tokens, height):
        yield _window(call, (first, min(first + height, tokens)), most)


def _window(call: Call, rows: tuple[int, int], most: int) -> Window:
    batch, heads, groups, _, _ = call.shape
    device = call.q.device
    first, last = rows
    shape = (batch, heads, last - first)
    # The entries of each row: [B, H, W, E].
    start, count = (_of_heads(x[:, :, first:last], shape).unsqueeze(-1) for x in (call.start, call.count))
    within = torch.arange(most, dtype=torch.int32, device=device)
    entry = (start + within).long().clamp_(max=max(call.col.shape[0] - 1, 0))
    block = call.col[entry]
    behind = _behind(call, rows).unsqueeze(-1)  # [B|1, H|1, W, 1]
    seen = (behind - block * call.block_k).clamp_(max=call.block_k)
    listed = (within < count) & (seen > 0)
    # A group for each block that is seen whole, behind them one for each with an edge; what is not listed is last.
    blocks_k = call.grid[1]
    per_group = heads // groups
    group = (torch.arange(batch * heads, dtype=torch.int32, device=device) // per_group).view(batch, heads, 1, 1)
    flat = group * blocks_k + block
    groups_in_all = batch * groups * blocks_k
    key = torch.where(seen < call.block_k, flat + groups_in_all, flat)
    key = torch.where(listed, key, 2 * groups_in_all).reshape(-1)
    order = torch.sort(key, stable=True).indices
    in_group = torch.bincount(key, minlength=2 * groups_in_all + 1)[: 2 * groups_in_all]
    pairs = int(in_group.sum())
    height = _height(pairs, int((in_group > 0).sum()))
    # Tiles of each group, and the place of each pair.
    tiles = (in_group + (height - 1)) // height
    begin = (tiles.cumsum(0) - tiles) * height - (in_group.cumsum(0) - in_group)
    order = order[:pairs]
    tile_row = begin[key[order].long()] + torch.arange(pairs, device=device)
    places = int(tiles.sum()) * height
    of_place = torch.full((places,), -1, dtype=torch.int64, device=device)
    of_place[tile_row] = order
    return _laid_out(call, rows, _Entries(entry, block, seen, listed), of_place, (height, tiles, order, tile_row))


@dataclass(frozen=True, eq=False)
class _Entries:
    """What rows list, ``[B, H, W, E]`` each: the index in ``col``, the block, its visible slots, whether it counts."""

    index: Tensor
    block: Tensor
    seen: Tensor
    listed: Tensor


def _laid_out(
    call: Call, rows: tuple[int, int], entries: _Entries, of_place: Tensor, tiling: tuple[int, Tensor, Tensor, Tensor]
) -> Window:
    batch, heads, groups, tokens, _ = call.shape
    first, last = rows
    device = call.q.device
    height, tiles, order, tile_row = tiling
    most = entries.index.shape[3]
    filled = of_place >= 0
    pair = of_place.clamp(min=0)
    # The row of each place; places behind a group's last row have none.
    own = torch.div(pair, most, rounding_mode="floor")
    head = torch.div(own, last - first, rounding_mode="floor")
    row = torch.where(filled, own + head * (tokens - (last - first)) + first, batch * heads * tokens)
    origin = None
    if call.origins is not None:
        origin = call.origins.of_entry[entries.index.reshape(-1)[pair]].long()
    seen = torch.where(filled, entries.seen.expand_as(entries.index).reshape(-1)[pair].long(), call.block_k)
    gated = None
    if call.gate is not None:
        at = call.rule.positions(tokens, call.k.shape[2], device)[:, :, first:last].unsqueeze(-1)
        other = torch.div(at, call.block_k, rounding_mode="floor") != entries.block
        gated = other.reshape(-1)[pair]
    group = torch.repeat_interleave(torch.arange(tiles.shape[0], device=device), tiles)
    where = torch.zeros(entries.index.numel(), dtype=torch.int64, device=device)
    where[order] = tile_row
    blocks = batch * groups * call.grid[1]
    return Window(
        rows, row, origin, seen, gated, group % blocks, int(tiles[:blocks].sum()), height,
        where.view(-1, most), entries.listed.reshape(-1, most),
    )  # fmt: skip


def _of_heads(x: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """What a layout has for 1, G or H heads, for all H."""
    batch, heads, rows = shape
    if x.shape[1] not in (1, heads):
        x = x.repeat_interleave(heads // x.shape[1], 1)
    return x.expand(batch, heads, rows)


def _behind(call: Call, rows: tuple[int, int]) -> Tensor:
    """The slot behind the last that a row may see, int32 ``[B|1, H|1, W]``; 0 for absent rows."""
    slots = call.k.shape[2]
    at = call.rule.positions(call.q.shape[2], slots, call.q.device)[:, :, rows[0] : rows[1]]
    behind = at + 1 if call.rule.causal else torch.where(at < 0, 0, slots)
    return behind.clamp(min=0, max=slots).to(torch.int32)


def _height(pairs: int, groups: int) -> int:
    """Places of a tile, of which half are wasted in the last one of each block."""
    each = pairs // max(groups, 1)
    height = SHORTEST
    while height < TALLEST and 2 * height <= each:
        height *= 2
    return height
