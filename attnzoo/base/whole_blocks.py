"""One exported program for all lengths: a call whose length is left open is filled up to whole blocks, at least two.

A program that is traced asks of each size that it does not know whether it is 1, and then serves one side of the
answer. Tokens are 2 or more; blocks of tokens may be one or several. Filled up, they are several, and where some of
them are chosen more than are chosen.

Letters: B batch, T tokens, T' tokens with what fills up, C model width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo_kernels.errors import UnsupportedError

MOST_FILLED = 4096
"""Tokens of the largest block that calls are filled up to: they are computed for nothing."""


@dataclass(frozen=True, eq=False)
class Filled:
    """A sequence of T tokens with others behind them, up to a multiple of a block.

    Attributes:
        source: The token at each place, int64 ``[T']``: the last one again behind it.
        is_real: Which places are tokens, bool ``[T']``.
    """

    source: Tensor
    is_real: Tensor

    @classmethod
    def of(cls, tokens: int, block: int, device: torch.device, least: int = 2) -> Filled:
        """Of so many tokens, up to whole blocks, of which there are at least so many.

        Raises:
            UnsupportedError: If blocks are too large to be filled.
        """
        if block > MOST_FILLED:
            raise UnsupportedError(
                f"export: expected blocks of at most {MOST_FILLED} tokens where the length is left open, got {block}; "
                "export at a fixed length"
            )
        place = torch.arange((tokens // block + least) * block, device=device)
        return cls(place.clamp(max=tokens - 1), place < tokens)

    def take(self, x: Tensor) -> Tensor:
        """``[B, T, C]`` to ``[B, T', C]``."""
        return x.index_select(1, self.source)

    def take_positions(self, positions: Tensor | None) -> Tensor | None:
        """``[T]`` or ``[B, T]``, as far."""
        return None if positions is None else positions.index_select(-1, self.source)

    def take_padding(self, padding: Tensor | None, batch: int) -> Tensor:
        """``[B, T]`` to ``[B, T']``, true at what fills up too."""
        if padding is None:
            return (~self.is_real).expand(batch, -1)
        return padding.index_select(1, self.source) | ~self.is_real
