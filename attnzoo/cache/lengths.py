"""How many tokens each item of a batch has: one number that all share, or numbers in a tensor.

Letters: B batch, n slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, slots=True)
class Lengths:
    """A number of tokens of each item: what a call brings, what a cache held before it, rows in front.

    A number that all items share is an int, so that sizes are known and nothing synchronises. No tensor is made of it:
    a program would be compiled for each. Arithmetic is that of ``value``; here is what the two kinds do differently.

    Attributes:
        value: An int that all items share, or int64 ``[B]``.
    """

    value: int | Tensor

    @property
    def shared(self) -> int | None:
        """The number, where all items share it."""
        return None if isinstance(self.value, Tensor) else self.value

    @property
    def each(self) -> Tensor | None:
        """The numbers ``[B]``, where each item has its own."""
        return self.value if isinstance(self.value, Tensor) else None

    @property
    def differ(self) -> bool:
        """Whether each item has a number of its own."""
        return isinstance(self.value, Tensor)

    def column(self, dims: int = 2) -> int | Tensor:
        """The numbers beside something ``[B, ...]`` of so many dimensions, ``[B, 1, ...]``; or the shared one."""
        column = self.value
        if isinstance(column, Tensor):
            for _ in range(dims - 1):
                column = column.unsqueeze(-1)
        return column

    def holds(self, slot: Tensor) -> Tensor:
        """Which slots ``[n]`` hold tokens, bool ``[B, n]``; ``[n]`` where all items share the number."""
        return slot < self.column()

    def most(self, bound: int) -> int:
        """The shared number, or a bound of all, which the caller knows; reads no tensor."""
        return bound if isinstance(self.value, Tensor) else self.value

    def maximum(self, other: Self) -> Self:
        """The larger number of each item."""
        a, b = self.value, other.value
        if isinstance(a, Tensor):
            return type(self)(a.clamp(min=b))
        if isinstance(b, Tensor):
            return type(self)(b.clamp(min=a))
        # Not max: a compiler would ask which it is.
        return type(self)(torch.sym_max(a, b) if torch.compiler.is_compiling() else max(a, b))

    def minimum(self, other: Self) -> Self:
        """The smaller number of each item."""
        a, b = self.value, other.value
        if isinstance(a, Tensor):
            return type(self)(a.clamp(max=b))
        if isinstance(b, Tensor):
            return type(self)(b.clamp(max=a))
        return type(self)(torch.sym_min(a, b) if torch.compiler.is_compiling() else min(a, b))

    def to(self, device: torch.device) -> Self:
        """The numbers on a device."""
        return type(self)(self.value.to(device)) if isinstance(self.value, Tensor) else self

    def select(self, index: Tensor) -> Self:
        """Those of the items ``index``, int ``[B']``."""
        return type(self)(self.value.index_select(0, index)) if isinstance(self.value, Tensor) else self
