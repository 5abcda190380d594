"""The runs of slots that each list of a layout makes, for a single query block: a decoding step reads them.

The lists of such a layout do not change between two block borders. What is found here follows from the lists alone, and
is remembered with them: layouts that share their tensors share it too, whatever their lengths are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from attnzoo_kernels.layouts.memo import Lists, remembered_of_lists
from attnzoo_kernels.runtime.store import bytes_of, note_growth

Run = tuple[int, int]
"""A first block or slot, and the one behind the last."""


class Seen(NamedTuple):
    """The slots that a single row sees, the layout left aside: those from ``lo`` before ``hi``, and before ``sink``."""

    lo: int
    hi: int
    sink: int


@dataclass(frozen=True)
class ListedRuns:
    """The lists of one query block, each ascending.

    Attributes:
        block: Slots in a key block.
        of_head: For each of the layout's items and heads, one after the other, which list it reads.
        blocks: The blocks of each list; neighbours never read equal lists under two numbers.
    """

    block: int
    of_head: tuple[int, ...]
    blocks: tuple[list[int], ...]

    @cached_property
    def runs(self) -> tuple[tuple[Run, ...], ...]:
        """Runs of blocks of each list."""
        return tuple(tuple(_joined(blocks)) for blocks in self.blocks)

    @cached_property
    def gaps(self) -> tuple[int, ...]:
        """How often each list leaves blocks out: a run begins behind each gap."""
        return tuple(sum(map(_is_gap, blocks, blocks[1:])) for blocks in self.blocks)

    def slots(self, number: int, seen: Seen) -> list[Run]:
        """The runs of slots of a list that the row sees."""
        found: list[Run] = []
        for first_block, last_block in self.runs[number]:
            first = first_block * self.block
            last = min(last_block * self.block, seen.hi)
            sink = min(seen.sink, last)
            if first < sink < seen.lo:
                found.append((first, sink))
                first = sink
            first = first if first < sink else max(first, seen.lo)
            if first < last:
                found.append((first, last))
        return found

    def index(self, number: int, seen: Seen) -> tuple[Tensor, Tensor]:
        """The same one by one, int64 ``[1, n]``, and the whole blocks that these begin with; for lists of many gaps."""
        blocks = self._table(self.blocks[number : number + 1])
        index = self._slots_of(blocks)
        beyond = self._beyond(number, seen)
        if beyond:
            index = index[:, : index.shape[1] - beyond]
            blocks = blocks[:, :-1]
        if self.blocks[number][0] * self.block < seen.lo:
            index = index[:, ((index >= seen.lo) | (index < seen.sink))[0]]
            blocks = blocks[:, :0]
        return index, blocks

    def table(self, seen: Seen) -> tuple[Tensor, Tensor] | None:
        """All lists as :meth:`index` gives one, int64 ``[L, n]``; ``None`` where they do not see equally many slots."""
        beyond = {self._beyond(number, seen) for number in range(len(self.blocks))}
        early = any(blocks[0] * self.block < seen.lo for blocks in self.blocks)
        if early or len(beyond) > 1 or len({len(blocks) for blocks in self.blocks}) > 1:
            return None
        blocks, index = self._tables
        cut = beyond.pop()
        return (index[:, : index.shape[1] - cut], blocks[:, :-1]) if cut else (index, blocks)

    def _beyond(self, number: int, seen: Seen) -> int:
        """Slots of a list's last block that are not there yet."""
        return max((self.blocks[number][-1] + 1) * self.block - seen.hi, 0)

    @cached_property
    def _tables(self) -> tuple[Tensor, Tensor]:
        """The blocks of all lists, and their slots."""
        blocks = self._table(self.blocks)
        found = (blocks, self._slots_of(blocks))
        note_growth(bytes_of(found))
        return found

    def _table(self, lists: Sequence[list[int]]) -> Tensor:
        # Not an inference tensor, which could not serve a later training step.
        with torch.inference_mode(False):
            return torch.tensor(lists, device="cpu")

    def _slots_of(self, blocks: Tensor) -> Tensor:
        with torch.inference_mode(False):
            return (blocks.unsqueeze(2) * self.block + torch.arange(self.block, device="cpu")).flatten(1)


def listed_runs(lists: Lists) -> ListedRuns | None:
    """The runs of a layout with one query block, or ``None`` where some head reads nothing. Reads values."""
    return remembered_of_lists(lists, _find)


def _find(lists: Lists) -> ListedRuns | None:
    col = lists.col.tolist()
    of_head: list[int] = []
    found: list[list[int]] = []
    for start, count in zip(lists.start.flatten().tolist(), lists.count.flatten().tolist(), strict=True):
        blocks = sorted(col[start : start + count])
        if not blocks:
            return None
        if not found or blocks != found[-1]:
            found.append(blocks)
        of_head.append(len(found) - 1)
    return ListedRuns(lists.block_k, tuple(of_head), tuple(found)) if found else None


def _is_gap(block: int, after: int) -> bool:
    return after != block + 1


def _joined(blocks: list[int]) -> list[Run]:
    """Ascending blocks as runs."""
    ends = [i for i in range(1, len(blocks)) if blocks[i] != blocks[i - 1] + 1]
    firsts = [0, *ends]
    lasts = [*ends, len(blocks)]
    return [(blocks[first], blocks[last - 1] + 1) for first, last in zip(firsts, lasts, strict=True)]
