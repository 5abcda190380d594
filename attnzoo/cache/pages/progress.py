"""How far items have come: tokens seen, and whether rows are to be chosen.

Numbers are ints where all items share them, else int64 ``[B]`` on the CPU, so that nothing is read back from a device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.cache.pages.extents import shared


@dataclass(frozen=True, eq=False)
class Progress:
    """Counts of tokens.

    Attributes:
        tokens: Seen by each item.
        since: Seen since rows were chosen last.
        longer: Whether a call of more than one token has written to an item since.
        chosen: Tokens that had been seen when rows were chosen last; -1 if they never were.
    """

    tokens: int | Tensor = 0
    since: int | Tensor = 0
    longer: bool | Tensor = False
    chosen: int | Tensor = -1

    def after(self, lengths: int | Tensor, *, longer: bool) -> Progress:
        """Behind a call of so many tokens, of one column or of more."""
        tokens = self.tokens + lengths
        wrote = self.longer | (lengths > 0) if longer else self.longer
        return Progress(_collapsed(tokens), _collapsed(self.since + lengths), wrote, self.chosen)

    def due(self, lengths: int | Tensor, every: int | None) -> bool | Tensor:
        """Which items choose rows before a call of one column."""
        due = self.longer
        if every is not None:
            due = due | (self.since >= every)
        return due & (lengths > 0)

    def choosing(self, due: bool | Tensor) -> Progress:
        """After these items have chosen."""
        if isinstance(due, bool):
            return Progress(self.tokens, 0, False, self.tokens) if due else self
        since = torch.where(due, 0, torch.as_tensor(self.since, device="cpu"))
        chosen = torch.where(
            due, torch.as_tensor(self.tokens, device="cpu"), torch.as_tensor(self.chosen, device="cpu")
        )
        return Progress(self.tokens, _collapsed(since), self.longer & ~due, chosen)

    def back(self, cut: int | Tensor) -> Progress:
        """Before the last tokens of each item."""
        since = self.since - cut
        since = since.clamp(min=0) if isinstance(since, Tensor) else max(0, since)
        return Progress(_collapsed(self.tokens - cut), _collapsed(since), self.longer, self.chosen)

    def select(self, index: Tensor) -> Progress:
        """Of the items ``index``, on the CPU."""
        chosen = [x[index] if isinstance(x, Tensor) else x for x in (self.tokens, self.since, self.longer, self.chosen)]
        tokens, since, longer, last = chosen
        return Progress(_collapsed(tokens), _collapsed(since), longer, last)

    @property
    def differs(self) -> bool:
        """Whether items differ."""
        return any(isinstance(x, Tensor) for x in (self.tokens, self.since, self.longer, self.chosen))


def _collapsed(numbers: int | Tensor) -> int | Tensor:
    return numbers if isinstance(numbers, int) else shared(numbers)


def is_any(flags: bool | Tensor) -> bool:
    """Whether any item's flag is set."""
    return flags if isinstance(flags, bool) else bool(flags.any())
