"""The memory of a layer across calls: named streams of fixed length, left-aligned for each item.

Letters: B batch, T tokens of a call, S slots read, G heads of a stream, D its width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from itertools import chain
from typing import Any, Self

import torch
from torch import Tensor

from attnzoo.cache.lengths import Lengths
from attnzoo.cache.owner import Identity
from attnzoo.cache.replay import Birth, refuse_transforms
from attnzoo.cache.rows import RowCache
from attnzoo.cache.streams import (
    Groups,
    Ring,
    Stream,
    check_count,
    fits,
    row_bytes,
    widened,
    zeros_on_cpu,
)
from attnzoo_kernels.errors import ConfigError, ShapeError, UnsupportedError

__all__ = ["KVCache", "Stream"]


class KVCache(RowCache):
    """Fixed buffers for the tokens that a layer has seen; made by ``layer.new_cache``.

    Slot s of an item holds its s-th real token. The buffers start as zeros and hold detached values: training through
    a cache reaches the current call's tokens only. Lengths that all items share are known without reading a
    tensor, so that nothing synchronises.

    Beside streams with a value for each token there are two kinds that cost less. A *ring* (``Stream(ring=n)``) is
    written by :meth:`append` too, and :meth:`history` reads it. A *grouped* stream (``Stream(every=w)``) has a value
    for each complete group of w tokens: :meth:`complete` writes it after :meth:`append`, :meth:`groups` reads it.

    Attributes:
        max_length: Tokens that fit, for each item.
        length: Tokens held by every item, where it is known to be one number; else ``None``.
        bound: A number of tokens that no item exceeds, known without reading a tensor.
    """

    def __init__(
        self,
        streams: Mapping[str, Stream],
        *,
        batch: int,
        max_length: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        owner: tuple[Identity | None, Any] = (None, None),
        rounds: bool = False,
    ) -> None:
        for name, value, least in (("batch", batch, 0), ("max_length", max_length, 1)):
            check_count(name, value)
            if value < least:
                raise ShapeError(f"{name}: expected at least {least}, got {value}")
        self.max_length = max_length
        self.length: int | None = 0
        self.bound = 0
        self._lengths: Tensor | None = None
        self._owner, self._config = owner
        self._heir: Identity | None = None
        self._rounds = rounds
        self._buffers: dict[str, Tensor] = {}
        self._rings: dict[str, Ring] = {}
        self._groups: dict[str, Groups] = {}
        self._offloaded = frozenset(name for name, stream in streams.items() if stream.offloaded)
        with torch.inference_mode(False):
            self._allocate(streams, batch, device, dtype)
        if not self._buffers:
            raise ConfigError(f"streams: expected one with a value for each token, got {', '.join(streams) or 'none'}")
        self._born = Birth(self.device)

    def _allocate(
        self, streams: Mapping[str, Stream], batch: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        """Makes the buffers, of zeros."""
        for name, stream in streams.items():
            rows = self.max_length // (stream.every or 1)
            if stream.ring is not None:
                rows = Ring.length_for(stream.ring, self.max_length)
            # One row more than fits: rows without a token are written there.
            shape = (batch, stream.heads, rows + 1, stream.width)
            make = zeros_on_cpu if stream.offloaded else torch.zeros
            values = make(shape, device=device, dtype=stream.dtype or dtype)
            if stream.ring is not None:
                self._rings[name] = Ring(stream.ring, values)
            elif stream.every is not None:
                self._groups[name] = Groups(stream.every, values)
            else:
                self._buffers[name] = values

    def __repr__(self) -> str:
        streams = ", ".join(f"{name} {list(x.shape)}" for name, x in self.streams.items())
        held = self.length if self.length is not None else f"up to {self.bound}"
        return f"{type(self).__name__}({held} of {self.max_length} tokens: {streams})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copy = self.fork()
        copy._owner = self._belongs_to
        # The layer's copy has it, if the layer is copied by the same call, before this or after.
        copy._heir = deepcopy(copy._owner, memo)
        return copy

    @property
    def streams(self) -> dict[str, Tensor]:
        """The buffers by name, each ``[B, G, max_length, D]``; rings and groups have as many rows as they hold."""
        held = {name: x[:, :, : self.max_length] for name, x in self._buffers.items()}
        held |= {name: x.values[:, :, :-1] for name, x in (self._rings | self._groups).items()}
        return held

    @property
    def batch(self) -> int:
        """Items B."""
        return next(iter(self._buffers.values())).shape[0]

    @property
    def device(self) -> torch.device:
        """Where the buffers lie that are not kept in CPU memory."""
        near = (x for name, x in self._buffers.items() if name not in self._offloaded)
        other = (x.values for held in (self._rings, self._groups) for x in held.values())
        return next(chain(near, other, self._buffers.values())).device

    @property
    def lengths(self) -> Tensor:
        """Tokens held, int64 ``[B]``."""
        if self._lengths is not None:
            return self._lengths
        return torch.full((self.batch,), self.bound, dtype=torch.int64, device=self.device)

    @property
    def offset(self) -> int | Tensor:
        """Tokens held: an int where it is known that all items share it, else int64 ``[B]``."""
        return self.lengths if self.length is None else self.length

    @property
    def bytes_per_token(self) -> int:
        """Bytes held for each token of an item, rounded up; what rings hold does not grow with the tokens."""
        size = sum(row_bytes(x) for x in self._buffers.values())
        return size + math.ceil(sum(row_bytes(x.values) / x.every for x in self._groups.values()))

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(x.numel() * x.element_size() for x in self.streams.values())

    @property
    def offloads(self) -> bool:
        """Whether some values are kept in CPU memory."""
        return bool(self._offloaded)

    @property
    def offloaded_nbytes(self) -> int:
        """Bytes of the buffers that are kept in CPU memory."""
        return sum(x.numel() * x.element_size() for name, x in self.streams.items() if name in self._offloaded)

    def check(self, owner: tuple[Identity | None, Any], batch: int, device: torch.device) -> None:
        """Raises unless the cache belongs to this layer and fits its input.

        Raises:
            ConfigError: If another layer, or one of another configuration, made it.
            ShapeError: If batch or device differ.
            UnsupportedError: If a backward makes the call once more.
        """
        self._born.refuse_replay("cache")
        # A compiler that takes numbers for variables cannot compare configurations that hold floats.
        if self._belongs_to is not owner[0] or not (self._config is owner[1] or self._config == owner[1]):
            raise ConfigError(
                "cache: expected one that this layer's new_cache made, got the cache of another layer; state_dict() "
                "and load_state_dict() carry what a cache holds to another layer of the same weights"
            )
        if self.batch != batch:
            raise ShapeError(f"cache: expected batch {batch} as x has it, got {self.batch}")
        if self.device != device:
            raise ShapeError(f"cache: expected it on {device} as x is, got {self.device}")

    def check_room(self, tokens: int, lengths: int | Tensor) -> None:
        """Raises unless a call's tokens fit.

        Raises:
            ShapeError: If they do not. Where lengths differ and may not be read, padding counts as tokens.
        """
        if self.batch == 0 or self.bound + tokens <= self.max_length:
            return
        longest = self.bound + tokens
        differ = Lengths(lengths).differ or self._lengths is not None
        if differ and self.batch and not torch.compiler.is_compiling():
            longest = int((self.lengths + lengths).max())
        if longest > self.max_length:
            raise ShapeError(f"cache: expected at most max_length {self.max_length} tokens, got {longest}")

    def takes_row(self, owner: tuple[Identity | None, Any], x: Tensor) -> bool:
        """As every cache's; of a class that appends in a way of its own, not unless it says so."""
        return type(self).append is KVCache.append and super().takes_row(owner, x)

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Forgets what the block appended if it raises."""
        before = self.length, self.bound, self._lengths
        rings = {name: ring.state() for name, ring in self._rings.items()}
        try:
            yield
        except BaseException:
            self.length, self.bound, self._lengths = before
            for name, state in rings.items():
                self._rings[name].restore(state)
            self._clear_behind()
            raise

    def append(self, values: Mapping[str, Tensor], lengths: int | Tensor, *, differentiable: bool) -> dict[str, Tensor]:
        """Writes a call's tokens behind those held and gives back everything that may be read.

        Args:
            values: For each stream but grouped ones ``[B, G, T, D]``, left-aligned.
            lengths: Real tokens of each item; T as an int where there are no others.
            differentiable: Whether to give copies, with the current tokens in the graph, instead of the buffers.

        Returns:
            For each stream with a value for each token ``[B, G, S, D]`` in the dtype of its value, S the new bound;
            where the stream lies.

        Raises:
            ShapeError: If shapes, dtypes or the room do not fit.
            UnsupportedError: If a stream that is kept in CPU memory would have to be differentiable.
        """
        refuse_transforms(values)
        if differentiable and self._offloaded:
            raise UnsupportedError("cache: expected no gradients where keys and values are offloaded, got some")
        tokens = self._check_values(values)
        self.check_room(tokens, lengths)
        self._widen(values)
        if self._rings:
            with torch.no_grad():
                for name, ring in self._rings.items():
                    ring.write(values[name].detach(), self.offset, lengths)
            values = {name: value for name, value in values.items() if name in self._buffers}
        if self.length is not None and not Lengths(lengths).differ:
            seen = self._append_common(values, self.length, differentiable)
            self.length += tokens
            self.bound = self.length
            return seen
        before = self.lengths
        self.bound = min(self.bound + tokens, self.max_length)
        seen = self._append_ragged(values, before, lengths, differentiable)
        self._lengths = before + lengths
        self.length = None
        return seen

    def history(self, name: str, count: int) -> Tensor:
        """What a ring holds of the last ``count`` tokens, ``[B, G, count, D]``; zeros before an item's first token.

        Detached, a copy, in the buffer's dtype. A layer that wants the tokens before this call's reads them before
        :meth:`append`.

        Raises:
            ShapeError: If no ring has this name, or ``count`` is more than the history that it keeps.
        """
        ring = self._rings.get(name)
        if ring is None:
            raise ShapeError(f"name: expected a ring, one of {sorted(self._rings)}, got {name!r}")
        check_count("count", count)
        if not 0 <= count <= ring.history:
            raise ShapeError(f"count: expected 0 to {ring.history} tokens, which {name} keeps, got {count}")
        return ring.last(count, self.offset)

    def complete(self, values: Mapping[str, Tensor], before: int | Tensor) -> None:
        """Writes the groups that the last :meth:`append` has completed.

        Args:
            values: For each grouped stream ``[B, G, P, D]``: an item's p-th value is of its group ``before // every
                + p``. Values of groups that are not complete are not written, whatever they are.
            before: Tokens held before that call: the ``offset`` from then.

        Raises:
            ShapeError: If names or shapes do not fit, or there are fewer groups than have become complete where
                their number is known.
        """
        self._check_shapes(values, {name: x.values for name, x in self._groups.items()})
        self._widen(values)
        for name, value in values.items():
            groups = self._groups[name]
            given = value.shape[2]
            begin = Lengths(before).shared
            if self.length is not None and begin is not None:
                most = self.length // groups.every - begin // groups.every
                if given < most:
                    raise ShapeError(f"cache: expected {most} groups of {name}, got {given}")
            with torch.no_grad():
                groups.write(value.detach(), before, self.offset)

    def groups(self, name: str) -> Tensor:
        """What is held of groups, ``[B, G, N, D]``, N those that the longest item may have; zeros where incomplete.

        A view of the buffer, in its dtype.

        Raises:
            ShapeError: If no grouped stream has this name.
        """
        groups = self._groups.get(name)
        if groups is None:
            raise ShapeError(f"name: expected a grouped stream, one of {sorted(self._groups)}, got {name!r}")
        return groups.values[:, :, : self.bound // groups.every]

    def _widen(self, values: Mapping[str, Tensor]) -> None:
        """Takes up a wider dtype than the weights': what a layer computes in cannot always be told before a call."""
        if self._rounds:
            return
        with torch.inference_mode(False), torch.no_grad():
            for name, value in values.items():
                held = (self._rings | self._groups).get(name)
                if held is not None:
                    held.values = widened(held.values, value.dtype)
                elif (wide := widened(self._buffers[name], value.dtype)) is not self._buffers[name]:
                    self._buffers |= self._as_placed({name: wide})

    def _check_values(self, values: Mapping[str, Tensor]) -> int:
        held = self._buffers
        if self._rings:
            held = held | {name: ring.values for name, ring in self._rings.items()}
        self._check_shapes(values, held)
        # No set: a compiler's sizes have no hash, and would become numbers, each a program of its own.
        tokens = [value.shape[2] for value in values.values()]
        if any(count != tokens[0] for count in tokens):
            raise ShapeError(f"cache: expected equally many tokens in all streams, got {sorted(tokens)}")
        return tokens[0]

    def _check_shapes(self, values: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
        if set(values) != set(buffers):
            raise ShapeError(f"values: expected streams {sorted(buffers)}, got {sorted(values)}")
        for name, value in values.items():
            held = buffers[name]
            if value.shape[:2] != held.shape[:2] or value.shape[3:] != held.shape[3:]:
                shape = [*held.shape[:2], "T", *held.shape[3:]]
                raise ShapeError(f"cache: expected {name} {shape}, got {list(value.shape)}")
            if not self._rounds and not fits(value.dtype, held.dtype):
                raise ShapeError(f"cache: expected {name} in {held.dtype} or narrower, got {value.dtype}")

    def _append_common(self, values: Mapping[str, Tensor], start: int, differentiable: bool) -> dict[str, Tensor]:
        seen = {}
        for name, value in values.items():
            held = self._buffers[name]
            end = start + value.shape[2]
            with torch.no_grad():
                held[:, :, start:end].copy_(value)
            if differentiable:
                seen[name] = torch.cat((held[:, :, :start].to(value.dtype), value), 2)
            else:
                # A view, unless the cache rounds.
                seen[name] = held[:, :, :end].to(value.dtype)
        return seen

    def _append_ragged(
        self, values: Mapping[str, Tensor], before: Tensor, lengths: int | Tensor, differentiable: bool
    ) -> dict[str, Tensor]:
        tokens = next(iter(values.values())).shape[2]
        device = self.device
        token = torch.arange(tokens, device=device)
        slot = torch.where(Lengths(lengths).holds(token), before.unsqueeze(1) + token, self.bound)  # [B, T]
        item = torch.arange(before.shape[0], device=device).unsqueeze(1)
        seen = {}
        for name, value in values.items():
            held = self._buffers[name]
            rows = value.transpose(1, 2)  # [B, T, G, D]
            if differentiable:
                copy = held[:, :, : self.bound + 1].to(value.dtype, copy=True).transpose(1, 2)
                seen[name] = copy.index_put((item, slot), rows).transpose(1, 2)[:, :, : self.bound]
            with torch.no_grad():
                index = (item.to(held.device), slot.to(held.device))
                held.transpose(1, 2).index_put_(index, rows.detach().to(held.device, held.dtype))
            if not differentiable:
                seen[name] = held[:, :, : self.bound].to(value.dtype)
        return seen
