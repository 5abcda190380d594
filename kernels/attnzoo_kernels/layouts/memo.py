"""What follows from a layout and a rule without tensors, remembered while the layout lives and there is room."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from attnzoo_kernels.runtime.store import Shelf
from attnzoo_kernels.spec.call import Call

Value = TypeVar("Value")

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

    def is_of(self, call: Call) -> bool:
        """Whether it was made from these very tensors."""
        origin = None if self.origin is None else self.origin()
        wanted = None if call.origins is None else call.origins.of_entry
        lists = self.col() is call.col and self.start() is call.start and self.count() is call.count
        return lists and origin is wanted and self.versions == _versions(call)


_memo: Shelf[_Remembered] = Shelf(MOST)


def _versions(call: Call) -> tuple[int, ...]:
    """How often the lists were written to; inference tensors do not count."""
    lists = (call.col, call.start, call.count, *((call.origins.of_entry,) if call.origins is not None else ()))
    return tuple(-1 if x.is_inference() else x._version for x in lists)


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
    found = _memo.get(key)
    if found is not None and found.is_of(call):
        value: Value = found.value
        return value
    value = build(call)
    # Not the module's name: layouts may outlive the module when the interpreter ends.
    shelf = _memo

    def forget(dead: weakref.ref[Tensor]) -> None:
        # Another layout may have its place by now.
        there = shelf.records.get(key)
        if there is not None and there.value.col is dead:
            shelf.drop(key)

    # Threads may race here: the last writer wins, with an equal value.
    origin = None if call.origins is None else weakref.ref(call.origins.of_entry)
    lists = (weakref.ref(call.col, forget), weakref.ref(call.start), weakref.ref(call.count))
    _memo.put(key, _Remembered(*lists, origin, _versions(call), value))
    return value
