"""Rotary tables that are kept: all layers of a model, and all calls, read one table for each configuration.

What is read from a table is, bit for bit, what :func:`attnzoo.base.rope.rotary_tables` computes for the same positions.

Letters: B batch, T tokens, h heads, D head width, Dr rotated width, n positions of a table.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnzoo.base.rope import RotaryConfig, rotary_tables
from attnzoo_kernels import memory_limit, remembers
from attnzoo_kernels.runtime.plain import is_plain, is_readable

LEAST_ROWS = 64
"""Positions of the shortest table."""
ROWS = 64
"""Neighbouring positions whose rotations are made at once for decoding steps."""
LARGEST_SHARE = 8
"""A table takes no more than this part of the bytes that may be remembered; what lies beyond is computed anew."""


def shared_rotary_tables(
    config: RotaryConfig, head_dim: int, positions: Tensor | range, like: Tensor, *, length: int | None = None
) -> tuple[Tensor, Tensor]:
    """As :func:`attnzoo.base.rope.rotary_tables`, read from tables that are kept; not to be written to.

    Args:
        config: The rotary configuration.
        head_dim: Width of a head.
        positions: Integers ``[..., T]``; or a range where they follow one another and are known beforehand, which
            costs least. Positions in a tensor are looked up on CPUs alone, where reading them does not synchronise.
        like: What will be rotated; the tables are in its precision, fp32 at least, and lie on its device.
        length: Replaces ``scaling.length`` for the forms that depend on one.

    Returns:
        ``(cos, sin)``, each ``[..., T, Dr / 2]``.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    if isinstance(positions, range):
        if is_plain(like) and _may_keep(config, head_dim, positions.stop, dtype):
            cos, sin = _kept_tables(config, head_dim, rows_for(positions.stop), dtype, like.device, length)
            return cos[positions.start : positions.stop], sin[positions.start : positions.stop]
        positions = torch.arange(positions.start, positions.stop, device=like.device)
    elif positions.numel() and is_readable(positions) and is_readable(like):
        least, most = (int(x) for x in positions.aminmax())
        if least >= 0 and _may_keep(config, head_dim, most + 1, dtype):
            cos, sin = _kept_tables(config, head_dim, rows_for(most + 1), dtype, like.device, length)
            return cos[positions], sin[positions]
    return rotary_tables(config, head_dim, positions, dtype, length=length)


class RowRotation(NamedTuple):
    """The rotation of one position: for each value its factor, and that of its partner in the plane, ``[Dr]`` each."""

    own: Tensor
    partner: Tensor


def row_rotation(config: RotaryConfig, head_dim: int, position: int, like: Tensor) -> RowRotation:
    """The rotation of a decoding step, made once for all layers of a model and for some steps; see :func:`rotate_row`.

    Args:
        config: The rotary configuration.
        head_dim: Width of a head.
        position: The row's position.
        like: What will be rotated.
    """
    block, row = divmod(position, ROWS)
    own, partner = _kept_rows(config, head_dim, block, like.dtype, like.device)
    return RowRotation(own[row], partner[row])


def rotate_row(x: Tensor, rotation: RowRotation, interleaved: bool = False) -> Tensor:
    """As :func:`attnzoo.base.rope.apply_rotary`, to the bit, for rows that all have one position.

    Args:
        x: ``[..., D]``.
        rotation: Of that position.
        interleaved: Whether neighbours form a plane.
    """
    width = rotation.own.shape[0]
    turned = x if width == x.shape[-1] else x[..., :width]
    partner = turned.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) if interleaved else turned.roll(width // 2, -1)
    # Not addcmul, which may round once where apply_rotary rounds twice.
    turned = torch.mul(turned, rotation.own).add_(partner * rotation.partner).to(x.dtype)
    return turned if width == x.shape[-1] else torch.cat((turned, x[..., width:]), -1)


def rows_for(positions: int) -> int:
    """A power of two serves all lengths up to it: a decoding step makes no table."""
    return max(LEAST_ROWS, 1 << max(positions - 1, 0).bit_length())


def _may_keep(config: RotaryConfig, head_dim: int, positions: int, dtype: torch.dtype) -> bool:
    size = rows_for(positions) * config.width(head_dim) * dtype.itemsize
    return size * LARGEST_SHARE <= memory_limit()


@remembers(32)
def _kept_tables(
    config: RotaryConfig, head_dim: int, rows: int, dtype: torch.dtype, device: torch.device, length: int | None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions 0 to ``rows - 1``, ``[n, Dr / 2]`` each."""
    with torch.inference_mode(False), torch.no_grad():
        return rotary_tables(config, head_dim, torch.arange(rows, device=device), dtype, length=length)


@remembers(16)
def _kept_rows(
    config: RotaryConfig, head_dim: int, block: int, dtype: torch.dtype, device: torch.device
) -> RowRotation:
    """The rotations of the positions of a block, ``[ROWS, Dr]`` each: most decoding steps make nothing."""
    with torch.inference_mode(False), torch.no_grad():
        like = torch.empty(0, dtype=dtype, device=device)
        positions = range(block * ROWS, (block + 1) * ROWS)
        cos, sin = shared_rotary_tables(config, head_dim, positions, like)
        if config.interleaved:
            return RowRotation(cos.repeat_interleave(2, -1), torch.stack((-sin, sin), -1).flatten(-2))
        return RowRotation(torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))
