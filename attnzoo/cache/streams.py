"""What a cache holds beside one value for each token: the last tokens' values, and one value for a group of tokens.

Letters: B batch, T tokens of a call, R tokens that a ring holds, N groups, h heads of a stream, D its width.
"""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnzoo.cache.lengths import Lengths
from attnzoo_kernels.errors import ConfigError

CROP_MARGIN = 128
"""Tokens that may be cropped from a ring and still leave its whole history, however long the sequence is."""


@dataclass(frozen=True)
class Stream:
    """One kind of value that a layer remembers: its heads, its width, and its dtype if it is fixed.

    Attributes:
        heads: Heads h.
        width: Width D.
        dtype: Of the values; ``None`` means the cache's.
        ring: Keeps the values of the last tokens only: those of so many can always be read, and ``CROP_MARGIN`` more
            tokens are held, so that they may be cropped. ``None`` keeps every token's.
        every: One value for each complete group of so many tokens; ``None`` keeps one for each token.
        offloaded: Keeps the values in CPU memory, pinned where the cache is on a GPU; only for values of each token.

    Raises:
        ConfigError: If ``ring`` or ``every`` does not fit, or they exclude each other.
    """

    heads: int
    width: int
    dtype: torch.dtype | None = None
    ring: int | None = None
    every: int | None = None
    offloaded: bool = False

    def __post_init__(self) -> None:
        for name, value in (("ring", self.ring), ("every", self.every)):
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigError(f"{name}: expected an int >= 1 or None, got {value!r}")
        if self.ring is not None and self.every is not None:
            raise ConfigError(f"ring: expected None beside every {self.every}, got {self.ring}")
        if self.offloaded and (self.ring is not None or self.every is not None):
            raise ConfigError("offloaded: expected False for a ring or a grouped stream, got True")


def check_count(name: str, value: object) -> None:
    """Raises unless an argument of a call is an int.

    Raises:
        TypeError: Naming the argument.
    """
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")


def fits(value: torch.dtype, held: torch.dtype) -> bool:
    """Whether a buffer can hold values without rounding them: as it is, or by taking up their dtype."""
    return torch.promote_types(value, held) == held or (value.is_floating_point and held.is_floating_point)


def widened(held: Tensor, dtype: torch.dtype) -> Tensor:
    """A buffer whose dtype loses nothing of either; the buffer itself where it is wide enough."""
    wide = torch.promote_types(held.dtype, dtype)
    return held if wide == held.dtype else held.to(wide)


