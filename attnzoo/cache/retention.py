"""Which tokens later rows can still read: the nearest blocks, and blocks that a KV head keeps for ever.

Letters: G KV heads, J a block, w tokens in a block, L near blocks.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Kept:
    """Blocks that a KV head keeps: the first ones, and every so many one more.

    Attributes:
        sink: First blocks that are kept.
        stride: Block J is kept if ``J % stride`` is the head's phase; ``None`` keeps the first ones alone.
    """

    sink: int
    stride: int | None

    def holds(self, block: int | Tensor, phase: int | Tensor) -> Any:
        """Whether a block is kept, a bool or bools."""
        first = block < self.sink
        return first if self.stride is None else first | (block % self.stride == phase)

    def count(self, blocks: int | Tensor, phase: int | Tensor) -> Any:
        """How many of the first ``blocks`` blocks are kept, an int or ints as its arguments are."""
        first = blocks.clamp(max=self.sink) if isinstance(blocks, Tensor) else min(blocks, self.sink)
        if self.stride is None:
            return first
        return first + self._strided(blocks, phase) - self._strided(first, phase)

    def nth(self, index: Tensor, phase: int | Tensor) -> Tensor:
        """Which block is kept as number ``index``, from 0."""
        if self.stride is None:
            return index
        skipped = self._strided(self.sink, phase)
        return torch.where(index < self.sink, index, phase + self.stride * (index - self.sink + skipped))

    def _strided(self, blocks: Any, phase: int | Tensor) -> Any:
        """How many of the first blocks lie at the stride."""
        return 0 if self.stride is None else (blocks - phase + self.stride - 1) // self.stride


@dataclass(frozen=True)
class Retention:
    """What the rows of a layer read, however long the sequence is.

    A row of block I reads the blocks ``I - local + 1`` to I, and of those before them all that its KV head keeps. With
    blocks of one token, that is a window of ``local`` tokens and a sink.

    Attributes:
        block: Tokens in a block, w.
        local: Near blocks L, the own one included.
        full: Which KV heads keep everything; ``sink`` and ``stride`` are of the others.
        sink: First blocks, which every head keeps.
        stride: Every how many blocks a head keeps one more; ``None`` for none.
        phases: Which of a stride's blocks each KV head keeps; nothing where there is no stride.
    """

    block: int
    local: int
    full: tuple[bool, ...]
    sink: int = 0
    stride: int | None = None
    phases: tuple[int, ...] = ()

    @property
    def kept(self) -> Kept:
        """What is kept by heads that do not keep everything."""
        return Kept(self.sink, self.stride)

    def as_json(self) -> dict[str, Any]:
        """The same in lists and plain numbers."""
        return {name: list(x) if isinstance(x, tuple) else x for name, x in asdict(self).items()}
