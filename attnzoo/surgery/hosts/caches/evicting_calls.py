"""Calls of blocks whose keys and values lie in an evicting layer of the host's cache.

Letters: B batch, T tokens of a call, H query heads, G KV heads, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.base.evicting.calls import EvictingInputs, may_read_in_place
from attnzoo.base.evicting.layer import EvictingLayer
from attnzoo.base.layer import AttentionLayer

HELD = "attnzoo_held"
"""The argument by which a block hands the evicting layer of its cache on to the attention function."""


def evicting_layer_for(
    module: nn.Module, layer: AttentionLayer, cache: Any, call: tuple[Any, dict[str, Any]], *, may_begin: bool
) -> Any:
    """The layer of a host's cache that evicts what a block reads no more; ``None`` where everything is kept.

    Everything is kept where gradients may reach earlier tokens, and by caches of callers that are not empty.

    Args:
        module: The block.
        layer: Whose rule it follows.
        cache: The host's cache.
        call: The block's arguments, by place and by name.
        may_begin: Whether a layer that is empty may become one that evicts.

    Raises:
        UnsupportedError: If a block of another rule has filled the cache.
    """
    if not isinstance(layer, EvictingLayer) or torch.compiler.is_compiling():
        return None
    # Importing the host's library is for callers who have one of its caches.
    from attnzoo.surgery.hosts.caches import evicting

    index: Any = module.layer_idx
    found = evicting.evicting_layer(cache, index, layer)
    if found is None and may_begin and not _wants_gradients(module, call) and layer.evicts:
        evicting.let_evict(cache, index, layer)
        found = evicting.evicting_layer(cache, index, layer)
    return found


def _wants_gradients(module: nn.Module, call: tuple[Any, dict[str, Any]]) -> bool:
    if not torch.is_grad_enabled():
        return False
    given = (*call[0], *call[1].values(), *module.parameters())
    return any(isinstance(x, Tensor) and x.requires_grad for x in given)


def attend_held(held: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over what an evicting layer holds and over a call's own tokens, which it then holds.

    Args:
        held: The layer of the host's cache.
        q: Rotated queries ``[B, H, T, D]``.
        k: Rotated keys ``[B, G, T, D]``.
        v: Values ``[B, G, T, D]``.

    Returns:
        ``[B, H, T, D]``.
    """
    layer: EvictingLayer = held.layer
    tokens = q.shape[2]
    memory = held.room_for(k, v)
    out: Tensor
    is_plain_call = memory.bound and layer.impl == "auto" and not layer.recordings
    if tokens == 1 and is_plain_call and may_read_in_place(memory, q, k, v):
        scale = layer.config.scale
        out = memory.decode_row(q, k, v, q.shape[3] ** -0.5 if scale is None else scale)
    else:
        with memory.all_or_nothing():
            memory.stage({"k": k, "v": v}, tokens)
            inputs = EvictingInputs(q, k, v, cache=memory, lengths=tokens)
            plan = layer.plan_for(inputs, offset=memory.bound)
            for recording in layer.recordings:
                recording.add(layer, plan)
            out = layer.operate(inputs, plan)
    held.note(tokens, None)
    return out