class Ring:
    """The values of each item's last tokens: token s lies at row ``s % R``.

    Attributes:
        history: Tokens whose values can be read in any case.
        rows: Tokens held, R.
        values: ``[B, h, R + 1, D]``; rows without a token are written to the last one.
        oldest: The first token whose value is held, an int or int64 ``[B]``.
    """

    def __init__(self, history: int, values: Tensor, margin: int | None = None) -> None:
        self.history = history
        self._margin = margin
        self.rows = values.shape[2] - 1
        self.values = values
        self.oldest: int | Tensor = 0

    @property
    def margin(self) -> int:
        """Tokens that may be cropped and still leave the whole history."""
        return CROP_MARGIN if self._margin is None else self._margin

    @staticmethod
    def length_for(history: int, max_length: int) -> int:
        """Tokens that a ring holds; as many as there can be, it never forgets any."""
        return min(history + CROP_MARGIN, max_length)

    def write(self, value: Tensor, before: int | Tensor, lengths: int | Tensor) -> None:
        """Writes a call's tokens ``[B, h, T, D]`` behind the ``before`` tokens held."""
        if torch.compiler.is_compiling():
            # One program for all lengths: whether the ring comes round is not asked.
            self._write_ragged(value, before, lengths)
            return
        tokens = value.shape[2]
        if tokens > self.margin and self.rows == self.history + self.margin:
            # The history would be overwritten, and is needed again if the call fails: see restore.
            with torch.inference_mode(False):
                self.values = self.values.clone()
        held = Lengths(before).shared
        if held is None or Lengths(lengths).differ:
            self._write_ragged(value, before, lengths)
            return
        first = max(0, tokens - self.rows)
        begin = (held + first) % self.rows
        if begin + tokens - first <= self.rows:
            self.values[:, :, begin : begin + tokens - first].copy_(value[:, :, first:])
        else:
            row = torch.arange(held + first, held + tokens, device=value.device) % self.rows
            self.values.index_copy_(2, row, value[:, :, first:].to(self.values.dtype))
        self.oldest = self._later(held + tokens - self.rows)

    def _write_ragged(self, value: Tensor, before: int | Tensor, lengths: int | Tensor) -> None:
        batch, _, tokens, _ = value.shape
        token = torch.arange(tokens, device=value.device)
        count = Lengths(lengths)
        kept = count.holds(token) & (token >= count.column() - self.rows)
        row = torch.where(kept, (Lengths(before).column() + token) % self.rows, self.rows).expand(batch, -1)  # [B, T]
        item = torch.arange(batch, device=value.device).unsqueeze(1)
        self.values.transpose(1, 2).index_put_((item, row), value.transpose(1, 2).to(self.values.dtype))
        self.oldest = self._later(before + lengths - self.rows)

    def _later(self, token: int | Tensor) -> int | Tensor:
        return Lengths(token).maximum(Lengths(self.oldest)).value

    def last(self, count: int, length: int | Tensor) -> Tensor:
        """The values of the ``count`` tokens before token ``length``, ``[B, h, count, D]``; zeros before the first."""
        back = torch.arange(-count, 0, device=self.values.device)
        token = Lengths(length).column() + back  # [count] or [B, count]
        shared = Lengths(length).shared
        if shared is not None:
            seen = self.values.index_select(2, token % self.rows)
            return seen if shared >= count else seen.masked_fill((token < 0).view(1, 1, -1, 1), 0)
        row = (token % self.rows)[:, None, :, None].expand(-1, self.values.shape[1], -1, self.values.shape[3])
        return self.values.gather(2, row).masked_fill((token < 0)[:, None, :, None], 0)

    def write_one(self, value: Tensor, token: int) -> None:
        """As :meth:`write`, of one token ``[B, h, 1, D]`` of each item, behind as many as that."""
        self.values.narrow(2, token % self.rows, 1).copy_(value)
        if token >= self.rows:
            self.oldest = self._later(token + 1 - self.rows)

    def recent(self, count: int, length: int | Tensor) -> Tensor:
        """As :meth:`last`; a view where all items have so many tokens, and these lie together."""
        shared = Lengths(length).shared
        if shared is None or shared < count or (shared - count) % self.rows + count > self.rows:
            return self.last(count, length)
        return self.values.narrow(2, (shared - count) % self.rows, count)

    def can_crop(self, before: int | Tensor, after: int | Tensor) -> bool:
        """Whether the history of the ``after`` tokens that are left is still held; reads values where items differ."""
        held = Lengths(before).shared
        left = Lengths(after).shared
        oldest = Lengths(self.oldest).shared
        if held is not None and left is not None and oldest is not None:
            return left in (held, 0) or oldest <= max(left - self.history, 0)
        kept = torch.as_tensor(after, device=self.values.device)
        reaches = (kept - self.history).clamp(min=0) >= self.oldest
        return bool((reaches | (kept == before) | (kept == 0)).all())

    def crop(self, after: int | Tensor) -> None:
        """Forgets the tokens from ``after`` on."""
        self.oldest = Lengths(self.oldest).minimum(Lengths(after)).value

    def state(self) -> tuple[Tensor, int | Tensor]:
        """What :meth:`restore` needs to forget what is written from here on."""
        return self.values, self.oldest

    def restore(self, state: tuple[Tensor, int | Tensor]) -> None:
        """Forgets what was written since: the history is as it was, and what was overwritten shortens the margin."""
        values, oldest = state
        if values is not self.values:
            self.values = values
            self.oldest = oldest

    def return_to(self, state: tuple[Tensor, int | Tensor]) -> None:
        """Is what :meth:`state` said, for who puts back what was overwritten."""
        self.values, self.oldest = state

    def load(self, value: Tensor, length: int | Tensor, oldest: int | Tensor) -> None:
        """Holds ``value [B, h, n, D]`` as the last n of ``length`` tokens; those from ``oldest`` on are known."""
        token = torch.arange(-value.shape[2], 0, device=self.values.device)
        token = token + Lengths(length).column()
        row = torch.where(token < 0, self.rows, token % self.rows).expand(value.shape[0], -1)  # [B, n]
        item = torch.arange(value.shape[0], device=self.values.device).unsqueeze(1)
        self.values.zero_()
        self.values.transpose(1, 2).index_put_((item, row), value.transpose(1, 2).to(self.values))
        self.oldest = oldest

    def select(self, index: Tensor) -> Self:
        """The items ``index``, in a ring of their own."""
        return self._with(
            self.values.index_select(0, index),
            Lengths(self.oldest).select(index).value,
        )

    def clone(self) -> Self:
        """A copy of its own."""
        return self._with(self.values.clone(), self.oldest)

    def _with(self, values: Tensor, oldest: int | Tensor) -> Self:
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__)
        copy.values = values
        copy.oldest = oldest
        return copy


