"""What a cache of pages notes down: how far items have come, a call that is not over, what was before, what was read.

Numbers of items are ints where all share them, else int64 ``[B]`` on the CPU, so that nothing is read back from a
device.

Letters: B batch, T tokens of a call, H query heads, G KV heads, h heads of an extent, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnzoo.cache.pages.apply import Lost
from attnzoo.cache.pages.extents import shared
from attnzoo.cache.pages.pool import PagePool


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
        tokens = torch.as_tensor(self.tokens, device="cpu")
        chosen = torch.where(due, tokens, torch.as_tensor(self.chosen, device="cpu"))
        return Progress(self.tokens, _collapsed(since), self.longer & ~due, chosen)

    def back(self, cut: int | Tensor) -> Progress:
        """Before the last tokens of each item."""
        since = self.since - cut
        since = since.clamp(min=0) if isinstance(since, Tensor) else max(0, since)
        return Progress(_collapsed(self.tokens - cut), _collapsed(since), self.longer, self.chosen)

    def select(self, index: Tensor) -> Progress:
        """Of the items ``index``, on the CPU."""
        tokens, since, chosen = (
            x[index] if isinstance(x, Tensor) else x for x in (self.tokens, self.since, self.chosen)
        )
        longer = self.longer[index] if isinstance(self.longer, Tensor) else self.longer
        return Progress(_collapsed(tokens), _collapsed(since), longer, chosen)

    @property
    def differs(self) -> bool:
        """Whether items differ."""
        return any(isinstance(x, Tensor) for x in (self.tokens, self.since, self.longer, self.chosen))


def _collapsed(numbers: int | Tensor) -> int | Tensor:
    return numbers if isinstance(numbers, int) else shared(numbers)


def is_any(flags: bool | Tensor) -> bool:
    """Whether any item's flag is set."""
    return flags if isinstance(flags, bool) else bool(flags.any())


@dataclass(eq=False)
class Staged:
    """A call's tokens, to be written when it has succeeded.

    Attributes:
        values: Keys, values and sidecars of rows ``[B, G, T, ...]``.
        lengths: Tokens of each item, an int or int64 ``[B]`` on the CPU.
        q: Queries ``[B, H, T, D]``, where the last ones are kept.
        placed: Whether they are written, and not counted yet.
        mass: For each extent, what its rows and the call's own receive, ``[B, h, n, g]``.
    """

    values: dict[str, Tensor]
    lengths: int | Tensor
    q: Tensor | None = None
    placed: bool = False
    mass: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Moment:
    """What a cache was: enough to be that again, since later rows lie behind those that a pool had.

    Attributes:
        pool: The pool.
        counts: Pages in use and rows of each extent.
        progress: Counts of tokens.
        lost: What compensation rows stand for.
    """

    pool: PagePool
    counts: tuple[tuple[int, int | Tensor], ...]
    progress: Progress
    lost: Lost | None


UNCHOSEN = 2**40
"""In :attr:`PagesRead.uses`: the item has chosen nothing, and does so with its next row."""


@dataclass(frozen=True, eq=False)
class PagesRead:
    """Pages that decoding rows read, and may read again.

    Attributes:
        pages: Numbers of pages ``[B, G, K]``, -1 for none; ``None`` for all.
        known: Pages of each head when they were chosen or added to last ``[B, G]``, on the CPU.
        uses: Rows of each item that have read them, its last ones; ``UNCHOSEN`` for items without a choice.
    """

    pages: Tensor | None
    known: Tensor
    uses: int | Tensor

    @property
    def differs(self) -> bool:
        """Whether items differ in more than which pages they read."""
        return isinstance(self.uses, Tensor) or bool((self.known != self.known[:1]).any())

    def select(self, index: Tensor, near: Tensor | None) -> PagesRead:
        """Of the items ``index``; ``near`` is the same on the CPU, ``None`` where items do not differ."""
        if near is None:
            known = self.known[:1].expand(index.shape[0], -1)
            uses = self.uses
        else:
            known = self.known[near]
            uses = self.uses[near] if isinstance(self.uses, Tensor) else self.uses
        pages = self.pages
        if pages is not None:
            where = index if near is None or pages.device == index.device else near
            pages = pages.index_select(0, where)
        return PagesRead(pages, known, uses)

    def back(self, cut: int | Tensor, count: Tensor) -> PagesRead | None:
        """Before the last ``cut`` rows of each item, which then has ``count`` pages for each head ``[B, G]``.

        An item whose choosing row is among them has no choice; ``None`` if none has.
        """
        uses = self.uses - cut
        if not is_any(uses > 0):
            return None
        if isinstance(uses, Tensor):
            uses = torch.where(uses > 0, uses, UNCHOSEN)
        pages = self.pages
        if pages is not None:
            # Pages that were begun since are gone.
            pages = pages.masked_fill(pages >= count.to(pages.device).unsqueeze(-1), -1)
        return PagesRead(pages, self.known.minimum(count), uses)


def without(choice: PagesRead | None, items: bool | Tensor) -> PagesRead | None:
    """A choice, but for some items, which choose anew."""
    if choice is None:
        return None
    if isinstance(items, bool):
        return None if items else choice
    return PagesRead(choice.pages, choice.known, torch.where(items, UNCHOSEN, choice.uses))
