"""A replacement's memory inside the cache of transformers: one cache layer, whatever streams the variant has.

The host counts slots, padding among them; a layer's own cache holds each item's real tokens alone. Both are kept here.

Letters: B batch, S slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from attnzoo.base.layer import AttentionLayer
from attnzoo.cache.kv_cache import KVCache
from attnzoo.cache.replay import current_backward, refuse_replay
from attnzoo.surgery.hosts.caches.growing import GrowingLayer, room_for
from attnzoo_kernels.errors import ShapeError, UnsupportedError


class ReplacementCacheLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """What one replacement remembers: a cache that its layer made, which grows as tokens come.

    Attributes:
        seen: Slots that the host counts.
        real: Which of them hold tokens, bool ``[B, S]``; ``None`` where all do.
        memory: The layer's cache; ``None`` before the first call.
        born: The backward that made it, see :mod:`attnzoo.cache.replay`.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = 0
        self.real: Tensor | None = None
        self.memory: KVCache | None = None
        self.born = current_backward()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.memory!r})"

    def room(self, layer: AttentionLayer, x: Tensor) -> KVCache:
        """The layer's cache, with room for some more tokens ``x [B, T, C]`` of each item."""
        needed = self.seen + x.shape[1]
        if self.memory is None:
            # Weights may lie elsewhere until they are called.
            self.memory = layer.new_cache(x.shape[0], room_for(needed), device=x.device)
            self.is_initialized = True
        elif needed > self.memory.max_length:
            self.memory.grow(room_for(needed))
        return self.memory

    def note(self, tokens: int, real: Tensor | None) -> None:
        """Counts the slots of a call that has been made."""
        self.seen += tokens
        self.real = real

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Does nothing: what lies here is the layer's affair."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refuses: keys and values of another block came here.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError(
            "past_key_values: expected a cache that this model has filled, got one that a converted model has filled"
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Slots that a call's mask has, and where they begin."""
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Slots held, padding among them."""
        return self.seen

    def get_max_length(self) -> int:
        """-1: there is no limit."""
        return -1

    def get_max_cache_shape(self) -> int:
        """The same, by the name that older versions of transformers ask for."""
        return -1

    def offload(self) -> None:
        """Does nothing: caches that offload are refused."""

    def prefetch(self) -> None:
        """Does nothing: caches that offload are refused."""

    def reset(self) -> None:
        """Forgets everything."""
        self.seen = 0
        self.real = None
        self.memory = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last ``-tokens_to_remove`` slots.

        Raises:
            ValueError: If the number is positive, as the host's own layers do; older ones take it for a length to keep.
        """
        if tokens_to_remove > 0 and not hasattr(CacheLayerMixin, "get_max_length"):
            tokens_to_remove = min(0, tokens_to_remove - self.get_seq_length())
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove: expected a negative number or 0, got {tokens_to_remove}")
        if tokens_to_remove and self.memory is not None:
            self.keep(self.memory, max(0, self.get_seq_length() + tokens_to_remove))

    def keep(self, memory: KVCache, left: int) -> None:
        """Keeps the first slots that the host counts."""
        real = None if self.real is None else self.real[:, :left]
        # Padding takes no room in the layer's cache: each item keeps its tokens among the slots that stay.
        memory.crop(left if real is None else real.sum(1))
        self.seen = left
        self.real = real if left else None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Takes the items of the chosen beams."""
        if self.memory is not None:
            self.memory.reorder(beam_idx)
            if self.real is not None:
                self.real = self.real.index_select(0, beam_idx.to(self.real.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every item."""
        if self.memory is not None:
            item = torch.arange(self.memory.batch, device=self.memory.device)
            self.reorder_cache(item.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some items."""
        if self.memory is not None:
            item = torch.arange(self.memory.batch, device=self.memory.device)
            self.reorder_cache(item[indices.to(item.device)])


def new_cache(config: Any) -> DynamicCache:
    """An empty cache that grows, as a host of this configuration makes it."""
    return DynamicCache(config=config)


def replacement_layer(
    cache: Any, index: int, make_layer: Callable[[], ReplacementCacheLayer] = ReplacementCacheLayer
) -> ReplacementCacheLayer:
    """The place of a replacement in the host's cache, taken from an empty plain layer at the first call.

    Args:
        cache: The host's cache.
        index: Which of its layers.
        make_layer: Makes what takes the place.

    Raises:
        UnsupportedError: If the cache is none that grows, or moves its layers away, or a backward makes a call once
            more.
        ShapeError: If keys and values of another model lie there.
    """
    layers = getattr(cache, "layers", None)
    if not isinstance(layers, list):
        raise UnsupportedError(f"past_key_values: expected a DynamicCache, got {type(cache).__name__}")
    if getattr(cache, "offloading", False):
        raise UnsupportedError("past_key_values: expected a DynamicCache that stays in place, got one that offloads")
    make = getattr(cache, "layer_class_to_replicate", None)
    while make is not None and len(layers) <= index:
        layers.append(make())
    found: Any = layers[index] if index < len(layers) else None
    if isinstance(found, ReplacementCacheLayer):
        refuse_replay("past_key_values", found.born)
        return found
    if type(found) not in (DynamicLayer, DynamicSlidingWindowLayer, GrowingLayer):
        raise UnsupportedError(
            f"past_key_values: expected a DynamicCache with a layer for each block, got {type(found).__name__} in a "
            f"{type(cache).__name__} at layer {index}; a replacement's streams have no place there"
        )
    if found.get_seq_length():
        raise ShapeError("past_key_values: expected an empty cache, or one that this model has filled")
    layers[index] = placed = make_layer()
    return placed
