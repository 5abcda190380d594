"""Calls of blocks whose keys and values lie in an evicting layer of the host's cache.

Letters: B batch, T tokens of a call, H query heads, G KV heads, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor, nn

from attnzoo.base.editing.operation import check_honoured
from attnzoo.base.evicting.calls import may_read_in_place
from attnzoo.base.evicting.layer import EvictingLayer
from attnzoo.base.evicting.policy import PolicyAttention
from attnzoo.base.layer import AttentionInputs, AttentionLayer
from attnzoo.base.padding import Alignment
from attnzoo.cache.evicting.cache import EvictingCache
from attnzoo.cache.held import HeldCache
from attnzoo.cache.policies.protocol import Policy
from attnzoo.surgery.hosts.positions import real_slots, unrotated
from attnzoo_kernels.errors import UnsupportedError

HELD = "attnzoo_held"
"""The argument by which a block hands the evicting layer of its cache on to the attention function."""


@runtime_checkable
class Pattern(Protocol):
    """What is asked of a read pattern here: whose rule a block follows, and how its host rotates."""

    @property
    def layer(self) -> AttentionLayer:
        """A layer without weights whose rule is followed."""

    @property
    def evict(self) -> bool:
        """Whether a layer of a cache that is empty may become one that evicts."""

    @property
    def tables(self) -> Callable[[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
        """What makes cosines and sines of the host's own tables."""

    @property
    def planes(self) -> Literal["halves", "neighbours"] | None:
        """Which values of a head the host turns against each other."""


def evicting_layer_for(module: nn.Module, pattern: Pattern, cache: Any, call: tuple[Any, dict[str, Any]]) -> Any:
    """The layer of a host's cache that evicts what a block reads no more; ``None`` where everything is kept.

    Everything is kept where gradients may reach earlier tokens, and by caches of callers that are not empty; beside a
    policy such caches are refused.

    Args:
        module: The block.
        pattern: What it reads.
        cache: The host's cache.
        call: The block's arguments, by place and by name.

    Raises:
        UnsupportedError: If a block of another rule has filled the cache, or it is none that a policy can follow.
    """
    layer = pattern.layer
    if not isinstance(layer, EvictingLayer):
        return None
    policy = layer.policy if isinstance(layer, PolicyAttention) else None
    if torch.compiler.is_compiling():
        if policy is not None:
            raise UnsupportedError(f"past_key_values: expected None under compilation beside {policy}, got a cache")
        return None
    # Importing the host's library is for callers who have one of its caches.
    from attnzoo.surgery.hosts.caches import evicting

    index: Any = module.layer_idx
    if policy is not None:
        config: Any = module.config
        evicting.check_layers(cache, config.num_hidden_layers)
    found = evicting.evicting_layer(cache, index, layer)
    keeps = _wants_gradients(module, call)
    if found is None and pattern.evict and not keeps and layer.evicts:
        evicting.let_evict(cache, index, layer)
        found = evicting.evicting_layer(cache, index, layer)
    if found is not None and policy is not None and "score" in policy.needs:
        tables = call[1].get("position_embeddings")
        found.rotation = None if tables is None else pattern.tables(tables)
        found.planes = pattern.planes
    if policy is not None and pattern.evict:
        evicting.check_policy_layer(cache, index, policy, module, found)
    if found is not None:
        # All that may be wrong has been found: the keys that come next are this block's.
        found.is_awaited = True
    return found


def follows(layer: AttentionLayer, policy: Policy) -> TypeGuard[PolicyAttention]:
    """Whether what a block reads is what a policy of one layer holds."""
    return isinstance(layer, PolicyAttention) and layer.policy.equals(policy)


def begin_layer(module: nn.Module, layer: PolicyAttention, cache: Any, *, offload: bool) -> None:
    """Makes an empty layer of a host's cache one that follows a block's policy, maybe in CPU memory."""
    from attnzoo.surgery.hosts.caches import evicting

    index: Any = module.layer_idx
    evicting.let_evict(cache, index, layer, offload=offload)


def _wants_gradients(module: nn.Module, call: tuple[Any, dict[str, Any]]) -> bool:
    if not torch.is_grad_enabled():
        return False
    given = (*call[0], *call[1].values(), *module.parameters())
    return any(isinstance(x, Tensor) and x.requires_grad for x in given)


def attend_held(held: Any, inputs: AttentionInputs, real: Tensor | None) -> Tensor:
    """Attention over what an evicting layer holds and over a call's own tokens, which it then holds.

    Args:
        held: The layer of the host's cache.
        inputs: The call's rotated queries ``[B, H, T, D]`` and keys ``[B, G, T, D]``, its values, and its edits.
        real: Which slots hold tokens, those of earlier calls before this one's, bool ``[B, S]``; ``None`` if all do.

    Returns:
        ``[B, H, T, D]``, zeros at padding.

    Raises:
        ShapeError: If the padding of earlier calls does not come again.
    """
    tokens = inputs.q.shape[2]
    real = real_slots(real, held.real, held.seen, tokens)
    own = None if real is None else real[:, held.seen :]
    score = _score(held, inputs.q, inputs.k, inputs.v)
    if own is None or bool(own.all()):
        out = _attend(held, inputs, tokens, score)
    else:
        # Padding has no place in what is held: each item's tokens come first.
        rows = Alignment.of(~own)
        q, k, v = (rows.aligned(x) for x in (inputs.q, inputs.k, inputs.v))
        inputs = replace(inputs, q=q, k=k, v=v)
        score = None if score is None else rows.aligned(score.unsqueeze(-1)).squeeze(-1)
        out = _attend(held, inputs, rows.lengths, score)
        out = rows.put_back(out).masked_fill(~own[:, None, :, None], 0.0)
    check_honoured(inputs.edits, "what is held")
    held.note(tokens, real)
    return out


def _attend(held: Any, inputs: AttentionInputs, lengths: int | Tensor, score: Tensor | None) -> Tensor:
    """The same for rows that are left-aligned."""
    layer: EvictingLayer = held.layer
    memory: HeldCache = held.room_for(inputs.k, inputs.v)
    q = inputs.q
    is_plain_call = memory.bound and layer.impl == "auto" and not layer.recordings and inputs.edits is None
    if is_plain_call and isinstance(memory, EvictingCache) and may_read_in_place(memory, q, inputs.k, inputs.v):
        scale = layer.config.scale
        return memory.decode_row(q, inputs.k, inputs.v, q.shape[3] ** -0.5 if scale is None else scale)
    with memory.all_or_nothing():
        inputs = layer.held_inputs(inputs, memory, lengths, score)
        if memory.bound and not layer.recordings:
            return layer.attend_held(inputs)
        plan = layer.plan_for(inputs, offset=memory.offset, lengths=lengths)
        for recording in layer.recordings:
            recording.add(layer, plan)
        return layer.operate(inputs, plan)


def _score(held: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
    """The score of a call's rows ``[B, G, T]`` by queries and keys that are not rotated, where a policy needs one.

    Raises:
        UnsupportedError: If the host does not say how they were rotated.
    """
    layer = held.layer
    if not isinstance(layer, PolicyAttention) or "score" not in layer.policy.needs:
        return None
    rotation = held.rotation
    held.rotation = None
    if held.planes is None:
        return layer.policy.scores_of(q, k, v)
    if rotation is None:
        raise UnsupportedError(f"position_embeddings: expected by name, which {layer.policy} needs, got none")
    q, k = (unrotated(x, *rotation, interleaved=held.planes == "neighbours") for x in (q, k))
    return layer.policy.scores_of(q, k, v)
