"""Lists of key blocks made from masks, indices and patterns, with bulk tensor arithmetic.

Nothing here reads a value back to the host unless its name says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo_kernels.errors import ShapeError
from attnzoo_kernels.runtime.plain import advice, is_open, is_readable
from attnzoo_kernels.runtime.tracing import number_of

Sizes = tuple[int, int, int, int]
"""``block_q, block_k, seq_q, seq_k``."""


@dataclass(frozen=True, eq=False)
class LayoutLists:
    """The tensors of a layout: start, count int32 ``[B|1, h, M]``; col, origin int32 ``[cap]``."""

    start: Tensor
    count: Tensor
    col: Tensor
    origin: Tensor | None = None


def check_at_least(name: str, value: Any, least: int) -> None:
    """Raises unless a value is an int, no bool, and at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__} {value!r}{advice(value)}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def check_sizes(block_q: int, block_k: int, seq_q: int, seq_k: int) -> Sizes:
    """The sizes, as numbers while torch traces; raises unless blocks are ints from 1 and lengths ints from 0."""
    block_q, block_k, seq_q, seq_k = (number_of(size) for size in (block_q, block_k, seq_q, seq_k))
    for name, value, least in (
        ("block_q", block_q, 1),
        ("block_k", block_k, 1),
        ("seq_q", seq_q, 0),
        ("seq_k", seq_k, 0),
    ):
        check_at_least(name, value, least)
    return block_q, block_k, seq_q, seq_k


def check_range(name: str, x: Tensor, least: int, most: int) -> None:
    """Raises unless all values lie within bounds; reads them."""
    if x.numel() and (int(x.min()) < least or int(x.max()) > most):
        raise ShapeError(f"{name}: expected values from {least} to {most}, got {int(x.min())} to {int(x.max())}")


def check_grid(name: str, x: Tensor, grid: tuple[int, int | None], dtype: torch.dtype | None) -> None:
    """Raises unless a tensor is ``[B, h, M, N]`` of the dtype (``None``: any integer)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")
    fits = (
        x.dtype == dtype
        if dtype is not None
        else not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)
    )
    if not fits:
        raise TypeError(f"{name}: expected {dtype or 'integers'}, got {x.dtype}")
    rows, cols = grid
    if x.dim() != 4 or x.shape[2] != rows or (cols is not None and x.shape[3] != cols):
        raise ShapeError(f"{name}: expected [B, h, {rows}, {'K' if cols is None else cols}], got {list(x.shape)}")


def check_lists(lists: LayoutLists, rows: int) -> None:
    """Raises unless dtypes, shapes and devices of a layout's tensors fit."""
    for name in ("start", "count", "col", "origin"):
        x = getattr(lists, name)
        if x is None and name == "origin":
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")
        if x.dtype != torch.int32:
            raise TypeError(f"{name}: expected int32, got {x.dtype}")
        if x.device != lists.col.device:
            raise ShapeError(f"{name}: expected it on {lists.col.device} as col is, got {x.device}")
    if lists.start.dim() != 3 or lists.start.shape[2] != rows:
        raise ShapeError(f"start: expected [B, h, {rows}], got {list(lists.start.shape)}")
    if lists.count.shape != lists.start.shape:
        raise ShapeError(f"count: expected {list(lists.start.shape)} as start has it, got {list(lists.count.shape)}")
    if lists.col.dim() != 1 or (lists.origin is not None and lists.origin.shape != lists.col.shape):
        raise ShapeError("col, origin: expected one dimension and the same length")


def check_values(lists: LayoutLists, blocks_k: int) -> None:
    """Raises unless lists lie inside ``col``, blocks exist, and none is listed twice in a row; reads values."""
    start = lists.start.long()
    count = lists.count.long()
    if bool(((count < 0) | (start < 0) | (start + count > lists.col.shape[0])).any()):
        raise ShapeError(f"start, count: expected lists inside col, which has {lists.col.shape[0]} entries")
    row, index = listed_indices(distinct_lists(lists)[1])
    col = lists.col.long()[index]
    if bool(((col < 0) | (col >= blocks_k)).any()):
        raise ShapeError(f"col: expected key blocks from 0 to {blocks_k - 1}, got {int(col.min())} to {int(col.max())}")
    key = torch.sort(row * blocks_k + col).values
    if bool((key[1:] == key[:-1]).any()):
        raise ShapeError("col: expected no key block twice in a row's list, got a duplicate")


