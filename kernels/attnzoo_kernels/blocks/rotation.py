"""Rotation by the origins of a layout's entries.

Letters: P positions of the tables, D head width, Dr rotated width, R rows, n blocks or rows of each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo_kernels.runtime.workspace import scratch
from attnzoo_kernels.spec.call import Origins


class Rotation:
    """Rotation by ``-origin`` of the queries, as rotation by ``+origin`` of the gathered keys.

    Columns that are rotated together lie side by side here, so that a rotation is one complex product.
    """

    def __init__(self, origins: Origins, width: int, dtype: torch.dtype) -> None:
        self.table = torch.complex(origins.cos.to(dtype), origins.sin.to(dtype))  # [P, Dr / 2]
        self.table_back = self.table.conj().resolve_conj()
        self.width = 2 * origins.cos.shape[1]
        self.full = width
        # Complex views need even strides.
        self.padded = self.full + self.full % 2

    def in_pairs(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """A copy, in ``out`` if given, with its columns in pairs; an odd width gets a column of zeros."""
        paired = x.new_empty(*x.shape[:-1], self.padded) if out is None else out
        halves = x[..., : self.width].unflatten(-1, (2, -1)).transpose(-1, -2)
        paired[..., : self.width].unflatten(-1, (-1, 2)).copy_(halves)
        paired[..., self.width : self.full] = x[..., self.width :]
        paired[..., self.full :] = 0
        return paired

    def in_halves(self, x: Tensor) -> Tensor:
        """The inverse."""
        pairs = x[..., : self.width].unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        return torch.cat([pairs, x[..., self.width : self.full]], -1)

    def rotate(self, x: Tensor, origin: Tensor, *, back: bool = False) -> None:
        """Rotates blocks ``[R * n, rows, D]`` by their origins, int64 ``[R * n]``, in place."""
        table = self.table_back if back else self.table
        angle = scratch("angles", (origin.shape[0], table.shape[1]), table.dtype, table.device)
        torch.index_select(table, 0, origin, out=angle)
        rotated = torch.view_as_complex(x[..., : self.width].unflatten(-1, (-1, 2)))
        rotated.mul_(angle.unsqueeze(1))
