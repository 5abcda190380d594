"""Where the pages of KV heads lie: those of heads that hold as many in one piece, to be read where they are.

An *extent* is a run of pages of a pool, as many for each item and head: item by item, head by head. The pages in use
are the first of each head's, equally many in all of the extent; the others are free, for the heads to grow into.

Heads that remember by place hold the pages of the first blocks and a ring of the last ones. Others hold rows in order.

Letters: B batch, h heads of an extent, w rows of a page, n tokens of a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

SHARE_OF_ROOM = 8
"""A head has room for one page more for each so many that it needs."""


@dataclass(frozen=True)
class BlockRing:
    """Places of the blocks that a head remembers by place: block J is page J of its head, or one of the ring's.

    Attributes:
        rows: Tokens in a block, rows of a page, w.
        sink: First blocks, which stay.
        local: Last blocks that are read, the own one included.
        spare: Blocks before these that are held, so that tokens may be taken back.
    """

    rows: int
    sink: int
    local: int
    spare: int = 0

    @property
    def pages(self) -> int:
        """Pages that a head ever needs."""
        return self.sink + self.local + self.spare

    def page_of(self, block: Tensor) -> Tensor:
        """The page of each block, of those of its head."""
        return torch.where(block < self.sink, block, self.sink + (block - self.sink) % (self.local + self.spare))

    def row_of(self, token: int) -> int:
        """The row of a token, of those of its head."""
        block, within = divmod(token, self.rows)
        if block >= self.sink:
            block = self.sink + (block - self.sink) % (self.local + self.spare)
        return block * self.rows + within

    def is_held(self, block: Tensor, last: int | Tensor) -> Tensor:
        """Whether a block is held where ``last`` is the last one with a token."""
        return (block < self.sink) | (block > last - self.local - self.spare)

    def is_read(self, block: Tensor, own: int | Tensor) -> Tensor:
        """Whether rows of a block read another one, not behind them."""
        return (block < self.sink) | (block > own - self.local)

    def count(self, tokens: Tensor) -> Tensor:
        """Rows that the next of so many tokens reads, of those before it."""
        near = (tokens // self.rows - self.local + 1).clamp(min=self.sink) * self.rows
        return tokens.clamp(max=self.sink * self.rows) + (tokens - near).clamp(min=0)


@dataclass(eq=False)
class Extent:
    """KV heads with equally many pages, in one piece.

    Attributes:
        heads: KV heads, ascending.
        first: The first page of the piece.
        pages: Pages for each item and head.
        ring: How a head's blocks take turns, of heads that remember by place.
        live: Pages in use of each item and head.
        rows: Rows that each holds, or, of heads that remember by place, tokens that it has seen: an int where all have
            as many, else int64 ``[B, h]`` on the CPU.
    """

    heads: tuple[int, ...]
    first: int
    pages: int
    ring: BlockRing | None = None
    live: int = 0
    rows: int | Tensor = 0

    @property
    def most(self) -> int:
        """The rows of the head that holds most."""
        if isinstance(self.rows, Tensor):
            return int(self.rows.max()) if self.rows.numel() else 0
        return self.rows

    def each(self, batch: int) -> Tensor:
        """The rows of every item and head, int64 ``[B, h]`` on the CPU."""
        if isinstance(self.rows, Tensor):
            return self.rows
        return torch.full((batch, len(self.heads)), self.rows, dtype=torch.int64, device="cpu")

    def bases(self, batch: int) -> Tensor:
        """The first page of every item and head, int64 ``[B, h]`` on the CPU."""
        heads = len(self.heads)
        return self.first + torch.arange(batch * heads, device="cpu").view(batch, heads) * self.pages

    def needs(self, count: int, page: int) -> int:
        """Pages in use when so many rows are held by the head that holds most."""
        pages = -(-count // page)
        return pages if self.ring is None else min(pages, self.ring.pages)

    def copy(self) -> Extent:
        """A record of its own; its numbers are never written in place."""
        return replace(self)


def shared(counts: Tensor) -> int | Tensor:
    """Numbers on the CPU as an extent has them: an int where they are all the same."""
    if counts.numel() and bool((counts == counts.flatten()[0]).all()):
        return int(counts.flatten()[0])
    return counts if counts.numel() else 0


def with_room(pages: int, ring: BlockRing | None) -> int:
    """Pages to put aside for a head that needs so many now."""
    roomy = pages + max(1, pages // SHARE_OF_ROOM)
    return roomy if ring is None else min(roomy, ring.pages)


def placed(extents: Sequence[Extent], pages: Sequence[int], batch: int) -> tuple[Extent, ...]:
    """The same heads with other numbers of pages, one extent behind the other from page 1 on; page 0 is nobody's."""
    found = []
    first = 1
    for extent, count in zip(extents, pages, strict=True):
        found.append(replace(extent, first=first, pages=count))
        first += batch * len(extent.heads) * count
    return tuple(found)
