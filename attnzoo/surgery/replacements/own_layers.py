"""A layer of the zoo in the place of another, round the very same projections.

Letters: G KV heads, D head width, r latent width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from attnzoo.base.config import AttentionConfig
from attnzoo.base.evicting.policy import PolicyAttention
from attnzoo.base.layer import AttentionLayer
from attnzoo.base.weights import PROJECTIONS
from attnzoo.cache.kv_cache import KVCache
from attnzoo.cache.policies.protocol import Policy
from attnzoo.factory import create
from attnzoo.reporting.warn import silent
from attnzoo.surgery.hosts.projections import LatentProjections, Projections, set_weights


class RememberingAttention(PolicyAttention):
    """Plain attention whose caches follow a policy without being told so, round projections that were there.

    Args:
        config: Its sizes.
        policy: Of one layer.
    """

    def new_cache(self, batch: int, max_length: int, *, policy: Policy | None = None, **more: Any) -> KVCache:
        """As every layer's; by the policy of this one where none is given."""
        return super().new_cache(batch, max_length, policy=self.policy if policy is None else policy, **more)


def in_place_of(old: AttentionLayer, config: AttentionConfig) -> AttentionLayer:
    """A layer that projects by the modules of another, which is untouched."""
    like = old.q_proj.weight
    # What a variant deserves to have said about it in a model, surgery says.
    with silent():
        new = create(config, device=like.device, dtype=like.dtype)
    _take_projections(new, old)
    return new


def remembering(old: AttentionLayer, policy: Policy) -> RememberingAttention:
    """A layer that remembers what a policy says, by the projections of another, which is untouched."""
    config = AttentionConfig(**site_fields(old))
    with torch.device("meta"):
        new = RememberingAttention(config, policy)
    _take_projections(new, old)
    return new


def site_fields(layer: AttentionLayer) -> dict[str, Any]:
    """What a layer's place decides about any other in it: sizes, rotation, scale, causality."""
    config = layer.config
    return {
        "dim": config.dim,
        "num_heads": config.num_heads,
        "num_kv_heads": config.kv_heads,
        "head_dim": config.head_width,
        "bias": config.bias,
        "causal": config.causal,
        "rotary": config.rotary,
        "scale": config.scale,
    }


def with_projections(
    old: AttentionLayer, config: AttentionConfig, found: Projections | LatentProjections
) -> AttentionLayer:
    """A layer with other weights in the place of another, which is untouched."""
    like = old.q_proj
    with silent(), torch.device("meta"):
        new = create(config)
    parts: dict[str, tuple[Any, Any]] = {"q_proj": (found.q, found.q_bias), "o_proj": (found.o, found.o_bias)}
    if isinstance(found, LatentProjections):
        parts["kv_down"] = (found.down, found.down_bias)
        # A bias is made by the latent's own.
        parts["kv_up"] = (found.up, found.up.new_zeros(found.up.shape[0]) if config.bias else None)
    else:
        parts["k_proj"] = (found.k, found.k_bias)
        parts["v_proj"] = (found.v, found.v_bias)
    for name, (weight, bias) in parts.items():
        set_weights(getattr(new, name), weight, bias, like=like)
    _take_mode(new, old)
    return new


def _take_projections(new: AttentionLayer, old: AttentionLayer) -> None:
    for role in PROJECTIONS:
        setattr(new, role, getattr(old, role))
    _take_mode(new, old)


def _take_mode(new: AttentionLayer, old: AttentionLayer) -> None:
    """Gives a new layer an old one's mode and choices, and touches none of the old one's modules."""
    new.impl = old.impl
    new.recordings = old.recordings
    theirs = {id(module) for module in old.modules()}
    ours: list[nn.Module] = [module for module in new.modules() if id(module) not in theirs]
    for module in ours:
        module.training = old.training
