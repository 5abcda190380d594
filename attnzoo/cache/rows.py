"""Decoding steps in a cache: a token of each item is written where it lies, and nothing is copied.

Letters: B batch, G heads of a stream, n slots of a buffer, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from attnzoo.cache.editing import EditableCache
from attnzoo.cache.owner import Identity
from attnzoo.cache.replay import is_replay


class RowCache(EditableCache):
    """One token of each item at a time, where all items share their length."""

    _owner: Identity | None
    _heir: Identity | None

    @property
    def _belongs_to(self) -> Identity | None:
        return self._heir if self._heir is not None and self._heir.taken else self._owner

    def takes_row(self, owner: tuple[Identity | None, Any], x: Tensor) -> bool:
        """Whether :meth:`write_row` can take the next token: a call's steps run, and refuse, whatever it cannot.

        Args:
            owner: The layer that asks.
            x: Its input ``[B, 1, C]``, in the dtype in which it computes.
        """
        if self.length is None or not 0 <= self.length < self.max_length or self._offloaded or is_replay():
            return False
        if self._belongs_to is not owner[0] or not (self._config is owner[1] or self._config == owner[1]):
            return False
        batch = x.shape[0]
        return all(
            values.shape[0] == batch
            and values.device == x.device
            and (values.dtype == x.dtype or not values.is_floating_point())
            for values in (*self._buffers.values(), *(ring.values for ring in self._rings.values()))
        )

    def row_buffer(self, name: str) -> Tensor:
        """The buffer of a stream with a value for each token, ``[B, G, n, D]``, as :meth:`write_row` gives it."""
        return self._buffers[name]

    def recent(self, name: str, count: int) -> Tensor:
        """What a ring holds of the last ``count`` tokens, as ``history``; where they lie together, no copy."""
        return self._rings[name].recent(count, self.offset)

    def write_row(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Writes the next token of each item, where :meth:`takes_row` says so.

        Args:
            values: For each stream but grouped ones ``[B, G, 1, D]``, in its dtype.

        Returns:
            The buffers of streams with a value for each token, ``[B, G, n, D]``; the slots behind the token's hold
            nothing that may be read.
        """
        if self.length is None:
            raise AssertionError("a row is written where all items share their length")
        slot = self.length
        for name, value in values.items():
            if name in self._rings:
                self._rings[name].write_one(value, slot)
            else:
                self._buffers[name].narrow(2, slot, 1).copy_(value)
        self.length = slot + 1
        self.bound = self.length
        return self._buffers