def check_unique(index: Tensor) -> None:
    """Raises where a row of ``[B, h, M, K]`` names a key block twice, -1 left aside; reads values."""
    ordered = index.sort(-1).values
    after = ordered[..., 1:]
    if bool(((after == ordered[..., :-1]) & (after >= 0)).any()):
        raise ShapeError("col: expected no key block twice in a row's list, got a duplicate")


def listed_indices(lists: LayoutLists) -> tuple[Tensor, Tensor]:
    """Flat row and index in ``col`` of every entry, int64 ``[nnz]`` each; reads their number."""
    start = lists.start.reshape(-1).long()
    count = lists.count.reshape(-1).long()
    row = torch.repeat_interleave(torch.arange(count.shape[0], device=count.device), count)
    within = torch.arange(row.shape[0], device=count.device) - (count.cumsum(0) - count)[row]
    return row, start[row] + within


def distinct_lists(lists: LayoutLists) -> tuple[Tensor, LayoutLists]:
    """Which list each row reads, int64 ``[B, h, M]``, and the lists, each once (start, count ``[U]``): rows share some.

    Reads how many there are.
    """
    room = lists.col.shape[0] + 1
    key, of_row = (lists.start.long() * room + lists.count.long()).unique(return_inverse=True)
    start, count = (x.to(torch.int32) for x in (key // room, key % room))
    return of_row, LayoutLists(start, count, lists.col, lists.origin)


def compact_lists(lists: LayoutLists) -> LayoutLists:
    """The same lists without unused room; reads their number."""
    _, index = listed_indices(lists)
    count = lists.count.reshape(-1)
    start = (count.cumsum(0) - count).to(torch.int32).view(lists.start.shape)
    origin = None if lists.origin is None else lists.origin[index]
    return LayoutLists(start, lists.count.clone(), lists.col[index], origin)


def lists_on(lists: LayoutLists, device: torch.device | str) -> LayoutLists:
    """The same lists on another device."""
    origin = None if lists.origin is None else lists.origin.to(device)
    return LayoutLists(lists.start.to(device), lists.count.to(device), lists.col.to(device), origin)


def _rows_of(shape: tuple[int, ...], width: int, device: torch.device) -> Tensor:
    """Starts of rows that have ``width`` entries each, int32 of a shape."""
    batch, heads, rows = shape
    return (torch.arange(batch * heads * rows, device=device) * width).to(torch.int32).view(batch, heads, rows)


def lists_of_mask(keep: Tensor) -> LayoutLists:
    """Lists of the true entries of ``[B, h, M, N]``."""
    count = keep.sum(-1, dtype=torch.int32)
    if is_readable(keep):
        flat = count.view(-1)
        start = (flat.cumsum(0, dtype=torch.int32) - flat).view(count.shape)
        return LayoutLists(start, count, keep.nonzero()[:, 3].to(torch.int32))
    # Without reading back how many there are, every row keeps room for all.
    col = torch.argsort((~keep).to(torch.uint8), dim=-1, stable=True).to(torch.int32).reshape(-1)
    return LayoutLists(_rows_of(keep.shape[:3], keep.shape[3], keep.device), count, col)


def lists_of_indices(index: Tensor, origin: Tensor | None) -> LayoutLists:
    """Lists of the entries of ``[B, h, M, K]`` that are not -1."""
    order = torch.argsort((index < 0).to(torch.uint8), dim=-1, stable=True)
    col = index.gather(-1, order).to(torch.int32).reshape(-1)
    count = (index >= 0).sum(-1, dtype=torch.int32)
    moved = None if origin is None else origin.gather(-1, order).to(torch.int32).reshape(-1)
    return LayoutLists(_rows_of(index.shape[:3], index.shape[3], index.device), count, col, moved)


def dense_lists(blocks_q: int, blocks_k: int, device: torch.device | str | None) -> LayoutLists:
    """One list of all blocks, which every row shares."""
    start = torch.zeros(1, 1, blocks_q, dtype=torch.int32, device=device)
    col = torch.arange(blocks_k, dtype=torch.int32, device=device)
    return LayoutLists(start, torch.full_like(start, blocks_k), col)


def first_slots(q_start: int | Tensor | None, seq_q: int, seq_k: int, device: torch.device | str | None) -> Tensor:
    """The slot of row 0 for each item, int64 ``[B|1]``."""
    if q_start is None:
        return torch.full((1,), seq_k - seq_q, dtype=torch.int64, device=device)
    if isinstance(q_start, Tensor):
        if q_start.dim() != 1 or q_start.is_floating_point() or q_start.dtype == torch.bool:
            raise ShapeError(f"q_start: expected integers [B], got {q_start.dtype} {list(q_start.shape)}")
        return q_start.long() if device is None else q_start.to(device).long()
    if isinstance(q_start, bool) or not isinstance(q_start, int | torch.SymInt):
        raise TypeError(f"q_start: expected an int, a Tensor or None, got {type(q_start).__name__}")
    return torch.full((1,), q_start, dtype=torch.int64, device=device)


def _row_slots(sizes: Sizes, first: Tensor) -> tuple[Tensor, Tensor]:
    """Slots of the first and last row of each query block, int64 ``[B|1, 1, M, 1]``."""
    block_q, _, seq_q, _ = sizes
    begin = torch.arange(-(-seq_q // block_q), device=first.device) * block_q
    end = (begin + block_q).clamp(max=seq_q) - 1
    first_slot = first.view(-1, 1, 1, 1)
    return first_slot + begin.view(1, 1, -1, 1), first_slot + end.view(1, 1, -1, 1)


def _widest(sizes: Sizes, reach: int) -> int:
    """Key blocks that the windows of a query block's rows meet at most, if they reach over so many slots in all."""
    block_q, block_k, seq_q, seq_k = sizes
    if is_open(seq_q) or is_open(seq_k):
        return (reach + block_q - 1) // block_k + 2
    return min(reach + min(block_q, max(seq_q, 1)) - 1, max(seq_k, 1) - 1) // block_k + 2


def sink_window_indices(sizes: Sizes, first: Tensor, window: int, sink: int, *, causal: bool) -> Tensor:
    """Blocks that hold a slot of the window of some row, or one below ``sink``; -1 padded."""
    _, block_k, _, seq_k = sizes
    blocks_k = -(-seq_k // block_k)
    back = window - 1
    ahead = 0 if causal else window - 1
    low, high = _row_slots(sizes, first)
    # Division before the clamp: inductor cannot index by the other order.
    low = torch.div(low - back, block_k, rounding_mode="floor").clamp(min=0)
    high = torch.div(high + ahead, block_k, rounding_mode="floor").clamp(max=blocks_k - 1)
    width = _widest(sizes, back + ahead)
    most_sinks = -(-sink // block_k)
    if not is_open(seq_k):
        width = min(width, blocks_k)
        most_sinks = min(most_sinks, blocks_k)
    near = low + torch.arange(width, device=first.device)
    near = torch.where(near <= high, near, -1)
    sinks = torch.arange(most_sinks, device=first.device).view(1, 1, 1, -1)
    # A sink block inside the window is listed there already.
    beside = (sinks < low) & (high >= 0) if causal else (sinks < low) | (sinks > high)
    sinks = torch.where(beside & (sinks < blocks_k), sinks, -1)
    shape = (*near.shape[:3], sinks.shape[3])
    return torch.cat([sinks.expand(shape), near], -1)


def strided_mask(
    sizes: Sizes, first: Tensor, pattern: tuple[int, int, int], shift: Sequence[int], dense: Sequence[bool] | None
) -> Tensor:
    """The strided pattern (local blocks, stride, first blocks) as a mask ``[B|1, h, M, N]``."""
    _, block_k, _, seq_k = sizes
    local, stride, sinks = pattern
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in shift):
        raise TypeError(f"shift: expected ints, got {list(shift)}")
    if dense is not None and not all(isinstance(n, bool) for n in dense):
        raise TypeError(f"dense_heads: expected bools, got {list(dense)}")
    if dense is not None and len(dense) != len(shift):
        raise ShapeError(f"dense_heads: expected {len(shift)} values as shift has, got {len(dense)}")
    first_own, own = (torch.div(x, block_k, rounding_mode="floor") for x in _row_slots(sizes, first))
    block = torch.arange(-(-seq_k // block_k), device=first.device)
    moved = torch.tensor(list(shift), device=first.device).view(1, -1, 1, 1)
    keep = (first_own - block < local) | ((block + moved) % stride == 0) | (block < sinks)
    if dense is not None:
        keep = keep | torch.tensor(list(dense), device=first.device).view(1, -1, 1, 1)
    return keep & (block <= own)


def same_heads(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two masks ``[B, h, M, N]`` with the heads of the one that has fewer repeated."""
    most = max(a.shape[1], b.shape[1])
    if most % a.shape[1] or most % b.shape[1] or (a.shape[0] != b.shape[0] and 1 not in (a.shape[0], b.shape[0])):
        raise ShapeError(f"layout: batch and heads do not broadcast: {list(a.shape[:2])} and {list(b.shape[:2])}")
    return a.repeat_interleave(most // a.shape[1], 1), b.repeat_interleave(most // b.shape[1], 1)