class Groups:
    """One value for each complete group of ``every`` tokens of an item: group g of tokens ``g * every`` onwards.

    Attributes:
        every: Tokens in a group.
        values: ``[B, h, N + 1, D]``, zeros where the group is not complete; rows without one are written to the last.
    """

    def __init__(self, every: int, values: Tensor) -> None:
        self.every = every
        self.values = values

    def write(self, value: Tensor, before: int | Tensor, after: int | Tensor) -> None:
        """Writes ``value [B, h, P, D]`` at the groups from ``before // every`` on that ``after`` tokens complete."""
        batch, _, given, _ = value.shape
        begin = Lengths(before // self.every)
        end = Lengths(after // self.every)
        if begin.shared is not None and end.shared is not None:
            self.values[:, :, begin.shared : end.shared].copy_(value[:, :, : end.shared - begin.shared])
            return
        rows = torch.arange(given, device=value.device)
        first = torch.as_tensor(begin.column(), device=value.device)
        behind = torch.as_tensor(end.column(), device=value.device)
        last = self.values.shape[2] - 1
        group = torch.where(first + rows < behind, first + rows, last).expand(batch, -1)
        item = torch.arange(batch, device=value.device).unsqueeze(1)
        self.values.transpose(1, 2).index_put_((item, group), value.transpose(1, 2).to(self.values.dtype))

    def clear_behind(self, lengths: Tensor) -> None:
        """Zeroes the groups that ``lengths [B]`` tokens do not complete."""
        group = torch.arange(self.values.shape[2], device=self.values.device)
        self.values.masked_fill_((group >= (lengths // self.every).unsqueeze(1))[:, None, :, None], 0)


def zeros_on_cpu(shape: tuple[int, ...], *, device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
    """Zeros in CPU memory for a cache on a device; on no memory at all where the device has none."""
    near = torch.empty(0, device=device).device
    if near.type == "meta":
        return torch.zeros(shape, device=near, dtype=dtype)
    return torch.zeros(shape, device="cpu", dtype=dtype, pin_memory=near.type == "cuda")


LARGE = 2**20
"""Bytes from which room in CPU memory is a mapping of its own: a system has tens of thousands of these."""


def room_on_cpu(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor in CPU memory that holds anything; a large one goes back to the system when nobody holds it.

    Allocators keep what lies between other things, and rows that are let go of would stay with the process: behind a
    long prompt all layers' pools lie among temporaries.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < LARGE:
        return torch.empty(tuple(shape), dtype=dtype, device="cpu")
    # Private: a process that is forked writes to its own.
    private = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
    return torch.frombuffer(mmap.mmap(-1, size, **private), dtype=dtype).view(tuple(shape))


def fetched(x: Tensor, device: torch.device) -> Tensor:
    """What was gathered in CPU memory, on a device."""
    if x.device == device:
        return x
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def row_bytes(x: Tensor) -> int:
    """Bytes of one token's values in a buffer ``[B, h, n, D]``."""
    return x.shape[1] * x.shape[3] * x.element_size()


def with_rows(x: Tensor, rows: int) -> Tensor:
    """A buffer ``[B, h, n + 1, D]`` with so many rows; the last one, beside them, takes rows without a token."""
    return pad(x[:, :, :-1], (0, 0, 0, rows + 2 - x.shape[2]))
