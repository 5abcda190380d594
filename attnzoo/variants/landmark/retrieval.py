"""Choosing blocks by their landmarks, and where the chosen ones are placed for the rotation.

A query that has N complete blocks before it takes the best k. Positions are stingy: the last k blocks stay where they
are, and all others are packed into the k + 1 block places that end at block N, so that the distances that a model
meets do not grow with the sequence. Everything here is counted in blocks, as a shift from a block's own place, and
nothing is differentiated.

Letters: B batch, H query heads, G KV heads, T query tokens, N blocks, k blocks chosen, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.base.padding import for_heads
from attnzoo.base.rope import RotaryConfig, apply_rotary, rotary_frequencies
from attnzoo.topk import top_blocks
from attnzoo_kernels import no_autocast
from attnzoo_kernels.runtime.plain import is_open

_SCORES_AT_ONCE = 1 << 24


@dataclass(frozen=True, eq=False)
class BlockRotations:
    """Rotations by whole blocks.

    Attributes:
        cos: ``[P, Dr / 2]``, of the angle of a whole block times 0, 1, ...
        sin: As ``cos``.
    """

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, rotary: RotaryConfig, head_dim: int, stride: int, blocks: int, like: Tensor) -> BlockRotations:
        """Tables for shifts of up to ``blocks`` blocks that take ``stride`` positions each; pure rotations."""
        frequencies = rotary_frequencies(rotary, head_dim, device=like.device)
        angles = torch.arange(blocks + 1, device=like.device).to(torch.float64).unsqueeze(-1) * (frequencies * stride)
        acc = torch.float64 if like.dtype == torch.float64 else torch.float32
        return cls(angles.cos().to(acc), angles.sin().to(acc))

    def back(self, x: Tensor, blocks: Tensor) -> Tensor:
        """Rotates ``x [B, h, T, D]`` by minus as many blocks as ``blocks [B|1, T]`` or ``[T]`` says."""
        return apply_rotary(x, self.cos[blocks], -self.sin[blocks])


@dataclass(frozen=True, eq=False)
class Retrieved:
    """What each query takes.

    Attributes:
        blocks: The chosen blocks, ascending, int64 ``[B, H, T, k]``; -1 where there are fewer, at the end.
        shift: How many blocks each is moved towards the query, int64, as ``blocks``; 0 where there is none.
    """

    blocks: Tensor
    shift: Tensor


def retrieve(
    q: Tensor,
    keys: Tensor,
    complete: Tensor,
    *,
    top_k: int,
    scale: float,
    rotations: BlockRotations | None,
    shared: bool = False,
) -> Retrieved:
    """Chooses each query's blocks by the scores of their landmarks; of equal scores, the earlier block.

    In a model's first layer all landmarks are one embedding, so that all older ones score the same but for rounding,
    which differs between one call and another: scores that rounding could make equal count as equal.

    A landmark of the last k blocks is scored where it stands, any older one in the first of the packed places,
    whichever place its block will get.

    Args:
        q: Rotated queries ``[B, H, T, D]``.
        keys: Rotated landmark keys ``[B, G, N, D]``, those that an item has not reached included.
        complete: Blocks that a query may choose from, the first ones, int64 ``[B|1, T]``; below 1 there are none.
        top_k: Blocks to choose.
        scale: The factor on scores.
        rotations: Rotations by blocks; ``None`` where nothing is rotated.
        shared: Whether all tokens of a head take the same blocks: those whose share of a softmax over the blocks is
            the largest at any token. Later tokens then decide for earlier ones.
    """
    # Where the length is left open there are more blocks than that.
    count = top_k if is_open(keys.shape[2]) else min(top_k, keys.shape[2])
    shared = shared and q.shape[2] > 0

    def best(q: Tensor, complete: Tensor) -> Tensor:
        allowed = _allowed(complete, keys.shape[2])
        scores = (_scores(q, keys, complete, top_k, rotations) * scale).masked_fill(~allowed, -torch.inf)
        if shared:
            # A row without blocks has no softmax.
            share = torch.softmax(scores, -1).nan_to_num(0.0)
            return top_blocks(share.amax(2, keepdim=True), count, allowed=allowed.any(2, keepdim=True))
        last = scores.topk(count).values[..., -1:] if count else scores[..., :1]
        slack = rounding(q, keys, complete, scale)
        return top_blocks(
            torch.zeros_like(scores), count, allowed=(scores - last).abs() <= slack, forced=scores > last + slack
        )

    with torch.no_grad(), no_autocast(q.device.type):
        q = q.detach()
        keys = keys.detach()
        rows = max(1, _SCORES_AT_ONCE // max(1, q.shape[0] * q.shape[1] * keys.shape[2]))
        # A loop over parts of a length that is being traced would fix that length.
        if shared or torch.compiler.is_compiling() or q.shape[2] <= rows:
            taken = best(q, complete)
        else:
            taken = torch.cat([best(*part) for part in zip(q.split(rows, 2), complete.split(rows, 1), strict=True)], 2)
        if shared:
            taken = taken.expand(-1, -1, q.shape[2], -1).masked_fill((complete < 1)[:, None, :, None], -1)
        return Retrieved(taken, _shift(taken, complete, top_k))


def rounding(q: Tensor, keys: Tensor, complete: Tensor, scale: float) -> Tensor:
    """What rounding in projections and rotations may change a score by, ``[B, H, T, 1]``."""
    # Errors of a head's values are independent, so that they grow with its norm alone. In half precision the keys are
    # rounded where they are stored, the same for every call.
    acc = torch.promote_types(q.dtype, torch.float32)
    unit = 16 * abs(scale) * torch.finfo(acc).eps / q.shape[3] ** 0.5
    longest = keys.to(acc).norm(dim=-1).cummax(-1).values  # [B, G, N]
    at = (complete - 1).clamp(min=0).unsqueeze(1).expand(*longest.shape[:2], -1)
    longest = for_heads(longest.gather(-1, at), q.shape[1])  # [B, H, T]
    slack: Tensor = q.to(acc).norm(dim=-1) * longest * unit
    return slack.unsqueeze(-1)


def _allowed(complete: Tensor, blocks: int) -> Tensor:
    """Blocks that may be chosen, bool ``[B|1, 1, T, N]``."""
    return torch.arange(blocks, device=complete.device) < complete[:, None, :, None]


def _scores(q: Tensor, keys: Tensor, complete: Tensor, top_k: int, rotations: BlockRotations | None) -> Tensor:
    """Products of queries and landmarks where they are scored, ``[B, H, T, N]``."""
    block = torch.arange(keys.shape[2], device=q.device)
    older = (complete - top_k).clamp(min=0)  # [B|1, T]: blocks before this one are packed
    scores = _products(q, keys)
    if rotations is not None:
        packed = _products(rotations.back(q, (older - 1).clamp(min=0)), rotations.back(keys, block))
        scores = torch.where(block < older[:, None, :, None], packed, scores)
    return scores


def _products(q: Tensor, keys: Tensor) -> Tensor:
    """``q . k`` of each query head with its group's keys, ``[B, H, T, N]``, in fp32 at least."""
    acc = torch.promote_types(q.dtype, torch.float32)
    if is_open(keys.shape[2]):
        # Torch cannot prove that rows and heads, flattened, unflatten again.
        return torch.matmul(q.to(acc), for_heads(keys.to(acc), q.shape[1]).transpose(-1, -2))
    grouped = q.to(acc).unflatten(1, (keys.shape[1], -1))  # [B, G, h, T, D]
    found: Tensor = torch.matmul(grouped.flatten(2, 3), keys.to(acc).transpose(-1, -2))  # [B, G, h * T, N]
    return found.reshape(*q.shape[:3], keys.shape[2])


def _shift(taken: Tensor, complete: Tensor, top_k: int) -> Tensor:
    """How far each chosen block is moved, from its rank among the chosen ones."""
    older = (complete - top_k).clamp(min=0)[:, None, :, None]
    rank = torch.arange(taken.shape[3], device=taken.device)
    shift: Tensor = torch.where(taken >= 0, older - 1 + rank + (taken >= older).long() - taken, 0)
    return shift
