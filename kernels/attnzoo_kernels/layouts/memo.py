"""What follows from a layout and a rule without tensors, remembered while the layout lives and there is room."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor

from attnzoo_kernels.runtime.store import Shelf
from attnzoo_kernels.spec.call import Call


class Lists(Protocol):
    """What holds a layout's lists: a call or the layout itself."""

    @property
    def start(self) -> Tensor:
        """int32 ``[B|1, h, M]``."""

    @property
    def count(self) -> Tensor:
        """int32, as ``start``."""

    @property
    def col(self) -> Tensor:
        """int32 ``[cap]``."""

    @property
    def block_k(self) -> int:
        """Slots in a key block."""


Value = TypeVar("Value")
Given = TypeVar("Given", bound=Lists)

MOST = 4096
"""Values remembered, of all layouts; their bytes are bounded by the store."""


@dataclass(frozen=True)
class _Remembered:
    col: weakref.ref[Tensor]
    start: weakref.ref[Tensor]
    count: weakref.ref[Tensor]
    origin: weakref.ref[Tensor] | None
    versions: tuple[int, ...]
    value: Any

    def is_of(self, lists: Lists, origin: Tensor | None) -> bool:
        """Whether it was made from these very tensors."""
        known = None if self.origin is None else self.origin()
        same = self.col() is lists.col and self.start() is lists.start and self.count() is lists.count
        return same and known is origin and self.versions == _versions(lists, origin)


_memo: Shelf[_Remembered] = Shelf(MOST)


def _versions(lists: Lists, origin: Tensor | None) -> tuple[int, ...]:
    """How often the lists were written to; inference tensors do not count."""
    held = (lists.col, lists.start, lists.count) if origin is None else (lists.col, lists.start, lists.count, origin)
    return tuple([-1 if x.is_inference() else x._version for x in held])


def remembered(call: Call, build: Callable[[Call], Value]) -> Value:
    """``build(call)``, remembered for as long as the layout lives and there is room, where the rule holds no tensors.

    ``build`` must depend on the layout, the rule and the sizes alone.
    """
    if not call.rule.is_static:
        return build(call)
    rule = call.rule
    key = (
        id(call.col),
        build,
        *call.shape,
        call.block_q,
        call.block_k,
        rule.causal,
        rule.window,
        rule.sink,
        rule.packed,
        call.origins is None,
    )
    origin = None if call.origins is None else call.origins.of_entry
    return _recalled(call, origin, key, build)


def remembered_of_lists(lists: Given, build: Callable[[Given], Value]) -> Value:
    """``build(lists)``, remembered as long: layouts of other lengths that share their lists share it.

    ``build`` must depend on start, count, col and the block size of the keys alone.
    """
    return _recalled(lists, None, (id(lists.col), build, lists.block_k), build)


def _recalled(lists: Given, origin: Tensor | None, key: tuple[Hashable, ...], build: Callable[[Given], Value]) -> Value:
    found = _memo.get(key)
    if found is not None and found.is_of(lists, origin):
        value: Value = found.value
        return value
    value = build(lists)
    # Not the module's name: layouts may outlive the module when the interpreter ends.
    shelf = _memo

    def forget(dead: weakref.ref[Tensor]) -> None:
        # Another layout may have its place by now.
        there = shelf.records.get(key)
        if there is not None and there.value.col is dead:
            shelf.drop(key)

    # Threads may race here: the last writer wins, with an equal value.
    known = (weakref.ref(lists.col, forget), weakref.ref(lists.start), weakref.ref(lists.count))
    of_entry = None if origin is None else weakref.ref(origin)
    _memo.put(key, _Remembered(*known, of_entry, _versions(lists, origin), value))
    return value
