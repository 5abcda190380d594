"""Where the tokens lie that KV heads keep: each head's in one piece, so that a row reads them where they are.

Heads that keep everything hold a sequence. The region of another head has, from its front,

1. a *margin*, which rows do not read: the blocks that have left last, so that tokens may be taken back;
2. the *ring* of near blocks: block J at place ``J % P``;
3. the blocks that the head keeps for ever, in their order;
4. the block that is being filled, where blocks have more tokens than one. Once full it moves into the ring, to the
   place of the block that leaves, which moves behind the kept ones if the head keeps it.

So everything from the ring on is read by the next row, and its end is free for that row's own token. The order of keys
does not matter to softmax. Where a token lies is a function of how many there are.

Letters: B batch, h heads of a region, D width, R rows of a region, w tokens in a block, L near blocks, P places of the
ring, I the block of the next token, J another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from attnzoo.cache.journal import Journal
from attnzoo.cache.lengths import Lengths
from attnzoo.cache.retention import Kept, Retention

KeptRun = tuple[tuple[int, int], int]
"""The first of some neighbouring heads and the one behind the last, and how many blocks each of them keeps."""

MOST_KNOWN = 64
"""Numbers of blocks for which the runs of a region are remembered."""


class Run(NamedTuple):
    """Heads whose next row reads the same rows of their region.

    Attributes:
        heads: First head of the region, and the one behind the last.
        rows: First row that is read, and the one behind the last: the own token's, or behind it in a ring.
        own: The row of the next token.
    """

    heads: tuple[int, int]
    rows: tuple[int, int]
    own: int


@dataclass(frozen=True)
class FullRegion:
    """The region of heads that keep everything: token s at row s.

    Attributes:
        heads: KV heads, ascending.
    """

    heads: tuple[int, ...]
    name: str = field(default="full", init=False)

    def rows(self, tokens: int) -> int:
        """Rows that so many tokens need."""
        return tokens

    def read_rows(self, held: int) -> int:
        """Rows that the next row reads beside its own, of all heads, where so many tokens are held."""
        return len(self.heads) * held

    def runs(self, held: int) -> tuple[Run, ...]:
        """What the next row reads, where so many tokens are held."""
        return (Run((0, len(self.heads)), (0, held + 1), held),)

    def retire(self, buffers: Sequence[Tensor], held: int, journal: Journal | None = None) -> None:
        """Nothing: no token ever moves."""

    def row_of(self, token: Tensor, held: int | Tensor) -> Tensor:
        """Where tokens lie: see :meth:`StreamingRegion.row_of`."""
        return token


@dataclass(frozen=True)
class StreamingRegion:
    """The region of heads that keep the near blocks, and some of the far ones.

    Attributes:
        heads: KV heads, ascending.
        block: Tokens in a block, w.
        local: Near blocks L, the own one included.
        kept: Which far blocks stay.
        phases: Of each head, which of a stride's blocks those are.
        spare: Blocks of the margin.
    """

    heads: tuple[int, ...]
    block: int
    local: int
    kept: Kept
    phases: tuple[int, ...]
    spare: int = 0
    name: str = field(default="near", init=False)
    _known_runs: dict[int, tuple[KeptRun, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def in_place(self) -> bool:
        """Whether a token is a block, so that it is written into the ring at once."""
        return self.block == 1

    @property
    def places(self) -> int:
        """Blocks of the ring, P."""
        return self.local if self.in_place else self.local - 1

    @property
    def margin(self) -> int:
        """Rows of the margin."""
        return self.spare * self.block

    def rows(self, tokens: int) -> int:
        """Rows that so many tokens need, R; where a layer sees more, those before them lie in the same rows."""
        if self.in_place:
            return self.margin + min(tokens, self.local) + self._most_kept(tokens)
        last = max(0, tokens - 1) // self.block
        return self.margin + min(tokens, (min(last, self.places) + self._most_kept(last) + 1) * self.block)

    def _most_kept(self, last: int) -> int:
        gone = max(0, last - self.local + 1)
        most: int = max(self.kept.count(gone, phase) for phase in self.phases)
        return most

    def read_rows(self, held: int) -> int:
        """Rows that the next row reads beside its own, of all heads, where so many tokens are held."""
        gone = max(0, held // self.block - self.local + 1)
        kept: int = sum(self.kept.count(gone, phase) for phase in self.phases)
        return len(self.heads) * (held - gone * self.block) + kept * self.block

    def runs(self, held: int) -> tuple[Run, ...]:
        """What the next row reads, where so many tokens are held: heads that have kept as many blocks are one run."""
        current, within = divmod(held, self.block)
        gone = max(0, current - self.local + 1)
        if self.in_place:
            own = self.margin + held % self.local
            filled = self.margin + min(held + 1, self.local)
            return tuple(Run(heads, (self.margin, filled + kept), own) for heads, kept in self._kept_runs(gone))
        first = self.margin + min(current, self.places) * self.block + within
        rows = [(heads, first + kept * self.block) for heads, kept in self._kept_runs(gone)]
        return tuple(Run(heads, (self.margin, row + 1), row) for heads, row in rows)

    def _kept_runs(self, gone: int) -> tuple[KeptRun, ...]:
        """Neighbouring heads that keep as many of the ``gone`` blocks that are not near any more, and how many."""
        if self.kept.stride is None:
            # All later numbers are one.
            gone = min(gone, self.kept.sink)
        found = self._known_runs.get(gone)
        if found is None:
            runs = []
            first = 0
            for count, same in groupby(self.kept.count(gone, phase) for phase in self.phases):
                end = first + len(list(same))
                runs.append(((first, end), count))
                first = end
            found = tuple(runs)
            if len(self._known_runs) >= MOST_KNOWN:
                self._known_runs.clear()
            self._known_runs[gone] = found
        return found

    def retire(self, buffers: Sequence[Tensor], held: int, journal: Journal | None = None) -> None:
        """Moves the block that is near no more, and the one that is full, after the last of ``held`` tokens.

        Nothing is overwritten that rows from here on read; what is, a journal notes.
        """
        leaving = held // self.block - self.local
        if leaving < 0 or held % self.block:
            return
        if self.in_place and not self.spare and self.kept.stride is None and leaving >= self.kept.sink:
            return
        ring = self.margin + leaving % max(self.places, 1) * self.block
        for (first, end), count in self._kept_runs(leaving):
            behind = self.margin + (self.places + count) * self.block
            # With one near block there is no ring: what was filled last is what leaves.
            rows = (ring if self.places else behind, behind)
            for stays, same in groupby(range(first, end), lambda n: self.kept.holds(leaving, self.phases[n])):
                heads = list(same)
                for x in buffers:
                    chosen = x if len(heads) == x.shape[1] else x[:, heads[0] : heads[-1] + 1]
                    self._move(chosen, leaving, rows, stays=stays, journal=journal)

    def _move(
        self, x: Tensor, leaving: int, rows: tuple[int, int], *, stays: bool, journal: Journal | None = None
    ) -> None:
        """Moves the block from ``rows[0]`` on, which leaves, and that from ``rows[1]`` on, in ``[B, h, R, D]``."""
        left = x.narrow(2, rows[0], self.block)
        if self.spare and not stays:
            _write_over(x.narrow(2, leaving % self.spare * self.block, self.block), left, journal)
        if rows[0] == rows[1] or (self.in_place and not stays):
            return
        filled = x.narrow(2, rows[1], self.block)
        if self.in_place:
            _write_over(filled, left, journal)
        elif stays:
            # They change places: the kept blocks are one more.
            before = left.clone()
            _write_over(left, filled, journal)
            _write_over(filled, before, journal)
        else:
            _write_over(left, filled, journal)

    def row_of(self, token: Tensor, held: int | Tensor) -> Tensor:
        """Where tokens lie.

        Args:
            token: Tokens below ``held``, int64 ``[B|1, h|1, n]``.
            held: Tokens that are held, an int or int64 ``[B, 1, 1]``.

        Returns:
            Rows, int64 ``[B|1, h|1, n]``; -1 where a token is gone.
        """
        block = token // self.block
        within = token % self.block
        current = held // self.block
        phase = self.phase(token.device)
        row = torch.where(self.kept.holds(block, phase), self.places + self.kept.count(block, phase), -1)
        row = self.margin + row * self.block
        if self.spare:
            is_spare = (block > current - self.local - self.spare) & (row < self.margin)
            row = torch.where(is_spare, block % self.spare * self.block, row)
        near = self.margin + block % max(self.places, 1) * self.block
        row = torch.where(block > current - self.local, near, row)
        if not self.in_place:
            row = torch.where(block == current, self._filling(current, phase), row)
        gone = (block <= current - self.local - self.spare) & ~self.kept.holds(block, phase)
        return torch.where(gone, -1, row + within)

    def token_at(self, rows: int, held: int | Tensor, device: torch.device) -> Tensor:
        """Which token lies in each row, int64 ``[B|1, h|1, rows]``, -1 for none: the inverse of :meth:`row_of`."""
        row = torch.arange(rows, device=device).view(1, 1, -1)
        at = (row - self.margin) // self.block
        current = held // self.block
        phase = self.phase(device)
        gone = _at_least_0(current - self.local + 1)
        count = self.kept.count(torch.as_tensor(gone, device=device), phase)
        behind = at - self.places
        block = torch.where((behind >= 0) & (behind < count), self.kept.nth(behind.clamp(min=0), phase), -1)
        last = current - 1 - (current - 1 - at) % max(self.places, 1)
        is_ring = (at >= 0) & (at < self.places) & (last > current - self.local)
        block = torch.where(is_ring, last, block)
        if self.spare:
            left = current - self.local
            spare = row // self.block
            block = torch.where(row < self.margin, left - (left - spare) % self.spare, block)
        else:
            block = torch.where(row < self.margin, -1, block)
        if not self.in_place:
            filling = self._filling(current, phase)
            is_filled = (row >= filling) & (row < filling + self.block)
            block = torch.where(is_filled, current, block)
        token = block * self.block + (row - self.margin) % self.block
        return torch.where((block >= 0) & (token < held), token, -1)

    def _filling(self, current: int | Tensor, phase: int | Tensor) -> int | Tensor:
        """The first row of the block that is being filled."""
        gone = _at_least_0(current - self.local + 1)
        ring = current.clamp(max=self.places) if isinstance(current, Tensor) else min(current, self.places)
        first: int | Tensor = self.margin + (ring + self.kept.count(gone, phase)) * self.block
        return first

    def phase(self, device: torch.device) -> int | Tensor:
        """The heads' phases: an int where they agree, else int64 ``[h, 1]``."""
        if all(phase == self.phases[0] for phase in self.phases):
            return self.phases[0]
        return torch.tensor(self.phases, device=device).unsqueeze(1)


