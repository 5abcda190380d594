"""What a call writes over, noted before it does, so that a call that fails leaves everything as it was.

What is written behind the tokens that are counted needs no note: it is read by nobody, and cleared.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor


class Journal:
    """What tensors held before a call wrote to them in place."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []

    def keep(self, x: Tensor) -> None:
        """Notes what a tensor holds, which may be a view of a part of another."""
        self._undo.append(partial(x.copy_, x.clone()))

    def keep_entries(self, x: Tensor, index: Tensor) -> None:
        """Notes what some entries of a tensor's first dimension hold, each once."""
        self._undo.append(partial(x.index_copy_, 0, index, x.index_select(0, index)))

    def put_back(self) -> None:
        """Writes all of it where it was, the last first."""
        while self._undo:
            self._undo.pop()()
