"""A call's tensors as tiles are read from them, and the scores of some tiles.

Letters: B batch, H query heads, G KV heads, T rows, N key blocks, w slots of a block, D head width, Dv value width,
n tiles, R places of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnzoo_kernels.blocks.rotation import Rotation
from attnzoo_kernels.key_major.pairs import Window
from attnzoo_kernels.runtime.products import product
from attnzoo_kernels.runtime.store import remembers
from attnzoo_kernels.runtime.workspace import scratch
from attnzoo_kernels.spec.call import Call

SCORES_AT_ONCE = 1 << 18
"""Scores of the tiles that are computed together: they stay in the cache."""


class PairInputs:
    """Rows of queries, and blocks of keys and values, in the accumulator's dtype.

    Attributes:
        call: The call.
        rotation: Rotation by origins, or ``None``.
        q: ``[B * H * T + 1, D]``, in pairs where there is a rotation; the last row is zeros, for places without a row.
        k: ``[B * G * N, w, D]``, likewise; zeros behind the last slot.
        v: ``[B * G * N, w, Dv]``.
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        dtype = call.acc_dtype
        self.rotation = None if call.origins is None else Rotation(call.origins, call.q.shape[3], dtype)
        width = call.q.shape[3] if self.rotation is None else self.rotation.padded
        self.q = _rows(call.q, dtype, width, self.rotation)
        k = call.k.to(dtype) if self.rotation is None else self.rotation.in_pairs(call.k.to(dtype))
        self.k = _blocks(k, call.block_k)
        self.v = _blocks(call.v.to(dtype), call.block_k)


def rows_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``[B, H, T, D]`` as rows ``[B * H * T + 1, D]``, the last of zeros."""
    return _rows(x, dtype, x.shape[3], None)


def _rows(x: Tensor, dtype: torch.dtype, width: int, rotation: Rotation | None) -> Tensor:
    count = x.shape[0] * x.shape[1] * x.shape[2]
    rows = torch.empty(count + 1, width, dtype=dtype, device=x.device)
    rows[count] = 0
    inner = rows[:count].view(*x.shape[:3], width)
    if rotation is None:
        inner.copy_(x)
    else:
        rotation.in_pairs(x, inner)
    return rows


def _blocks(x: Tensor, block: int) -> Tensor:
    """``[B, G, S, D]`` as blocks ``[B * G * N, w, D]``."""
    beyond = -x.shape[2] % block
    x = pad(x, (0, 0, 0, beyond)) if beyond else x
    return x.reshape(-1, block, x.shape[3])


@dataclass(frozen=True, eq=False)
class KeyTiles:
    """Some tiles of a window.

    Attributes:
        first: The first of them.
        last: The one behind the last.
        places: Their places.
        row: The row at each place, ``[n * R]``.
        block: The key block of each tile, ``[n]``.
    """

    first: int
    last: int
    places: slice
    row: Tensor
    block: Tensor


def tiles_of(window: Window, width: int) -> list[KeyTiles]:
    """The tiles of a window, so many together as their scores stay in the cache; blocks have ``width`` slots."""
    count = window.block.shape[0]
    at_once = max(1, SCORES_AT_ONCE // (window.height * width))
    found = []
    for first in range(0, count, at_once):
        last = min(first + at_once, count)
        places = slice(first * window.height, last * window.height)
        found.append(KeyTiles(first, last, places, window.row[places], window.block[first:last]))
    return found


def gathered(name: str, x: Tensor, index: Tensor) -> Tensor:
    """Rows or blocks of a tensor by their index, in scratch memory."""
    out = scratch(name, (index.shape[0], *x.shape[1:]), x.dtype, x.device)
    return torch.index_select(x, 0, index, out=out)


def rotated_rows(inputs: PairInputs, window: Window, tiles: KeyTiles) -> Tensor:
    """The queries of tiles, each rotated by the origin of its entry, ``[n * R, D]``."""
    q = gathered("row queries", inputs.q, tiles.row)
    if inputs.rotation is not None and window.origin is not None:
        inputs.rotation.rotate(q.unsqueeze(1), window.origin[tiles.places], back=True)
    return q


def edges_of(call: Call, window: Window, tiles: KeyTiles) -> tuple[int, Tensor | None]:
    """The first of some tiles with slots that not all rows see, and what is added to scores from there on.

    Returns:
        Its index among them, and 0 where a row sees a slot and -inf elsewhere, ``[m, R, w]`` in scratch memory; the
        number of tiles and ``None`` where rows see everything.
    """
    count = tiles.last - tiles.first
    begin = min(max(window.whole - tiles.first, 0), count)
    if begin == count:
        return count, None
    seen = window.seen[tiles.places][begin * window.height :]
    hidden = _hidden(call.block_k, call.acc_dtype, call.q.device)
    return begin, gathered("tile edges", hidden, seen).view(count - begin, window.height, -1)


@remembers(16)
def _hidden(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Row n is 0 at its first n slots, -inf at the others, ``[w + 1, w]``."""
    with torch.inference_mode(False):
        slot = torch.arange(width, device=device)
        seen = slot < torch.arange(width + 1, device=device).unsqueeze(1)
        return torch.where(seen, 0.0, -torch.inf).to(dtype)


def scores_of(call: Call, window: Window, tiles: KeyTiles, q: Tensor, k: Tensor) -> Tensor:
    """Scaled scores ``[n, R, w]``, -inf where a row does not see a slot; in scratch memory."""
    scores = product("tile scores", q.view(k.shape[0], window.height, -1), k.transpose(1, 2), scale=call.scale)
    begin, edges = edges_of(call, window, tiles)
    if edges is not None:
        scores[begin:].add_(edges)
    return scores
