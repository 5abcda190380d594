"""Whose a cache is: the one layer whose values it holds."""

from __future__ import annotations

from typing import Any


class Identity:
    """What a layer and its caches share.

    A deep copy is another identity, which :mod:`copy` makes once for everything that is copied together: the copy of a
    layer takes it, and the copy of a cache is then that layer's. Copied without its layer, a cache stays whose it was.

    Attributes:
        taken: Whether a layer has it.
    """

    def __init__(self) -> None:
        self.taken = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Identity:
        return Identity()
