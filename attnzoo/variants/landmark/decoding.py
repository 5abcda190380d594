"""A decoding step of landmark attention: choose blocks, gather them, rotate the query to each, weigh them by gates.

Letters: B batch, H query heads, G KV heads, D head width, N complete blocks, k blocks chosen, w tokens of a block, n
slots of a buffer, L tokens of the own block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.base.decoding.compiled import HiddenRow, hidden_from_compilers
from attnzoo.selection.decoding import Rotations, clear_best, gathered_tokens, rotated, rotations_back, tokens_of
from attnzoo.variants.landmark.config import LandmarkConfig
from attnzoo.variants.landmark.retrieval import BlockRotations, retrieve, rounding
from attnzoo_kernels import Slots, attend_slots

PRECISE = (torch.float32, torch.float64)
"""What a decoding step is computed in without the operation."""


@dataclass(frozen=True, eq=False)
class BlockRow:
    """A row, and what it may read.

    Attributes:
        q: Rotated query ``[B, H, 1, D]``.
        k: Rotated keys of everything there is room for ``[B, G, n, D]``.
        v: Values, likewise.
        held: Tokens that may be read, the row's own the last.
        size: Tokens of a block, w.
        scale: The factor on scores.
        mix: The share of the landmark's score in a block's logit.
        rotations: Rotations back by blocks, or ``None`` where nothing is rotated.
        width: Rotated values of a head.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    held: int
    size: int
    scale: float
    mix: float
    rotations: Rotations | None
    width: int

    @property
    def own(self) -> int:
        """The row's own block, which is how many complete ones there are before it."""
        return (self.held - 1) // self.size

    @property
    def landmarks(self) -> Tensor:
        """The keys of complete blocks' landmarks ``[B, G, N, D]``; a view."""
        return self.k[:, :, self.size - 1 :: self.size][:, :, : self.own]


@dataclass(frozen=True, kw_only=True)
class Reads:
    """How a row reads.

    Attributes:
        scale: The factor on scores.
        mix: The share of the landmark's score in a block's logit.
        soft: Whether all blocks are read, however many there are.
    """

    scale: float
    mix: float
    soft: bool


@hidden_from_compilers("landmark")
def _attend_compiled(row: HiddenRow) -> Tensor:
    q, k, v = row.tensors
    scale, mix, soft = row.numbers
    return attend_row(row.config, (q, k, v), row.held, Reads(scale=scale, mix=mix, soft=bool(soft)))


def attend_row(config: LandmarkConfig, heads: tuple[Tensor, Tensor, Tensor], held: int, reads: Reads) -> Tensor:
    """Attention of a row to its block and to those that it chooses, ``[B, H, 1, Dv]``.

    Args:
        config: The layer's options.
        heads: Rotated q ``[B, H, 1, D]``, and k and v ``[B, G, n, D]`` of everything there is room for.
        held: Tokens that may be read.
        reads: How they are read.
    """
    q, k, v = heads
    size = config.block_size
    if held <= size:
        # No block is complete before the row's own, whose landmark counts for nothing.
        return attend_slots(q, k, v, Slots(((0, min(held, size - 1)),)), scale=reads.scale)
    own = (held - 1) // size
    # Among few blocks top-k takes all, and moves none.
    moves = not reads.soft and own > config.top_k
    rotations = None
    width = 0
    if config.rotary is not None and moves:
        width = config.rotary.width(config.head_width)
        # A power of two serves all lengths up to it.
        count = 1 << own.bit_length()
        rotations = rotations_back(config.rotary, config.head_width, config.stride, count, q.dtype, q.device)
    row = BlockRow(q, k, v, held, size, reads.scale, reads.mix, rotations, width)
    if not moves:
        out = attend_all_blocks(row)
        if bool(out.sum().isfinite()):
            return out
        # A landmark's value, which nobody reads, may be no number.
        blocks = torch.arange(own, device=q.device).expand(*q.shape[:2], -1)
        return attend_blocks(row, blocks, None)
    clear = clear_blocks(row, config.top_k)
    chosen = _careful_blocks(config, row) if clear is None else clear
    # The last ones stay where they are, all others are packed before them.
    older = own - config.top_k
    packed = torch.arange(older - 1, own - 1, device=q.device)
    return attend_blocks(row, chosen, packed + (chosen >= older) - chosen)


def _careful_blocks(config: LandmarkConfig, row: BlockRow) -> Tensor:
    """The choice where rounding could change it."""
    rotations = None
    if config.rotary is not None:
        rotations = BlockRotations.of(config.rotary, config.head_width, config.stride, row.own, row.q)
    complete = torch.full((1, 1), row.own, device=row.q.device)
    found = retrieve(row.q, row.landmarks, complete, top_k=config.top_k, scale=row.scale, rotations=rotations)
    return found.blocks.squeeze(2)


