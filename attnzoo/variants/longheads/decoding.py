"""A decoding step of LongHeads: choose chunks, gather them, rotate the query to each, attend; no layout is made.

Letters: B batch, H query heads, G KV heads, h heads that choose (H, or G together), g query heads of such a one, D head
width, K chunks read, w tokens of a chunk, L tokens read, n slots of a buffer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.base.decoding.compiled import HiddenRow, hidden_from_compilers
from attnzoo.selection.decoding import clear_best, gathered_tokens, rotated, rotations_in_slots, tokens_of
from attnzoo.topk import top_blocks
from attnzoo.variants.longheads.chunks import ChunkGrid
from attnzoo.variants.longheads.config import LongHeadsConfig

MOST_CHUNKS = 32
"""Chunks that are read one by one, where they lie."""
LEAST_READ = 1024
"""Tokens that a row reads, from which gathering them costs more than to read up to twice as many where they lie."""


def rotated_to_slots(config: LongHeadsConfig, q: Tensor, k: Tensor, within: int, count: int) -> tuple[Tensor, Tensor]:
    """A row's queries rotated to each of ``count`` chunks ``[B, H, K, D]``, its keys to their place in their own.

    Args:
        config: The layer's options.
        q: ``[B, H, 1, D]``.
        k: ``[B, G, 1, D]``.
        within: The row's place in its chunk.
        count: Chunks that it reads.
    """
    rotary = config.rotary
    if rotary is None:
        return q.expand(-1, -1, count, -1), k
    slots = max(config.slots, min(config.first // config.chunk_size, MOST_CHUNKS))
    head_dim = config.head_width
    table = rotations_in_slots(rotary, head_dim, config.chunk_size, slots, q.dtype, q.device).at(within)
    width = rotary.width(head_dim)
    # Of the own chunk, the query has the rotation that the key has.
    return (
        rotated(q, table.at(slice(slots - count, None)), width),
        rotated(k, table.at(slice(slots - 1, None)), width),
    )


def chosen_chunks(grid: ChunkGrid, query: Tensor, keys: Tensor, own: int, groups: int | None) -> Tensor:
    """The chunks that a row reads, ascending: chunk 0, the best, the one before its own, its own.

    Args:
        grid: The chunks' sizes.
        query: What chooses, not rotated, ``[B, H, 1, D]``.
        keys: What stands for complete chunks, ``[B, H, N, D]``.
        own: The row's own chunk.
        groups: KV heads whose query heads choose together, or ``None``.

    Returns:
        int64 ``[B, h, K]``.
    """
    scores = torch.matmul(query, keys[:, :, 1 : own - 1].transpose(-1, -2)).squeeze(2)  # [B, H, own - 2]
    if groups is not None:
        scores = scores.unflatten(1, (groups, -1)).sum(2)
    count = grid.slots - 3
    best = clear_best(scores, count)
    if best is None:
        best = top_blocks(scores, count)
    chunks = best.new_empty(*best.shape[:2], grid.slots)
    chunks[..., 0] = 0
    torch.add(best, 1, out=chunks[..., 1:-2])
    chunks[..., -2] = own - 1
    chunks[..., -1] = own
    return chunks


def chunks_read(grid: ChunkGrid, position: int) -> int:
    """How many chunks the row at a position reads."""
    return position // grid.size + 1 if position < grid.first else grid.slots


@hidden_from_compilers("longheads")
def _attend_compiled(row: HiddenRow) -> Tensor:
    """A row of queries that are not rotated; behind the buffers, the keys of chunks, and queries up to the row's."""
    q, k, v, keys, queries = row.tensors
    config = row.config
    grid = config.grid
    (scale,) = row.numbers
    position = row.held - 1
    in_slots, _ = rotated_to_slots(config, q, q[:, :1], position % grid.size, chunks_read(grid, position))
    if position < grid.first:
        return attend_all(in_slots, (k, v), grid.size, row.held, scale)
    asks = queries.narrow(2, queries.shape[2] - 1 - position % config.block_q, 1)
    own = position // grid.size
    chunks = chosen_chunks(grid, asks, keys, own, k.shape[1] if config.group_select else None)
    return attend_to_chunks(grid, in_slots, (k, v), chunks, row.held, scale)


