"""Every kind of cache that a registered variant makes: plain ones, and one for each switch of its ``new_cache``."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import attnzoo
from attnzoo.base.evicting.layer import PolicyLayer
from attnzoo.base.layer import AttentionLayer
from attnzoo.cache.kv_cache import KVCache
from tests.attnzoo.cases import Case


@dataclass(frozen=True)
class CacheKind:
    """A variant at its small size, and a switch of its caches."""

    name: str
    switch: str | None = None

    def __str__(self) -> str:
        return self.name if self.switch is None else f"{self.name}-{self.switch}"

    @property
    def case(self) -> Case:
        return Case(self.name, "small")

    def cache(self, layer: Any, batch: int, max_length: int, **options: Any) -> KVCache:
        if self.switch is not None:
            options[self.switch] = True
        cache: KVCache = layer.new_cache(batch, max_length, **options)
        return cache


def _kinds(name: str) -> list[CacheKind]:
    layer = type(Case(name, "small").layer())
    own = inspect.signature(layer.new_cache).parameters
    common = {*inspect.signature(AttentionLayer.new_cache).parameters}
    if issubclass(layer, PolicyLayer):
        # Without a policy nothing is offloaded; with one see tests/attnzoo/cache/pages/test_offloaded_pages.py.
        common.add("offload")
    return [CacheKind(name), *(CacheKind(name, switch) for switch in own if switch not in common)]


CACHE_KINDS = tuple(kind for name in attnzoo.list_variants() for kind in _kinds(name))