def clear_blocks(row: BlockRow, top_k: int) -> Tensor | None:
    """The blocks that a row chooses, ascending, int64 ``[B, H, k]``; ``None`` where rounding could change the choice.

    As :func:`attnzoo.variants.landmark.retrieval.retrieve`; there are more than ``top_k`` blocks.
    """
    keys = row.landmarks
    older = row.own - top_k
    q = row.q
    if row.rotations is None:
        scores = _products(q, keys)
    else:
        # Older landmarks are all scored in the first packed place.
        packed = rotated(keys[:, :, :older], row.rotations.at(slice(0, older)), row.width)
        moved = rotated(q, row.rotations.at(older - 1), row.width)
        scores = torch.cat((_products(moved, packed), _products(q, keys[:, :, older:])), -1)
    complete = torch.full((1, 1), row.own, device=q.device)
    slack = rounding(q, keys, complete, row.scale).view(*q.shape[:2])
    return clear_best(scores * row.scale, top_k, slack)


def _products(q: Tensor, keys: Tensor) -> Tensor:
    """``[B, H, 1, D]`` and ``[B, G, N, D]`` to ``[B, H, N]``."""
    rows = q.reshape(q.shape[0], keys.shape[1], -1, q.shape[3])
    return torch.matmul(rows, keys.transpose(-1, -2)).flatten(1, 2)


def attend_all_blocks(row: BlockRow) -> Tensor:
    """Attention to all complete blocks through their landmarks and to the own one, read where they lie.

    The values of landmarks are multiplied by weights of 0.

    Returns:
        ``[B, H, 1, Dv]``.
    """
    batch, heads, _, width = row.q.shape
    rows = row.q.reshape(batch, row.k.shape[1], -1, width)
    scores = torch.matmul(rows, row.k[:, :, : row.held].transpose(-1, -2)).mul_(row.scale)  # [B, G, H / G, held]
    first = row.own * row.size
    far = scores[..., :first].unflatten(-1, (row.own, row.size))
    gate = far[..., -1:].clone()
    far[..., -1] = -torch.inf
    # The own block's landmark, where the row is it.
    scores[..., first + row.size - 1 :] = -torch.inf
    # A block's logit: its landmark's score, mixed with the log-sum-exp of its ordinary tokens.
    if row.mix:
        within = torch.logsumexp(far, -1, keepdim=True)
        far += (gate - within) * row.mix
    weights = torch.softmax(scores, -1)
    return torch.matmul(weights, row.v[:, :, : row.held]).view(batch, heads, 1, -1)


def attend_blocks(row: BlockRow, blocks: Tensor, shift: Tensor | None) -> Tensor:
    """Attention to chosen blocks through their landmarks, and to the own one.

    Args:
        row: The row.
        blocks: Chosen blocks ``[B, H, k]``, one or more, complete.
        shift: How many blocks each is moved towards the row, as ``blocks``; ``None`` where none is.

    Returns:
        ``[B, H, 1, Dv]``.
    """
    batch, heads, count = blocks.shape
    size = row.size
    width = row.q.shape[3]
    q = row.q.expand(-1, -1, count, -1)
    if shift is not None and row.rotations is not None:
        q = rotated(q, row.rotations.at(shift), row.width)
    k = gathered_tokens(row.k, tokens_of(blocks, size)).view(-1, size, width)  # [B * H * k, w, D]
    scores = torch.bmm(k, q.reshape(-1, width, 1)).view(batch, heads, count, size) * row.scale
    # A block's logit: its landmark's score, mixed with the log-sum-exp of its ordinary tokens.
    ordinary = scores[..., : size - 1]
    gate = scores[..., size - 1 :]
    within = torch.logsumexp(ordinary, -1, keepdim=True)
    logit = gate if row.mix == 1 else row.mix * gate + (1 - row.mix) * within
    # The own block's ordinary tokens up to the row.
    first = row.own * size
    near = slice(first, min(row.held, first + size - 1))
    groups = row.k.shape[1]
    own_q = row.q.reshape(batch * groups, -1, width)
    own_k, own_v = (x.reshape(batch * groups, -1, x.shape[3])[:, near] for x in (row.k, row.v))
    own = torch.bmm(own_q, own_k.transpose(1, 2)).view(batch, heads, -1) * row.scale
    weights = torch.softmax(torch.cat(((ordinary + (logit - within)).flatten(2), own), -1), -1)
    far, here = weights.split((count * (size - 1), own.shape[2]), -1)
    # No landmark has a weight: its value is not read.
    v = gathered_tokens(row.v, tokens_of(blocks, size, size - 1))
    out = torch.bmm(far.reshape(batch * heads, 1, -1), v).view(batch, heads, 1, -1)
    return out + torch.bmm(here.reshape(batch * groups, -1, here.shape[2]), own_v).view_as(out)