def attend_to_chunks(
    grid: ChunkGrid, q: Tensor, buffers: tuple[Tensor, Tensor], chunks: Tensor, held: int, scale: float
) -> Tensor:
    """As :func:`attend_chosen`, or as :func:`attend_most` where that is quicker."""
    own = (held - 1) // grid.size
    reads_most = own < min(2 * grid.slots, MOST_CHUNKS) and grid.slots * grid.size >= LEAST_READ
    attend = attend_most if reads_most and scale > 0 else attend_chosen
    return attend(q, buffers, chunks, grid.size, held, scale)


def attend_chosen(
    q: Tensor, buffers: tuple[Tensor, Tensor], chunks: Tensor, size: int, held: int, scale: float
) -> Tensor:
    """Attention of a row to chosen chunks.

    Args:
        q: Queries rotated to each chunk, ``[B, H, K, D]``.
        buffers: Keys, rotated to their place in their chunk, and values, ``[B, G, n, D]``.
        chunks: Ascending, the row's own last, ``[B, h, K]``.
        size: Tokens of a chunk, w.
        held: Tokens that may be read.
        scale: The factor on scores.

    Returns:
        ``[B, H, 1, Dv]``.
    """
    batch, heads, count, width = q.shape
    each = heads // chunks.shape[1]
    # Of the own chunk the last token stands for those behind it, whose scores are dropped.
    token = tokens_of(chunks, size).clamp_(max=held - 1)
    read = (count - 1) * size + (held - 1) % size + 1
    k, v = (gathered_tokens(x, token) for x in buffers)  # [B * h, K * w, D]
    rows = q.reshape(-1, each, count, width).transpose(1, 2).reshape(-1, each, width)  # [B * h * K, g, D]
    scores = torch.bmm(rows, k.view(-1, size, width).transpose(1, 2)).view(-1, count, each, size)
    scores = scores.transpose(1, 2).reshape(-1, each, count * size)[..., :read]
    weights = torch.softmax(scores * scale, -1)
    return torch.bmm(weights, v[:, :read]).view(batch, heads, 1, -1)


def attend_most(
    q: Tensor, buffers: tuple[Tensor, Tensor], chunks: Tensor, size: int, held: int, scale: float
) -> Tensor:
    """As :func:`attend_chosen`, where few chunks are left out: all are read where they lie, those hidden.

    What nobody reads may be no number; if the result is none, what is read is gathered after all.
    """
    count = (held - 1) // size + 1
    each = q.shape[1] // chunks.shape[1]
    slot = chunks.new_full((*chunks.shape[:2], count), -1)
    slot = slot.scatter(2, chunks, torch.arange(chunks.shape[2], device=q.device).expand_as(chunks))
    slot = slot.repeat_interleave(each, 1).unsqueeze(-1)  # [B, H, N, 1]
    in_chunks = torch.take_along_dim(q, slot.clamp(min=0), 2)
    hidden = torch.zeros_like(slot, dtype=q.dtype).masked_fill_(slot < 0, -torch.inf)
    out = attend_all(in_chunks, buffers, size, held, scale, hidden)
    return out if bool(out.sum().isfinite()) else attend_chosen(q, buffers, chunks, size, held, scale)


def attend_all(
    q: Tensor, buffers: tuple[Tensor, Tensor], size: int, held: int, scale: float, bias: Tensor | None = None
) -> Tensor:
    """Attention of a row to everything, where it lies.

    Args:
        q: Queries rotated to each chunk there is, ``[B, H, N, D]``.
        buffers: As in :func:`attend_chosen`.
        size: As there.
        held: As there.
        scale: As there.
        bias: Added to the scores of chunks, ``[B, H, N, 1]``.

    Returns:
        ``[B, H, 1, Dv]``.
    """
    batch, heads, count, width = q.shape
    groups = buffers[0].shape[1]
    k, v = (x.reshape(batch * groups, -1, x.shape[3])[:, :held] for x in buffers)
    rows = q.reshape(batch * groups, heads // groups, count, width)
    scores = [torch.bmm(rows[:, :, i], part.transpose(1, 2)) for i, part in enumerate(k.split(size, 1))]
    if bias is not None:
        of_chunks = bias.view(batch * groups, heads // groups, count, 1).unbind(2)
        scores = [part.add_(one) for part, one in zip(scores, of_chunks, strict=True)]
    weights = torch.softmax(torch.cat(scores, -1) * scale, -1)
    return torch.bmm(weights, v).view(batch, heads, 1, -1)
