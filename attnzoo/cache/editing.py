"""Changing what a cache holds other than by a call: more room, fewer tokens, other items, a copy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from attnzoo.cache.lengths import Lengths
from attnzoo.cache.replay import Birth
from attnzoo.cache.state import CarriedCache
from attnzoo.cache.streams import CROP_MARGIN, Groups, Ring, check_count, with_rows
from attnzoo_kernels.errors import ShapeError


class EditableCache(CarriedCache):
    """The edits of a cache."""

    _offloaded: frozenset[str]
    _born: Birth

    if TYPE_CHECKING:

        @property
        def lengths(self) -> Tensor:
            """Tokens held, int64 ``[B]``."""

        @property
        def offset(self) -> int | Tensor:
            """Tokens held: an int where it is known that all items share it, else int64 ``[B]``."""

    def _check_growth(self, max_length: int) -> None:
        check_count("max_length", max_length)
        if max_length < self.max_length:
            raise ShapeError(f"max_length: expected at least {self.max_length}, got {max_length}")

    def grow(self, max_length: int) -> None:
        """Makes room for more tokens of each item; what is held stays.

        Raises:
            TypeError: If ``max_length`` is no int.
            ShapeError: If that would be less room than there is.
        """
        self._check_growth(max_length)
        with torch.inference_mode(False), torch.no_grad():
            self._buffers = self._as_placed({name: with_rows(x, max_length) for name, x in self._buffers.items()})
            for ring in self._rings.values():
                # A ring that is shorter than its margin has never come round: its rows are tokens.
                ring.rows = Ring.length_for(ring.history, max_length)
                ring.values = with_rows(ring.values, ring.rows)
            for groups in self._groups.values():
                groups.values = with_rows(groups.values, max_length // groups.every)
        self.max_length = max_length

    def crop(self, length: int | Tensor) -> None:
        """Keeps the first tokens of every item: at most ``length``, which is int64 ``[B]`` where items differ.

        Raises:
            TypeError: If ``length`` is neither.
            ShapeError: If it is negative, or not one number for each item, or a ring no longer holds the history of
                what would be left: at most ``CROP_MARGIN`` tokens may be cropped from a cache with rings, or all.
                Nothing is changed then.
        """
        most = self._check_crop(length)
        before = self.offset
        left = Lengths(before).minimum(Lengths(length).to(self.device))
        after = left.value
        for name, ring in self._rings.items():
            if not ring.can_crop(before, after):
                raise ShapeError(
                    f"length: expected at most {CROP_MARGIN} tokens to be cropped, or all, since {name} keeps only "
                    f"the last ones, got {length} of {self.bound}"
                )
        for ring in self._rings.values():
            ring.crop(after)
        self._count_left(left, most)
        self._clear_behind()

    def _count_left(self, left: Lengths, most: int) -> None:
        """Counts what a crop leaves, to any item at most so many tokens."""
        self.length = left.shared
        self._lengths = left.each
        self.bound = min(self.bound, most)
        if self.bound == 0:
            self._lengths = None
            self.length = 0

    def _check_crop(self, length: int | Tensor) -> int:
        """The most tokens that a crop leaves to any item."""
        if isinstance(length, Tensor):
            if list(length.shape) != [self.batch] or length.dtype != torch.int64:
                raise ShapeError(f"length: expected int64 [{self.batch}], got {length.dtype} {list(length.shape)}")
            least, most = (int(x) for x in length.aminmax()) if self.batch else (0, 0)
        else:
            check_count("length", length)
            least = most = length
        if least < 0:
            raise ShapeError(f"length: expected at least 0, got {least}")
        return most

    def _clear_behind(self) -> None:
        """Zeroes the slots behind what is held: where lengths differ they are handed on, and may hold NaN."""
        behind = torch.arange(self.max_length + 1, device=self.device) >= self.lengths.unsqueeze(1)
        with torch.no_grad():
            for x in self._buffers.values():
                x.masked_fill_(behind[:, None, :, None].to(x.device), 0)
            for groups in self._groups.values():
                groups.clear_behind(self.lengths)

    def reorder(self, index: Tensor) -> None:
        """Takes the items ``index``, int ``[B']``, in their order: beams are chosen, repeated or dropped."""
        self._check_items(index)
        with torch.inference_mode(False), torch.no_grad():
            index = index.to(self.device, copy=True)
            chosen = {name: x.index_select(0, index.to(x.device)) for name, x in self._buffers.items()}
            self._buffers = self._as_placed(chosen)
            self._rings = {name: x.select(index) for name, x in self._rings.items()}
            self._groups = {name: Groups(x.every, x.values.index_select(0, index)) for name, x in self._groups.items()}
            if self._lengths is not None:
                self._lengths = self._lengths.index_select(0, index)

    def _check_items(self, index: Tensor) -> None:
        """Raises unless these are numbers of items; of a tensor elsewhere than on the CPU no value is read."""
        if not isinstance(index, Tensor):
            raise TypeError(f"index: expected an int64 Tensor [B], got {type(index).__name__}")
        if index.dim() != 1 or index.dtype not in (torch.int64, torch.int32):
            raise ShapeError(f"index: expected an int64 Tensor [B], got {index.dtype} {list(index.shape)}")
        if index.device.type == "cpu" and not torch.compiler.is_compiling():
            outside = (index < 0) | (index >= self.batch)
            if bool(outside.any()):
                raise ShapeError(f"index: expected items 0 to {self.batch - 1}, got {index[outside].tolist()}")

    def fork(self) -> Self:
        """A copy of its own, for the same layer."""
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__)
        copy._born = Birth(self.device)
        with torch.inference_mode(False), torch.no_grad():
            copy._buffers = self._as_placed({name: x.clone() for name, x in self._buffers.items()})
            copy._rings = {name: x.clone() for name, x in self._rings.items()}
            copy._groups = {name: Groups(x.every, x.values.clone()) for name, x in self._groups.items()}
        return copy

    def _as_placed(self, buffers: dict[str, Tensor]) -> dict[str, Tensor]:
        """New buffers, pinned where those that they take the place of are."""
        if not self._offloaded:
            return buffers
        return {name: x.pin_memory() if self._buffers[name].is_pinned() else x for name, x in buffers.items()}