Region = FullRegion | StreamingRegion


def regions_of(retention: Retention, spare: int = 0) -> tuple[Region, ...]:
    """The regions of a layer's KV heads: of those that keep everything, and of the others."""
    heads = range(len(retention.full))
    full = tuple(n for n in heads if retention.full[n])
    near = tuple(n for n in heads if not retention.full[n])
    regions: list[Region] = []
    if near:
        phases = tuple(retention.phases[n] for n in near) if retention.stride is not None else (0,) * len(near)
        regions.append(StreamingRegion(near, retention.block, retention.local, retention.kept, phases, spare))
    if full:
        regions.append(FullRegion(full))
    return tuple(regions)


def column_of(count: int | Tensor, device: torch.device) -> int | Tensor:
    """A number of tokens of each item beside ``[B, h, n]``, an int or int64 ``[B|1, 1, 1]``.

    Where a program is compiled it is a tensor: a compiler would do the arithmetic here with symbols, for minutes.
    """
    if isinstance(count, Tensor) or not torch.compiler.is_compiling():
        return Lengths(count).column(3)
    return torch.full((1, 1, 1), count, device=device)


def _at_least_0(blocks: int | Tensor) -> int | Tensor:
    return blocks.clamp(min=0) if isinstance(blocks, Tensor) else max(0, blocks)


