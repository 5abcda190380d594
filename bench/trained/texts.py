"""The text that ships as bytes: what models are trained on, and what is held out.

Letters: n windows, L tokens in a window, B batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo import data

VOCABULARY = 256
"""Tokens are bytes."""

STRETCH = 1024
"""Tokens of the longest windows that are scored."""

HELD_OUT = 7 * STRETCH
"""Tokens at the end of each text that no training sees."""


@dataclass(frozen=True, eq=False)
class Texts:
    """Tokens of both texts.

    Attributes:
        training: int64 ``[any]``, for training and for calibration.
        held_out: int64 ``[any]``, for figures: whole stretches.
    """

    training: Tensor
    held_out: Tensor

    def windows(self, length: int, most: int | None = None) -> Tensor:
        """Every second stretch of the text that is held out, in windows, int64 ``[n, L]``; the same for each length.

        Args:
            length: L, a divisor of ``STRETCH``.
            most: n, at most.
        """
        return self.held_out.view(-1, STRETCH)[::2].reshape(-1, length)[:most]

    def calibration(self, length: int, count: int) -> list[Tensor]:
        """Windows of the training text at even distances, int64 ``[1, L]`` each."""
        starts = torch.linspace(0, len(self.training) - length, count, device="cpu").long().tolist()
        return [self.training[start : start + length].unsqueeze(0) for start in starts]

    def batches(self, length: int, batch: int, seed: int) -> Iterator[Tensor]:
        """Windows of the training text at random places, int64 ``[B, L]``, without an end."""
        generator = torch.Generator("cpu").manual_seed(seed)
        steps = torch.arange(length, device="cpu")
        while True:
            starts = torch.randint(len(self.training) - length + 1, (batch, 1), generator=generator, device="cpu")
            yield self.training[starts + steps]


def texts() -> Texts:
    """Both texts that ship."""
    whole = [torch.tensor(list(data.text(name).encode()), dtype=torch.int64, device="cpu") for name in data.TEXTS]
    return Texts(torch.cat([x[:-HELD_OUT] for x in whole]), torch.cat([x[-HELD_OUT:] for x in whole]))
