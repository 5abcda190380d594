"""The Llama family of transformers: separate projections, half-layout rotation, the shared attention interface.

Recognised by class name and attributes, so that nothing is imported before a model is there.

Letters: B batch, T query tokens, S slots, C model width, H query heads, G KV heads, D head width, r latent width.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attnzoo.base.rope import RotaryConfig, apply_rotary, rotary_tables
from attnzoo.cache.replay import is_replay, refuse_replay
from attnzoo.reporting.warn import warn_caller
from attnzoo.surgery.hosts import attention_function
from attnzoo.surgery.hosts.calls import read_call
from attnzoo.surgery.hosts.projections import LatentProjections, Projections
from attnzoo.surgery.hosts.site import Site
from attnzoo.surgery.hosts.weights import type_name
from attnzoo.surgery.replacements.replacement import LayerSeat
from attnzoo_kernels.errors import ConversionError

NAME = "llama"
CLASSES = ("LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention")
ROLES = ("q", "k", "v", "o")
LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Kinds of rotation whose frequencies follow the length of a call."""


def matches(module: nn.Module) -> bool:
    """Whether a module is an attention block of this family, or a seat in its place."""
    return type(module).__name__ in CLASSES or isinstance(module, LatentSeat | LayerSeat)


def site_of(path: str, layer: int, module: nn.Module) -> Site:
    """The site of a module, whatever its projections are: to be looked at, they need their sizes alone."""
    width = _size(path, module, "q_proj", "in_features")
    if isinstance(module, LatentSeat):
        return Site(path, NAME, layer, module.num_heads, module.num_kv_heads, module.head_dim, width)
    heads, groups = (_size(path, module, f"{role}_proj", "out_features") // _head_dim(module) for role in ("q", "k"))
    return Site(path, NAME, layer, heads, groups, _head_dim(module), width)


def _size(path: str, module: nn.Module, name: str, which: Literal["in_features", "out_features"]) -> int:
    child = getattr(module, name)
    size = getattr(child, which, None)
    if not isinstance(size, int):
        raise ConversionError(f"{path}.{name}: expected an nn.Linear, got {type_name(child)}, which has no {which}")
    return size


def reasons_against(module: nn.Module, *, to: Literal["read", "weights", "seat"]) -> tuple[str, ...]:
    """Why a module cannot be converted to what is read, to other weights, or to a seat; empty if it can."""
    reasons = []
    if isinstance(module, LatentSeat):
        reasons.append("it is a latent seat already; undo that conversion first")
    if isinstance(module, LayerSeat):
        reasons.append(f"it is a seat of {module.variant!r} already; undo that conversion first")
    if to == "seat" and attention_function.rule_of(module) is not None:
        reasons.append("it follows a rule of what is read, which a seat would not; undo that conversion first")
    # Some classes keep it on the module, where it may be off for this layer, others in the configuration alone.
    window = getattr(module, "sliding_window", getattr(getattr(module, "config", None), "sliding_window", None))
    if window is not None and not (hasattr(module, "layer_type") and module.layer_type != "sliding_attention"):
        reasons.append(f"it has a sliding window of its own ({window} tokens)")
    if to == "weights" and hasattr(module, "k_norm"):
        reasons.append("it normalises keys after projection, which no other projection can stand for")
    for name in ("q_norm", "k_norm"):
        if to == "seat" and hasattr(module, name):
            reasons.append(f"it has a {name}, which normalises after projection and which no layer here does")
    return tuple(reasons)


def read(module: nn.Module) -> Projections:
    """The weights of a module, by reference."""
    projections = {role: _linear(module, f"{role}_proj") for role in ROLES}
    width = _head_dim(module)
    return Projections(
        **{role: linear.weight for role, linear in projections.items()},
        **{f"{role}_bias": linear.bias for role, linear in projections.items()},
        num_heads=projections["q"].out_features // width,
        num_kv_heads=projections["k"].out_features // width,
        head_dim=width,
        rotary=_rotary(module),
        scale=scale_of(module),
    )


def build(module: nn.Module, projections: Projections) -> nn.Module:
    """A module of the same class with other weights; the original is untouched."""
    new: nn.Module = _without_weights(module, projections.num_kv_heads)
    for role in ROLES:
        old, linear = _linear(module, f"{role}_proj"), _linear(new, f"{role}_proj")
        _fill(linear, getattr(projections, role), getattr(projections, f"{role}_bias"), old)
    for name, child in module.named_children():
        if name not in {f"{role}_proj" for role in ROLES}:
            new.add_module(name, child)
    _dress(new, module, projections.num_kv_heads)
    return new


def _without_weights(host: Any, num_kv_heads: int) -> Any:
    config = copy.copy(host.config)
    config.num_key_value_heads = num_kv_heads
    with torch.device("meta"):
        new = type(host)(config, host.layer_idx)
    # The model's own, so that a later change of its attention implementation reaches this block too.
    new.config = host.config
    return new


class LatentSeat(nn.Module):
    """An attention block that caches a latent, in the place of one of the Llama family.

    The host's cache holds the latent as keys ``[B, 1, S, r]`` beside values of width 0: crop, reorder and static
    buffers work as ever. Keys are expanded and rotated at use. Rotation goes by slot: scores depend on differences of
    positions alone, so that padding on the left shifts nothing.
    """

    needs_interface = True

    def __init__(self, module: nn.Module, projections: LatentProjections) -> None:
        super().__init__()
        p, old = projections, _linear(module, "q_proj")
        host: Any = module
        self.config, self.layer_idx = host.config, int(host.layer_idx)
        self.num_heads, self.num_kv_heads, self.head_dim = p.num_heads, p.num_kv_heads, p.head_dim
        self.rotary, self.scaling, self.is_causal = p.rotary, p.scale, True
        with torch.device("meta"):
            self.q_proj = nn.Linear(p.q.shape[1], p.q.shape[0], bias=p.q_bias is not None)
            self.kv_down = nn.Linear(p.down.shape[1], p.down.shape[0], bias=p.down_bias is not None)
            self.kv_up = nn.Linear(p.up.shape[1], p.up.shape[0], bias=False)
            self.o_proj = nn.Linear(p.o.shape[1], p.o.shape[0], bias=p.o_bias is not None)
        _fill(self.q_proj, p.q, p.q_bias, old)
        _fill(self.kv_down, p.down, p.down_bias, old)
        _fill(self.kv_up, p.up, None, old)
        _fill(self.o_proj, p.o, p.o_bias, _linear(module, "o_proj"))
        _dress(self, module, p.num_kv_heads)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Any = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """As the host calls it: ``[B, T, C]`` to ``([B, T, C], None)``.

        Raises:
            UnsupportedError: If positions are not those of the slots, an argument cannot be honoured, or a backward
                makes a call with a cache once more.
        """
        call = read_call(kwargs, cache)
        attention_function.check_implementation(self.config)
        # One that is empty was made inside the checkpointed part.
        if call.cache is not None and is_replay() and call.cache.get_seq_length(self.layer_idx):
            refuse_replay("past_key_values")
        q = self.q_proj(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, H, T, D]
        latent = self.kv_down(hidden_states).unsqueeze(1)  # [B, 1, T, r]
        first = attention_function.first_slot(attention_mask, call.cache, self.layer_idx)
        real = getattr(attention_mask, "real", None)
        attention_function.check_consecutive(call.position_ids, first, real, "a latent seat", padding_counts=True)
        if call.cache is not None:
            latent, _ = call.cache.update(latent, latent[..., :0], self.layer_idx)
        heads = self.kv_up(latent.squeeze(1)).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        k, v = heads.chunk(2, dim=1)  # [B, G, S, D] each
        slots = torch.arange(k.shape[2], device=k.device)
        q, k = self._rotate(q, slots[: q.shape[2]] + first), self._rotate(k, slots)
        out, _ = attention_function.attend(self, q, k, v, attention_mask, scaling=self.scaling)
        return self.o_proj(out.flatten(-2)), None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        attention_function.register()

    def _rotate(self, x: Tensor, slots: Tensor) -> Tensor:
        if self.rotary is None:
            return x
        dtype = torch.promote_types(x.dtype, torch.float32)
        cos, sin = rotary_tables(self.rotary, self.head_dim, slots.unsqueeze(0), dtype)
        return apply_rotary(x, cos, sin, self.rotary.interleaved)


def with_kv_heads(projections: Projections, count: int) -> Projections:
    """The same projections with zeros for ``count`` KV heads: to be loaded into."""
    p = projections
    rows = {role: count * weight.shape[0] // p.num_kv_heads for role, weight in (("k", p.k), ("v", p.v))}
    return replace(
        p,
        k=p.k.new_zeros(rows["k"], p.k.shape[1]),
        v=p.v.new_zeros(rows["v"], p.v.shape[1]),
        k_bias=None if p.k_bias is None else p.k_bias.new_zeros(rows["k"]),
        v_bias=None if p.v_bias is None else p.v_bias.new_zeros(rows["v"]),
        num_kv_heads=count,
    )


def latent_like(module: nn.Module, rank: int) -> LatentProjections:
    """Weights of the sizes that a latent seat in a module's place would have, all zero: to be loaded into."""
    p = read(module)
    constant = any(bias is not None for bias in (p.q_bias, p.k_bias, p.v_bias))
    return LatentProjections(
        q=p.q,
        down=p.k.new_zeros(rank, p.k.shape[1]),
        up=p.k.new_zeros(p.k.shape[0] + p.v.shape[0], rank),
        o=p.o,
        q_bias=p.q_bias,
        down_bias=p.k.new_zeros(rank) if constant else None,
        o_bias=p.o_bias,
        num_heads=p.num_heads,
        num_kv_heads=p.num_kv_heads,
        head_dim=p.head_dim,
        rotary=p.rotary,
        scale=p.scale,
    )


def _linear(module: nn.Module, name: str) -> nn.Linear:
    child = getattr(module, name)
    if not isinstance(child, nn.Linear):
        raise ConversionError(f"{name}: expected an nn.Linear, got {type_name(child)}")
    return child


def _head_dim(module: nn.Module) -> int:
    return int(module.head_dim)  # type: ignore[arg-type]


def scale_of(module: nn.Module) -> float:
    """The factor on a module's scores."""
    return float(module.scaling)  # type: ignore[arg-type]


def _rope_parameters(module: nn.Module) -> dict[str, Any]:
    """What the host's configuration says about rotation, copied."""
    return dict(getattr(module.config, "rope_parameters", None) or {})


def _rotary(module: nn.Module) -> RotaryConfig:
    config: Any = module.config
    parameters = _rope_parameters(module)
    if parameters.get("rope_type", "default") == "default":
        # These hosts turn whole heads then, whatever it says.
        parameters.pop("partial_rotary_factor", None)
    return RotaryConfig.from_parameters(
        parameters, head_dim=_head_dim(module), max_positions=getattr(config, "max_position_embeddings", None)
    )


def warn_of_lengths(module: nn.Module) -> None:
    """Warns where a host's frequencies follow the length of a call: those of a seat do not."""
    kind = _rope_parameters(module).get("rope_type")
    if kind in LENGTH_DEPENDENT:
        warn_caller(
            f"rope_type {kind!r}: the model changes its frequencies with the length of a call; converted blocks keep "
            "those of the length that it was trained at"
        )


def _fill(linear: nn.Linear, weight: Tensor, bias: Tensor | None, like: nn.Linear) -> None:
    """Gives a linear layer weights of its own, in the dtype, on the device and as trainable as ``like``."""
    if (bias is None) != (linear.bias is None):
        raise ConversionError(
            "bias: expected the host's class to have one where the new weights have one, and none where not"
        )
    trainable = like.weight.requires_grad
    own = weight.detach().to(like.weight).clone(memory_format=torch.contiguous_format)
    linear.weight = nn.Parameter(own, requires_grad=trainable)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(like.weight).clone(), requires_grad=trainable)
    linear.in_features, linear.out_features = weight.shape[1], weight.shape[0]


def _dress(new: nn.Module, old: nn.Module, groups: int) -> None:
    """Takes over mode, and the reading rule where there is one, for so many KV heads."""
    new.train(old.training)
    rule = attention_function.rule_of(old)
    if rule is not None:
        attention_function.set_rule(new, attention_function.with_groups(rule, groups))
