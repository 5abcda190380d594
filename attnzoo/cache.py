"""The memory of a layer across calls: named streams of fixed length, left-aligned for each item.

Letters: B batch, T tokens of a call, S slots read, G heads of a stream, D its width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnzoo_kernels.errors import ConfigError, ShapeError


@dataclass(frozen=True)
class Stream:
    """One kind of value that a layer remembers for each token: its heads, its width, and its dtype if it is fixed."""

    heads: int
    width: int
    dtype: torch.dtype | None = None


class KVCache:
    """Fixed buffers for the tokens that a layer has seen; made by ``layer.new_cache``.

    Slot s of an item holds its s-th real token. The buffers start as zeros and hold detached values: training through
    a cache reaches the current call's tokens only. Lengths that all items share are known on the host, so that
    nothing synchronises.

    Attributes:
        max_length: Tokens that fit, for each item.
        length: Tokens held by every item, where the host knows that it is one number; else ``None``.
        bound: A number of tokens that no item exceeds, known on the host.
    """

    def __init__(
        self,
        streams: Mapping[str, Stream],
        *,
        batch: int,
        max_length: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        owner: tuple[object, object] = (None, None),
        rounds: bool = False,
    ) -> None:
        for name, value, least in (("batch", batch, 0), ("max_length", max_length, 1)):
            if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
                raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
            if value < least:
                raise ShapeError(f"{name}: expected at least {least}, got {value}")
        self.max_length = max_length
        self.length: int | None = 0
        self.bound = 0
        self._lengths: Tensor | None = None
        self._owner, self._config = owner
        self._rounds = rounds
        with torch.inference_mode(False):
            # One slot more than fits: rows without a token are written there.
            self._buffers = {
                name: torch.zeros(
                    batch, stream.heads, max_length + 1, stream.width, device=device, dtype=stream.dtype or dtype
                )
                for name, stream in streams.items()
            }

    def __repr__(self) -> str:
        streams = ", ".join(f"{name} {list(x.shape)}" for name, x in self.streams.items())
        held = self.length if self.length is not None else f"up to {self.bound}"
        return f"{type(self).__name__}({held} of {self.max_length} tokens: {streams})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.fork()

    @property
    def streams(self) -> dict[str, Tensor]:
        """The buffers by name, each ``[B, G, max_length, D]``."""
        return {name: x[:, :, : self.max_length] for name, x in self._buffers.items()}

    @property
    def batch(self) -> int:
        """Items B."""
        return next(iter(self._buffers.values())).shape[0]

    @property
    def device(self) -> torch.device:
        """Where the buffers lie."""
        return next(iter(self._buffers.values())).device

    @property
    def lengths(self) -> Tensor:
        """Tokens held, int64 ``[B]``."""
        if self._lengths is not None:
            return self._lengths
        return torch.full((self.batch,), self.bound, dtype=torch.int64, device=self.device)

    @property
    def offset(self) -> int | Tensor:
        """Tokens held: an int where the host knows that all items share it, else int64 ``[B]``."""
        return self.lengths if self.length is None else self.length

    @property
    def bytes_per_token(self) -> int:
        """Bytes held for each token of an item."""
        return sum(x.shape[1] * x.shape[3] * x.element_size() for x in self._buffers.values())

    def check(self, owner: tuple[object, object], batch: int, device: torch.device) -> None:
        """Raises unless the cache belongs to this layer and fits its input.

        Raises:
            ConfigError: If another layer, or one of another configuration, made it.
            ShapeError: If batch or device differ.
        """
        # A compiler that takes numbers for variables cannot compare configurations that hold floats.
        if self._owner is not owner[0] or not (self._config is owner[1] or self._config == owner[1]):
            raise ConfigError("cache: expected one that this layer's new_cache made, got the cache of another layer")
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
        differ = isinstance(lengths, Tensor) or self._lengths is not None
        if differ and self.batch and not torch.compiler.is_compiling():
            longest = int((self.lengths + lengths).max())
        if longest > self.max_length:
            raise ShapeError(f"cache: expected at most max_length {self.max_length} tokens, got {longest}")

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Forgets what the block appended if it raises."""
        before = self.length, self.bound, self._lengths
        try:
            yield
        except BaseException:
            self.length, self.bound, self._lengths = before
            self._clear_behind()
            raise

    def append(self, values: Mapping[str, Tensor], lengths: int | Tensor, *, differentiable: bool) -> dict[str, Tensor]:
        """Writes a call's tokens behind those held and gives back everything that may be read.

        Args:
            values: For each stream ``[B, G, T, D]``, left-aligned.
            lengths: Real tokens of each item; T as an int where there are no others.
            differentiable: Whether to give copies, with the current tokens in the graph, instead of the buffers.

        Returns:
            For each stream ``[B, G, S, D]`` in the dtype of its value, S the new bound.
        """
        tokens = self._check_values(values)
        self.check_room(tokens, lengths)
        if self.length is not None and not isinstance(lengths, Tensor):
            seen = self._append_common(values, self.length, differentiable)
            self.length += tokens
            self.bound = self.length
            return seen
        before = self.lengths
        self.bound = min(self.bound + tokens, self.max_length)
        seen = self._append_ragged(values, before, lengths, differentiable)
        self._lengths, self.length = before + lengths, None
        return seen

    def grow(self, max_length: int) -> None:
        """Makes room for more tokens of each item; what is held stays.

        Raises:
            ShapeError: If that would be less room than there is.
        """
        if max_length < self.max_length:
            raise ShapeError(f"max_length: expected at least {self.max_length}, got {max_length}")
        more = max_length - self.max_length
        with torch.inference_mode(False), torch.no_grad():
            # The last slot takes rows without a token: what was written there is no token's.
            self._buffers = {
                name: pad(x[:, :, : self.max_length], (0, 0, 0, more + 1)) for name, x in self._buffers.items()
            }
        self.max_length = max_length

    def crop(self, length: int | Tensor) -> None:
        """Keeps the first tokens of every item: at most ``length``, which is int64 ``[B]`` where items differ.

        Raises:
            TypeError: If ``length`` is neither.
            ShapeError: If it is negative, or not one number for each item.
        """
        if isinstance(length, Tensor):
            self._crop_each(length)
            return
        if isinstance(length, bool) or not isinstance(length, int):
            raise TypeError(f"length: expected an int, got {type(length).__name__}")
        if length < 0:
            raise ShapeError(f"length: expected at least 0, got {length}")
        if self._lengths is not None:
            self._lengths = self._lengths.clamp(max=length)
        else:
            self.length = min(self.bound, length)
        self.bound = min(self.bound, length)
        self._clear_behind()
        if self.bound == 0:
            self._lengths, self.length = None, 0

    def _crop_each(self, length: Tensor) -> None:
        if list(length.shape) != [self.batch] or length.dtype != torch.int64:
            raise ShapeError(f"length: expected int64 [{self.batch}], got {length.dtype} {list(length.shape)}")
        least, most = (int(x) for x in length.aminmax()) if self.batch else (0, 0)
        if least < 0:
            raise ShapeError(f"length: expected at least 0, got {least}")
        self._lengths, self.length = torch.minimum(self.lengths, length.to(self.device)), None
        self.bound = min(self.bound, most)
        self._clear_behind()
        if self.bound == 0:
            self._lengths, self.length = None, 0

    def _clear_behind(self) -> None:
        """Zeroes the slots behind what is held: where lengths differ they are handed on, and may hold NaN."""
        behind = torch.arange(self.max_length + 1, device=self.device) >= self.lengths.unsqueeze(1)
        with torch.no_grad():
            for x in self._buffers.values():
                x.masked_fill_(behind[:, None, :, None], 0)

    def reorder(self, index: Tensor) -> None:
        """Takes the items ``index``, int ``[B']``, in their order: beams are chosen, repeated or dropped."""
        if not isinstance(index, Tensor) or index.dim() != 1 or index.dtype not in (torch.int64, torch.int32):
            raise ShapeError(f"index: expected an int64 Tensor [B], got {getattr(index, 'shape', index)}")
        with torch.inference_mode(False), torch.no_grad():
            index = index.to(self.device, copy=True)
            self._buffers = {name: x.index_select(0, index) for name, x in self._buffers.items()}
            if self._lengths is not None:
                self._lengths = self._lengths.index_select(0, index)

    def fork(self) -> Self:
        """A copy of its own, for the same layer."""
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__)
        with torch.inference_mode(False), torch.no_grad():
            copy._buffers = {name: x.clone() for name, x in self._buffers.items()}
        return copy

    def _check_values(self, values: Mapping[str, Tensor]) -> int:
        if set(values) != set(self._buffers):
            raise ShapeError(f"values: expected streams {sorted(self._buffers)}, got {sorted(values)}")
        for name, value in values.items():
            held = self._buffers[name]
            if value.shape[:2] != held.shape[:2] or value.shape[3:] != held.shape[3:]:
                shape = [*held.shape[:2], "T", *held.shape[3:]]
                raise ShapeError(f"cache: expected {name} {shape}, got {list(value.shape)}")
            if not self._rounds and torch.promote_types(value.dtype, held.dtype) != held.dtype:
                raise ShapeError(f"cache: expected {name} in {held.dtype} or narrower, got {value.dtype}")
        return next(iter(values.values())).shape[2]

    def _append_common(self, values: Mapping[str, Tensor], start: int, differentiable: bool) -> dict[str, Tensor]:
        seen = {}
        for name, value in values.items():
            held, end = self._buffers[name], start + value.shape[2]
            with torch.no_grad():
                held[:, :, start:end].copy_(value)
            past = held[:, :, :start].to(value.dtype)
            seen[name] = torch.cat((past, value), 2) if differentiable else held[:, :, :end].to(value.dtype)
        return seen

    def _append_ragged(
        self, values: Mapping[str, Tensor], before: Tensor, lengths: int | Tensor, differentiable: bool
    ) -> dict[str, Tensor]:
        tokens = next(iter(values.values())).shape[2]
        device = self.device
        token = torch.arange(tokens, device=device)
        last = lengths.unsqueeze(1) if isinstance(lengths, Tensor) else lengths
        slot = torch.where(token < last, before.unsqueeze(1) + token, self.bound)  # [B, T]
        item = torch.arange(before.shape[0], device=device).unsqueeze(1)
        seen = {}
        for name, value in values.items():
            held = self._buffers[name]
            rows = value.transpose(1, 2)  # [B, T, G, D]
            if differentiable:
                copy = held[:, :, : self.bound + 1].to(value.dtype, copy=True).transpose(1, 2)
                seen[name] = copy.index_put((item, slot), rows).transpose(1, 2)[:, :, : self.bound]
            with torch.no_grad():
                held.transpose(1, 2).index_put_((item, slot), rows.detach().to(held.dtype))
            if not differentiable:
                seen[name] = held[:, :, : self.bound].to(value.dtype)
        return seen
