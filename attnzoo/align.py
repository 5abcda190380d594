"""Moving rows: an item's real tokens to the left, and query blocks onto the sequence's own block grid.

Letters: B batch, T tokens of a call, H heads, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True, eq=False)
class Alignment:
    """Where the tokens of a padded batch go, so that each item's real tokens come first, in their order.

    Attributes:
        order: For each row after moving, the token that comes there, int64 ``[B, T]``; padding comes last.
        place: For each token, its row after moving, int64 ``[B, T]``; meaningless at padding.
        lengths: Real tokens, int64 ``[B]``.
    """

    order: Tensor
    place: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, padding: Tensor) -> Alignment:
        """The alignment for a mask ``[B, T]`` that is true at padding."""
        real = (~padding).long()
        order = torch.argsort(padding.to(torch.uint8), dim=1, stable=True)
        return cls(order, (real.cumsum(1) - 1).clamp(min=0), real.sum(1))


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index [B, T']`` of ``x [B, T, C]``."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def leading_rows(x: Tensor, count: int) -> Tensor:
    """The first rows of ``[B, h, T, D]``."""
    if not torch.compiler.is_compiling():
        return x[:, :, :count]
    # Of a slice a compiler asks whether it is all there is.
    return x.index_select(2, torch.arange(count, device=x.device))


def add_front(q: Tensor, front: int | Tensor, rows: int) -> Tensor:
    """Puts ``front`` rows before each item's first; the result ``[B, H, rows, D]`` has absent rows in front and behind.

    Args:
        q: ``[B, H, T, D]``.
        front: Rows to put in front, an int or int64 ``[B]``.
        rows: Rows of the result.
    """
    if not isinstance(front, Tensor):
        return pad(q, (0, 0, front, rows - front - q.shape[2])) if rows != q.shape[2] else q
    index = (torch.arange(rows, device=q.device) - front.unsqueeze(1)).clamp(0, q.shape[2] - 1)
    return q.gather(2, index[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))


def drop_front(out: Tensor, front: int | Tensor, tokens: int) -> Tensor:
    """Takes the ``tokens`` rows behind ``front`` again: the inverse of :func:`add_front`."""
    if not isinstance(front, Tensor):
        return out[:, :, front : front + tokens] if tokens != out.shape[2] else out
    index = torch.arange(tokens, device=out.device) + front.unsqueeze(1)
    return out.gather(2, index[:, None, :, None].expand(-1, out.shape[1], -1, out.shape[3]))


def front_positions(q_pos: Tensor | None, front: int | Tensor, rows: int) -> Tensor | None:
    """Row positions ``[B|1, h, T]`` of the rows that :func:`add_front` makes; -1 at absent ones."""
    if q_pos is None:
        return None
    tokens = q_pos.shape[2]
    if not isinstance(front, Tensor):
        return pad(q_pos, (front, rows - front - tokens), value=-1) if rows != tokens else q_pos
    index = torch.arange(rows, device=q_pos.device) - front.unsqueeze(1)
    q_pos = q_pos.expand(front.shape[0], -1, -1)
    moved = q_pos.gather(2, index.clamp(0, tokens - 1).unsqueeze(1).expand(-1, q_pos.shape[1], -1))
    present = (index >= 0) & (index < tokens)
    return torch.where(present.unsqueeze(1), moved, -1)
