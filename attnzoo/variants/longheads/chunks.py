"""Choosing chunks of the past, and where the chosen ones lie: slots side by side, as origins of a layout's entries.

Letters: B batch, T query tokens, H query heads, G KV heads, D head width, M query blocks, N chunks, K slots, h heads of
a choice, n chunks listed, w tokens of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnzoo.base.shared_layouts import dense_layout, may_share
from attnzoo.base.steps import Step
from attnzoo.cache.lengths import Lengths
from attnzoo.topk import top_blocks
from attnzoo_kernels import BlockLayout, remembers
from attnzoo_kernels.runtime.plain import is_open

ROWS_AT_ONCE = 4096
"""Query blocks whose chunks are chosen together: bounds the scores held."""


@dataclass(frozen=True)
class ChunkGrid:
    """The sizes that chunks are counted by, in tokens but for ``slots``.

    Attributes:
        size: Tokens in a chunk, w.
        slots: Chunks that a query reads, K.
        first: The first token that selects.
        block_q: Tokens that share a choice.
        block_k: Tokens in a key block of the layout.
        rotated: Whether keys are rotated.
    """

    size: int
    slots: int
    first: int
    block_q: int
    block_k: int
    rotated: bool


@dataclass(frozen=True, eq=False)
class Candidates:
    """What chunks are chosen by.

    Attributes:
        keys: What stands for each chunk, ``[B, H, N, D]``; rows of chunks that are not complete have no meaning.
        queries: This call's queries behind some earlier ones, not rotated, ``[B, H, before + T, D]``.
    """

    keys: Tensor
    queries: Tensor


@dataclass(frozen=True, eq=False)
class Asking:
    """A call whose rows choose.

    Attributes:
        candidates: Chunks and queries.
        tokens: T.
        groups: G where the query heads of a KV head choose together; ``None`` where each chooses alone.
        offset: Tokens before the call, an int or int64 ``[B]``.
        published_step: Whether the call is a decoding step that goes by the published code.
    """

    candidates: Candidates
    tokens: int
    groups: int | None
    offset: int | Tensor
    published_step: bool


def choose_chunks(grid: ChunkGrid, asking: Asking, first: Tensor) -> tuple[Tensor, Tensor]:
    """Chunks ``[B|1, h, M, n]`` of query blocks whose first tokens are ``first [B|1, M]``, and their origins."""
    own = first // grid.size
    # How many pieces a length that is left open has is not asked.
    pieces: Any = [(first, own)]
    if not is_open(first.shape[1]):
        pieces = zip(*(x.split(ROWS_AT_ONCE, 1) for x in (first, own)), strict=True)
    chosen = torch.cat([_chosen(grid, asking, *piece) for piece in pieces], 2)
    own = own[:, None, :, None]
    plain = grid.first // grid.size
    # Rows before the threshold read everything, in chunks that stay where they are.
    width = max(grid.slots, plain)
    slot = torch.arange(width, device=first.device)
    everything = torch.where(slot <= own, slot, -1)
    chunks = torch.where(own >= plain, pad(chosen, (0, width - grid.slots), value=-1), everything)
    return chunks, torch.where(chunks >= 0, slot * grid.size, 0)


def _chosen(grid: ChunkGrid, asking: Asking, first: Tensor, own: Tensor) -> Tensor:
    """The chunks ``[B|1, h, M, K]`` of rows that select, ascending; the published step may use one less."""
    last = own - 1
    if asking.published_step:
        last = torch.where(first % grid.size == grid.size - 1, own, last)
    asks = first - first % grid.block_q
    best = _best(grid, asking, asks - Lengths(asking.offset).column(), last)
    # Chunk 0, the best ones, and the two nearest.
    last = last[:, None, :, None]
    own = own[:, None, :, None]
    forced = torch.cat((last, torch.where(own > last, own, -1)), -1).expand(*best.shape[:-1], 2)
    return torch.cat((torch.zeros_like(best[..., :1]), best, forced), -1)


def _best(grid: ChunkGrid, asking: Asking, token: Tensor, last: Tensor) -> Tensor:
    """The best of the chunks between 0 and ``last [B|1, M]``, ``[B, h, M, K - 3]``.

    Args:
        grid: The chunks' sizes.
        asking: What is chosen by.
        token: The tokens of this call that ask, int64 ``[B|1, M]``; negative before the call.
        last: The last complete chunk that is read in any case.
    """
    keys = asking.candidates.keys
    queries = asking.candidates.queries
    dtype = torch.promote_types(keys.dtype, torch.float32)
    row = (token + queries.shape[2] - asking.tokens).clamp(min=0, max=queries.shape[2] - 1)
    scores = torch.matmul(take(queries, row).to(dtype), keys.to(dtype).transpose(-1, -2))  # [B, H, M, N]
    if asking.groups is not None:
        scores = scores.unflatten(1, (asking.groups, -1)).sum(2)
    chunk = torch.arange(keys.shape[2], device=keys.device)
    allowed = (chunk >= 1) & (chunk < last[:, None, :, None])
    return top_blocks(scores, grid.slots - 3, allowed=allowed)


def blocks_of(grid: ChunkGrid, chunks: Tensor, origin: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Key blocks ``[.., n * blocks]`` of chunks ``[.., n]``, -1 where there is none, and their origins."""
    each = grid.size // grid.block_k
    block = chunks.unsqueeze(-1) * each + torch.arange(each, device=chunks.device)
    block = torch.where((chunks.unsqueeze(-1) >= 0) & (block * grid.block_k < slots), block, -1)
    return block.flatten(-2), origin.repeat_interleave(each, -1)


def plain_layout(grid: ChunkGrid, tokens: int, slots: int, like: Tensor) -> BlockLayout:
    """Everything, at origins that make ordinary rotation of keys rotated to their place in their chunk."""
    if not grid.rotated:
        return dense_layout(grid.block_k, tokens, slots, like)
    make = _shared_plain if may_share(like) else _plain
    return make(grid.size, grid.block_k, tokens, slots, like.device)


def _plain(size: int, block: int, tokens: int, slots: int, device: torch.device) -> BlockLayout:
    layout = BlockLayout.dense(block, block, tokens, slots, device=device)
    first = layout.col * block
    return replace(layout, origin=first - first % size)


@remembers(32)
def _shared_plain(size: int, block: int, tokens: int, slots: int, device: torch.device) -> BlockLayout:
    with torch.inference_mode(False):
        return _plain(size, block, tokens, slots, device)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index [B|1, n]`` of ``x [B, h, T, D]``."""
    if index.shape[0] == 1:
        return x.index_select(2, index[0])
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def is_step(step: Step, tokens: int) -> bool:
    """Whether published code would take this call for a decoding step."""
    return step.cache is not None and tokens == 1


def slots_of_rows(step: Step, tokens: int, device: torch.device) -> Tensor:
    """The slots of a call's rows in their sequences, int64 ``[B|1, T]``."""
    return torch.arange(tokens, device=device).unsqueeze(0) + Lengths(step.offset).column()
