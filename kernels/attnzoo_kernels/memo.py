"""What follows from a layout and a rule without tensors, remembered for as long as the layout lives."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from attnzoo_kernels.call import Call

Value = TypeVar("Value")

MOST_RULES = 16
"""Values remembered for one layout."""

_memo: WeakIdKeyDictionary = WeakIdKeyDictionary()


@dataclass(frozen=True)
class _Remembered:
    start: weakref.ref[Tensor]
    count: weakref.ref[Tensor]
    origin: weakref.ref[Tensor] | None
    versions: tuple[int, ...]
    value: Any

    def is_of(self, call: Call) -> bool:
        """Whether it was made from these very tensors."""
        origin = None if self.origin is None else self.origin()
        wanted = None if call.origins is None else call.origins.of_entry
        same = self.start() is call.start and self.count() is call.count and origin is wanted
        return same and self.versions == _versions(call)


def _versions(call: Call) -> tuple[int, ...]:
    """How often the lists were written to; inference tensors do not count."""
    lists = (call.col, call.start, call.count, *((call.origins.of_entry,) if call.origins is not None else ()))
    return tuple(-1 if x.is_inference() else x._version for x in lists)


def remembered(call: Call, build: Callable[[Call], Value]) -> Value:
    """``build(call)``, remembered for as long as the layout lives where the rule holds no tensors.

    ``build`` must depend on the layout, the rule and the sizes alone.
    """
    if not call.rule.is_static:
        return build(call)
    rule = call.rule
    key = (
        build,
        *call.shape,
        call.block_q,
        call.block_k,
        rule.causal,
        rule.window,
        rule.sink,
        rule.fold,
        call.origins is None,
    )
    known = _memo.get(call.col)
    found: _Remembered | None = known.get(key) if known is not None else None
    if found is not None and found.is_of(call):
        value: Value = found.value
        return value
    value = build(call)
    # Threads may race here: the last writer wins, with an equal value.
    origin = None if call.origins is None else weakref.ref(call.origins.of_entry)
    new = _Remembered(weakref.ref(call.start), weakref.ref(call.count), origin, _versions(call), value)
    rules = _memo.setdefault(call.col, {})
    if len(rules) >= MOST_RULES:
        rules.clear()
    rules[key] = new
    return value