def _write_over(target: Tensor, value: Tensor, journal: Journal | None) -> None:
    if journal is not None:
        journal.keep(target)
    target.copy_(value)


def in_order(x: Tensor, regions: Sequence[Region]) -> Tensor:
    """KV heads ``[B, G, ...]`` in their order, which lie as regions do."""
    heads = [head for region in regions for head in region.heads]
    if heads == sorted(heads):
        return x
    return x.index_select(1, torch.tensor(heads, device=x.device).argsort())


def of_run(x: Tensor, first: int, end: int) -> Tensor:
    """Neighbouring heads of ``[B, h, ...]``."""
    return x if end - first == x.shape[1] else x[:, first:end]


def of_heads(x: Tensor, heads: tuple[int, ...]) -> Tensor:
    """Some heads of ``[B, G, ...]``: a view where they are neighbours."""
    if len(heads) == x.shape[1]:
        return x
    if heads[-1] - heads[0] + 1 == len(heads):
        return x[:, heads[0] : heads[-1] + 1]
    return x.index_select(1, torch.tensor(heads, device=x.device))


def picked(x: Tensor, row: Tensor) -> Tensor:
    """Rows ``[B|1, h|1, n]`` of ``x [B, h, R, D]``, a copy ``[B, h, n, D]``."""
    if row.shape[:2] == (1, 1):
        return x.index_select(2, row.view(-1))
    return x.gather(2, row.unsqueeze(-1).expand(*x.shape[:2], -1, x.shape[3]))
