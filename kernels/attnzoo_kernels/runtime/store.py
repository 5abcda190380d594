"""What is remembered between calls: one store for the process, bounded by bytes, the least recently used goes first.

No lock is held. Threads that make the same value at once put equal values, and the last one stays; a value that goes
while somebody computes with it lives as long as that takes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator
from dataclasses import fields, is_dataclass
from functools import update_wrapper
from typing import Any, Generic, ParamSpec, TypeVar

from torch import Tensor

DEFAULT_LIMIT = 256 << 20
OF_OBJECT = 1024
"""Bytes of a tensor beside its memory, or of a record, about."""
OF_NUMBER = 40
"""Bytes of a number in a list."""

Value = TypeVar("Value")
P = ParamSpec("P")

_clock = itertools.count()
_shelves: list[Shelf[Any]] = []


class _Budget:
    """Bytes that may be held, and about how many are left."""

    limit = DEFAULT_LIMIT
    room = DEFAULT_LIMIT


class _Record(Generic[Value]):
    """A value, and when it was last asked for."""

    __slots__ = ("used", "value")

    def __init__(self, value: Value) -> None:
        self.value = value
        self.used = next(_clock)


class Shelf(Generic[Value]):
    """Values of one kind by key, at most so many; all shelves together are bounded by bytes.

    Args:
        most: Values held.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.records: dict[Hashable, _Record[Value]] = {}
        _shelves.append(self)

    def get(self, key: Hashable) -> Value | None:
        """The value of a key, or ``None``."""
        record = self.records.get(key)
        if record is None:
            return None
        record.used = next(_clock)
        return record.value

    def put(self, key: Hashable, value: Value) -> None:
        """Remembers a value, unless it alone is beyond the limit; what was not used for longest goes."""
        self.records.pop(key, None)
        size = bytes_of(value)
        if size > _Budget.limit:
            return
        self.records[key] = _Record(value)
        if len(self.records) > self.most:
            # An eighth at a time: to look for the oldest at every call would take longer than to make some values.
            by_age = sorted(self.records.items(), key=lambda item: item[1].used)
            for old, _ in by_age[: max(1, self.most // 8)]:
                self.records.pop(old, None)
        note_growth(size)

    def drop(self, key: Hashable) -> None:
        """Forgets a key."""
        self.records.pop(key, None)


class _Remembering(Generic[P, Value]):
    """A function whose results are remembered by its arguments."""

    def __init__(self, function: Callable[P, Value], most: int) -> None:
        self.function = function
        self.shelf: Shelf[Value] = Shelf(most)
        update_wrapper(self, function)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Value:
        key = (args, tuple(sorted(kwargs.items())))
        value = self.shelf.get(key)
        if value is None:
            value = self.function(*args, **kwargs)
            self.shelf.put(key, value)
        return value

    def cache_clear(self) -> None:
        """Forgets every result."""
        self.shelf.records.clear()


def remembers(most: int) -> Callable[[Callable[P, Value]], _Remembering[P, Value]]:
    """Remembers a function's results by its arguments, as ``functools.lru_cache``, within the store's bound of bytes.

    For functions of hashable arguments whose results nobody changes, such as layouts and tables that layers share.

    Args:
        most: Results held; fewer where the bytes of all that is remembered would go beyond the limit.
    """
    return lambda function: _Remembering(function, most)


def note_growth(size: int) -> None:
    """Notes that a value that may be held has grown by so many bytes; makes room where there is none."""
    _Budget.room -= size
    if _Budget.room < 0:
        _fit()


def _fit() -> None:
    """Drops what was not used for longest until the rest is within the limit; looks at what everything takes by now."""
    held = [(record.used, shelf, key, record) for shelf in _shelves for key, record in list(shelf.records.items())]
    total = 0
    for _, shelf, key, record in sorted(held, key=lambda item: item[0], reverse=True):
        size = bytes_of(record.value)
        if total + size > _Budget.limit:
            shelf.drop(key)
        else:
            total += size
    _Budget.room = _Budget.limit - total


def bytes_of(value: Any) -> int:
    """About the bytes that a value keeps: its tensors, each piece of memory once, and the lists of numbers in it."""
    pieces: dict[int, int] = {}
    return OF_OBJECT + sum(_objects(value, pieces)) + sum(pieces.values())


def _objects(value: Any, pieces: dict[int, int]) -> Iterator[int]:
    """Bytes of the objects that a value is made of; notes the memory of its tensors by address."""
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        pieces[storage.data_ptr() if storage.nbytes() else id(value)] = storage.nbytes()
        yield OF_OBJECT
    elif isinstance(value, dict):
        yield OF_OBJECT
        for item in list(value.values()):
            yield from _objects(item, pieces)
    elif isinstance(value, list | tuple | set):
        if value and isinstance(next(iter(value)), int | float):
            yield OF_NUMBER * len(value)
            return
        yield OF_NUMBER * len(value)
        for item in value:
            yield from _objects(item, pieces)
    elif is_dataclass(value) and not isinstance(value, type):
        yield OF_OBJECT
        # What a dataclass has computed of itself lies beside its fields.
        held = getattr(value, "__dict__", None) or {field.name: getattr(value, field.name) for field in fields(value)}
        for item in list(held.values()):
            yield from _objects(item, pieces)


def memory_held() -> int:
    """About the bytes that are remembered between calls in this process, scratch memory of threads left aside."""
    return sum(bytes_of(record.value) for shelf in _shelves for record in list(shelf.records.values()))


def memory_limit() -> int:
    """The bytes that may be remembered between calls."""
    return _Budget.limit


def set_memory_limit(most: int) -> None:
    """Bounds the bytes that are remembered between calls, in this process; frees what is beyond at once.

    Args:
        most: Bytes; 0 remembers nothing. A single value beyond it (a long call's schedule) is made anew at each call.

    Raises:
        TypeError: If it is no int.
        ValueError: If it is negative.
    """
    if isinstance(most, bool) or not isinstance(most, int):
        raise TypeError(f"most: expected an int, got {type(most).__name__}")
    if most < 0:
        raise ValueError(f"most: expected at least 0 bytes, got {most}")
    _Budget.limit = most
    _fit()


def forget() -> None:
    """Forgets everything on every shelf."""
    for shelf in _shelves:
        shelf.records.clear()
    _Budget.room = _Budget.limit
