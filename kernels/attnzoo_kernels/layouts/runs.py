"""The runs of slots that each list of a layout makes, for a single query block: a decoding step reads them.

The lists of such a layout do not change between two block borders. What is found here follows from the lists alone, and
is remembered with them: layouts that share their tensors share it too, whatever their lengths are.
"""

from __future__ import annotations

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
        runs: Runs of blocks of each list; neighbours never read equal lists under two numbers.
    """

    block: int
    of_head: tuple[int, ...]
    runs: tuple[tuple[Run, ...], ...]

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

    def index(self, number: int, seen: Seen) -> Tensor:
        """The same one by one, int64 ``[n]``; for lists of many runs."""
        index = self._index[number]
        beyond = self.runs[number][-1][1] * self.block - seen.hi
        if beyond > 0:
            index = index[: max(index.shape[0] - beyond, 0)]
        if self.runs[number][0][0] * self.block < seen.lo:
            index = index[(index >= seen.lo) | (index < seen.sink)]
        return index

    @cached_property
    def _index(self) -> list[Tensor]:
        """All slots of each list, ascending."""
        counts = [sum(last - first for first, last in runs) for runs in self.runs]
        blocks = [block for runs in self.runs for run in runs for block in range(*run)]
        # Not an inference tensor, which could not serve a later training step.
        with torch.inference_mode(False):
            slots = torch.tensor(blocks).unsqueeze(1) * self.block + torch.arange(self.block)
            found = list(slots.view(-1).split([count * self.block for count in counts]))
        note_growth(bytes_of(found))
        return found


def listed_runs(lists: Lists) -> ListedRuns | None:
    """The runs of a layout with one query block, or ``None`` where some head reads nothing. Reads values."""
    return remembered_of_lists(lists, _find)


def _find(lists: Lists) -> ListedRuns | None:
    col = lists.col.tolist()
    of_head: list[int] = []
    found: list[tuple[Run, ...]] = []
    before: list[int] = []
    for start, count in zip(lists.start.flatten().tolist(), lists.count.flatten().tolist(), strict=True):
        blocks = sorted(col[start : start + count])
        if not blocks:
            return None
        if blocks != before:
            found.append(tuple(_joined(blocks)))
            before = blocks
        of_head.append(len(found) - 1)
    return ListedRuns(lists.block_k, tuple(of_head), tuple(found)) if found else None


def _joined(blocks: list[int]) -> list[Run]:
    """Ascending blocks as runs."""
    ends = [i for i in range(1, len(blocks)) if blocks[i] != blocks[i - 1] + 1]
    firsts = [0, *ends]
    lasts = [*ends, len(blocks)]
    return [(blocks[first], blocks[last - 1] + 1) for first, last in zip(firsts, lasts, strict=True)]
