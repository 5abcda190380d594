"""Caches that hold less than everything: what they hold stays in them, and rows read it there.

Letters: B batch, T tokens of a call, H query heads, G KV heads, D key width, Dv value width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

from torch import Tensor

from attnzoo.cache.kv_cache import KVCache
from attnzoo.cache.retention import Retention


class HeldCache(KVCache):
    """A cache that gives nothing back: a call's tokens are staged, read with what is held, and written at its end."""

    @property
    @abstractmethod
    def rule(self) -> Retention | None:
        """What rows read by place, whatever their layer's own rule is; ``None`` where that rule stands."""

    def scores_of(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
        """The score of each row of a call ``[B, G, T]``, where rows are kept by one.

        Args:
            q: Queries before rotation ``[B, H, T, D]``.
            k: Keys before rotation ``[B, G, T, D]``.
            v: Values ``[B, G, T, Dv]``.
        """
        return None

    @abstractmethod
    def stage(self, values: Mapping[str, Tensor], lengths: int | Tensor, *, score: Tensor | None = None) -> None:
        """Takes note of a call's tokens ``[B, G, T, D]``, left-aligned, for :meth:`commit`."""

    @abstractmethod
    def commit(self) -> None:
        """Writes what was staged; called when the call has succeeded."""
