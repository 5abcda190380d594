"""The Llama family of transformers: separate projections, half-layout rotation, the shared attention interface.

Recognised by class name and attributes, so that nothing is imported before a model is there.

Letters: B batch, T query tokens, C model width, H query heads, G KV heads, D head width.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.base.evicting.policy import PolicyAttention
from attnzoo.base.rope import RotaryConfig
from attnzoo.surgery.hosts import attention_function
from attnzoo.surgery.hosts.block import ROLES, Block, Family, Need
from attnzoo.surgery.hosts.projections import Projections, as_linear, set_weights, size_of

CLASSES = ("LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention")


def describe(module: nn.Module) -> Block:
    """A module of this family; to be looked at, its projections need their sizes alone.

    Raises:
        ConversionError: If a projection does not say its sizes.
    """
    host: Any = module
    head_dim = int(host.head_dim)
    kv_heads = size_of(module, "k_proj", "out_features") // head_dim
    return Block(
        heads=size_of(module, "q_proj", "out_features") // head_dim,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=head_dim,
        width=size_of(module, "q_proj", "in_features"),
        cached_values=partial(int, 2 * kv_heads * head_dim),
        project=partial(_project, host),
        output=partial(_output, host),
        projections={role: getattr(module, role) for role in ROLES},
        weights=partial(_weights, module),
        rotary=partial(_rotary, module),
        rope_type=_rope_parameters(module).get("rope_type"),
        scale=float(host.scaling),
        causal=True,
        window=_window(module),
        reply="pair",
        reasons=_reasons(module),
        products=not any(hasattr(module, name) for name in ("q_norm", "k_norm")),
        dropout=float(getattr(module, "attention_dropout", 0.0)),
    )


def _project(host: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of ``x [B, T, C]``, heads apart, normalised where the class does it, not rotated."""
    q, k, v = (getattr(host, role)(x).unflatten(-1, (-1, host.head_dim)) for role in ROLES[:3])  # [B, T, h, D] each
    q = host.q_norm(q) if hasattr(host, "q_norm") else q
    k = host.k_norm(k) if hasattr(host, "k_norm") else k
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _output(host: Any, y: Tensor) -> Tensor:
    out: Tensor = host.o_proj(y)
    return out


def _weights(module: nn.Module) -> Projections:
    """The weights of a module, by reference."""
    q, k, v, o = (as_linear(getattr(module, role), role) for role in ROLES)
    host: Any = module
    head_dim = int(host.head_dim)
    return Projections(
        q=q.weight,
        k=k.weight,
        v=v.weight,
        o=o.weight,
        q_bias=q.bias,
        k_bias=k.bias,
        v_bias=v.bias,
        o_bias=o.bias,
        num_heads=q.out_features // head_dim,
        num_kv_heads=k.out_features // head_dim,
        head_dim=head_dim,
        rotary=_rotary(module),
        scale=float(host.scaling),
    )


def _window(module: nn.Module) -> int | None:
    """The sliding window of a module's layer."""
    # Some classes keep it on the module, where it may be off for this layer, others in the configuration alone.
    window = getattr(module, "sliding_window", getattr(getattr(module, "config", None), "sliding_window", None))
    slides = getattr(module, "layer_type", "sliding_attention") == "sliding_attention"
    return window if slides else None


def _reasons(module: nn.Module) -> Mapping[Need, tuple[str, ...]]:
    """Why a module cannot be converted to what is read, to other weights, or be replaced."""
    own: list[str] = []
    if (window := _window(module)) is not None:
        own.append(f"it has a sliding window of its own ({window} tokens)")
    reading = list(own)
    weights = list(own)
    replacing = list(own)
    pattern = attention_function.pattern_of(module)
    if pattern is not None and isinstance(pattern.layer, PolicyAttention):
        reading.insert(0, f"it follows {pattern.layer.policy}; undo that conversion first")
    if hasattr(module, "k_norm"):
        weights.append("it normalises keys after projection, which no other projection can stand for")
    if pattern is not None:
        replacing.insert(0, "it follows a read pattern, which a replacement would not; undo that conversion first")
    return {
        Need.READING: tuple(reading),
        Need.WEIGHTS: tuple(weights),
        Need.REPLACING: tuple(replacing),
    }


def with_weights(module: nn.Module, projections: Projections) -> nn.Module:
    """A module of the same class with other weights; the original is untouched."""
    new: nn.Module = _without_weights(module, projections.num_kv_heads)
    for role in ROLES:
        name = role.removesuffix("_proj")
        weight = getattr(projections, name)
        bias = getattr(projections, f"{name}_bias")
        old = as_linear(getattr(module, role), role)
        set_weights(as_linear(getattr(new, role), role), weight, bias, like=old)
    for name, child in module.named_children():
        if name not in ROLES:
            new.add_module(name, child)
    attention_function.take_over(new, module, projections.num_kv_heads)
    return new


def _without_weights(host: Any, num_kv_heads: int) -> Any:
    config = copy.copy(host.config)
    config.num_key_value_heads = num_kv_heads
    with torch.device("meta"):
        new = type(host)(config, host.layer_idx)
    # The model's own, so that a later change of its attention implementation reaches this block too.
    new.config = host.config
    return new


def _rope_parameters(module: nn.Module) -> dict[str, Any]:
    """What the host's configuration says about rotation, copied."""
    return dict(getattr(module.config, "rope_parameters", None) or {})


def _rotary(module: nn.Module) -> RotaryConfig:
    host: Any = module
    parameters = _rope_parameters(module)
    if parameters.get("rope_type", "default") == "default":
        # These hosts turn whole heads then, whatever it says.
        parameters.pop("partial_rotary_factor", None)
    return RotaryConfig.from_parameters(
        parameters,
        head_dim=int(host.head_dim),
        max_positions=getattr(host.config, "max_position_embeddings", None),
    )


FAMILY = Family(name="llama", classes=CLASSES, block=describe, with_weights=with_weights)
