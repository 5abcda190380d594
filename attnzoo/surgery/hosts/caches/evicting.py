"""Keys and values of blocks that read a window or shards: no more of them than later tokens can read.

Letters: B batch, T tokens of a call, H query heads, G KV heads, D width.
"""

from __future__ import annotations

import weakref
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from attnzoo.base.evicting.layer import EvictingLayer
from attnzoo.base.evicting.policy import PolicyAttention
from attnzoo.cache.held import HeldCache
from attnzoo.cache.kv_cache import Stream
from attnzoo.cache.pages.cache import PagedCache
from attnzoo.cache.policies.protocol import Policy
from attnzoo.surgery.hosts.caches.cache_layer import ReplacementCacheLayer
from attnzoo.surgery.hosts.caches.growing import GrowingLayer
from attnzoo_kernels.errors import ShapeError, UnsupportedError

MARGIN = 64
"""Tokens that may be taken back, as assisted generation does with those that it rejects."""

_LEAST_ROOM = 256
_SHARE_OF_ROOM = 8


class EvictingCacheLayer(ReplacementCacheLayer):  # type: ignore[no-untyped-call]
    """What a block remembers that reads a window or shards: an evicting cache, which grows as far as the rule keeps.

    ``update`` hands a call's own keys and values through; the attention function finds the others here. At most
    ``margin`` tokens can be cropped at a time, or all; none where it is 0.

    Attributes:
        layer: The layer without weights whose rule is followed.
        margin: Tokens that may be taken back: a policy's slack, or ``MARGIN``.
        offloads: Whether keys and values stay in CPU memory, beside a policy.
        rotation: Cosines and sines ``[B|1, T, Dr]`` of the call that comes, for a policy that scores what is unrotated.
        planes: Which values of a head they turn, as the host's block says it.
        is_awaited: Whether an attention function that knows this layer will have the keys that ``update`` is given.
    """

    def __init__(self, layer: EvictingLayer, *, offload: bool = False) -> None:
        super().__init__()
        self.layer = layer
        self.offloads = offload
        self.margin = MARGIN if layer.margin is None else layer.margin
        self.is_croppable = self.margin > 0
        self.is_awaited = False
        self.rotation: tuple[Tensor, Tensor] | None = None
        self.planes: Literal["halves", "neighbours"] | None = "halves"
        self._filled_by: weakref.ref[nn.Module] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy, or another process, may have other blocks.
        return {**self.__dict__, "_filled_by": None}

    @property
    def follows_policy(self) -> bool:
        """Whether a policy says what is held, rather than what a block reads."""
        return isinstance(self.layer, PolicyAttention)

    def compact(self) -> None:
        """Chooses again what is held, where that does not follow from place alone."""
        if isinstance(self.memory, PagedCache):
            self.memory.compact()

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return 0 if self.memory is None else self.memory.nbytes

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hands a call's keys ``[B, G, T, D]`` and values through to the attention function, which remembers them.

        Raises:
            UnsupportedError: If another block's keys came here, or gradients are wanted.
        """
        if not self.is_awaited:
            return super().update(key_states, value_states, *args, **kwargs)
        self.is_awaited = False
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise UnsupportedError(
                "past_key_values: expected no gradients through a cache that evicts, got some; call under "
                "torch.no_grad(), or without a cache, or convert with evict=False"
            )
        return key_states, value_states

    def filled_by_another(self, module: nn.Module) -> bool:
        """Whether another block than this one has filled the cache; this one has from now on."""
        filler = None if self._filled_by is None else self._filled_by()
        if self.seen and filler is not None and filler is not module:
            return True
        self._filled_by = weakref.ref(module)
        return False

    def room_for(self, k: Tensor, v: Tensor) -> HeldCache:
        """The cache, with room for the tokens of a call, k ``[B, G, T, D]`` and v ``[B, G, T, Dv]``.

        Raises:
            ShapeError: If it holds another number of items.
        """
        needed = self.seen + k.shape[2]
        memory = self.memory
        if not isinstance(memory, HeldCache):
            memory = self.layer.held_cache(
                {name: Stream(x.shape[1], x.shape[3], offloaded=self.offloads) for name, x in (("k", k), ("v", v))},
                margin=self.margin,
                batch=k.shape[0],
                max_length=needed + _LEAST_ROOM,
                device=k.device,
                dtype=k.dtype,
            )
            self.memory = memory
            self.is_initialized = True
        elif memory.batch != k.shape[0]:
            raise ShapeError(f"past_key_values: expected a call of the {memory.batch} items held, got {k.shape[0]}")
        elif needed > memory.max_length:
            memory.grow(needed + max(_LEAST_ROOM, needed // _SHARE_OF_ROOM))
        return memory


def evicting_layer(cache: Any, index: int, layer: EvictingLayer) -> EvictingCacheLayer | None:
    """The evicting layer of a host's cache for a block's call; ``None`` where there is none.

    Args:
        cache: The host's cache.
        index: Which of its layers.
        layer: Whose rule the block follows.

    Raises:
        UnsupportedError: If a block of another rule has filled it.
    """
    layers = getattr(cache, "layers", None)
    found = layers[index] if isinstance(layers, list) and index < len(layers) else None
    if not isinstance(found, EvictingCacheLayer):
        return None
    if not layer.reads_as(found.layer):
        if found.seen:
            raise UnsupportedError(
                "past_key_values: expected a cache that this model has filled, got one whose block read something else"
            )
        found = EvictingCacheLayer(layer, offload=found.offloads)
        cache.layers[index] = found
    return found


def check_layers(cache: Any, blocks: int) -> None:
    """Raises unless a cache has, or makes, a layer for each of a model's blocks, and no more.

    Raises:
        UnsupportedError: If it is another model's.
    """
    layers = getattr(cache, "layers", None)
    if not isinstance(layers, list):
        return
    is_short = len(layers) < blocks and getattr(cache, "layer_class_to_replicate", None) is None
    if is_short or len(layers) > blocks:
        raise UnsupportedError(
            f"past_key_values: expected a cache with a layer for each of {blocks} blocks, got one with {len(layers)}"
        )


def check_policy_layer(
    cache: Any, index: int, policy: Policy, module: nn.Module, found: EvictingCacheLayer | None
) -> None:
    """Raises unless a call's cache follows a policy, or is empty and may keep everything, as gradients need it.

    Args:
        cache: The host's cache.
        index: Which of its layers.
        policy: Of that layer.
        module: The block that is called.
        found: The evicting layer that lies there.

    Raises:
        UnsupportedError: If the cache is of a kind that cannot follow it, or another block has filled it.
    """
    if found is not None:
        if found.filled_by_another(module):
            raise UnsupportedError("past_key_values: expected a cache that this model has filled, got another model's")
        return
    layers = getattr(cache, "layers", None)
    layer = layers[index] if isinstance(layers, list) and index < len(layers) else None
    kind = type(layer).__name__ if layer is not None else type(cache).__name__
    if getattr(cache, "offloading", False):
        kind = "one that offloads"
    if getattr(cache, "offloading", False) or type(layer) not in (DynamicLayer, GrowingLayer, type(None)):
        raise UnsupportedError(
            f"past_key_values: expected a DynamicCache that stays in place, which can follow {policy}, got {kind}"
        )
    if layer is not None and layer.get_seq_length():
        raise UnsupportedError(
            f"past_key_values: expected an empty cache, or one that this model has filled by {policy}, got one that "
            "keeps everything"
        )


def let_evict(cache: Any, index: int, layer: EvictingLayer, *, offload: bool = False) -> None:
    """Makes an empty plain layer of a host's cache one that evicts; leaves every other."""
    layers = getattr(cache, "layers", None)
    if not isinstance(layers, list) or getattr(cache, "offloading", False):
        return
    make = getattr(cache, "layer_class_to_replicate", None)
    while make in (DynamicLayer, GrowingLayer) and len(layers) <= index:
        layers.append(make())
    found: Any = layers[index] if index < len(layers) else None
    if type(found) in (DynamicLayer, DynamicSlidingWindowLayer, GrowingLayer) and not found.get_seq_length():
        layers[index] = EvictingCacheLayer(layer, offload=offload)
