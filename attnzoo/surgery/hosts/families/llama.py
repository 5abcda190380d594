"""The Llama family of transformers: separate projections, half-layout rotation, the shared attention interface.

Its classes differ in what normalises queries and keys (all heads together or each by itself), in how much of a head is
rotated and in which layers, in the factor on scores, in windows of some layers or all, and in the name of the output's
projection: all of it is read from a module's attributes. Recognised by class name, so that nothing is imported before a
model is there.

Letters: B batch, T query tokens, C model width, H query heads, G KV heads, D head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from attnzoo.base.rope import RotaryConfig
from attnzoo.surgery.hosts.block import ROLES, AttentionBlock, Family, Need
from attnzoo.surgery.hosts.families.reasons import reasons_for
from attnzoo.surgery.hosts.families.same_class import with_separate
from attnzoo.surgery.hosts.projections import Projections, as_linear, size_of

CLASSES = (
    "GemmaAttention",
    "Gemma2Attention",
    "Gemma3Attention",
    "GptOssAttention",
    "GraniteAttention",
    "LlamaAttention",
    "MistralAttention",
    "MixtralAttention",
    "Olmo2Attention",
    "PhiAttention",
    "Qwen2Attention",
    "Qwen2MoeAttention",
    "Qwen3Attention",
    "Qwen3MoeAttention",
    "SmolLM3Attention",
    "StableLmAttention",
    "Starcoder2Attention",
)

_NORMS = {"q_norm": 0, "k_norm": 1, "q_layernorm": 0, "k_layernorm": 1}
"""What normalises after projection: queries, or keys."""


def describe(module: nn.Module) -> AttentionBlock:
    """A module of this family; to be looked at, its projections need their sizes alone.

    Raises:
        ConversionError: If a projection does not say its sizes.
    """
    host: Any = module
    head_dim = int(host.head_dim)
    kv_heads = size_of(module, "k_proj", "out_features") // head_dim
    rotates = bool(getattr(host, "use_rope", True))
    return AttentionBlock(
        heads=size_of(module, "q_proj", "out_features") // head_dim,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=head_dim,
        width=size_of(module, "q_proj", "in_features"),
        cached_values=partial(int, 2 * kv_heads * head_dim),
        project=partial(_project, host),
        output=partial(_output, host),
        projections={role: getattr(module, name) for role, name in _names(module).items()},
        weights=partial(_weights, module),
        rotary=partial(_rotary, module),
        rope_type=_rope_parameters(module).get("rope_type") if rotates else None,
        planes="halves" if rotates else None,
        scale=float(host.scaling),
        causal=getattr(host, "is_causal", True) is not False,
        window=_window(module),
        reply="pair",
        reasons=_reasons(module),
        products=not _norms(module) and not _output_dropout(host),
        dropout=float(getattr(module, "attention_dropout", 0.0)),
        output_dropout=_output_dropout(host),
        output_path=_names(module)["o_proj"],
    )


def _names(module: nn.Module) -> dict[str, str]:
    """What a module calls its projections, by role."""
    names = dict(zip(ROLES, ROLES, strict=True))
    return names if hasattr(module, "o_proj") else {**names, "o_proj": "dense"}


def _norms(module: nn.Module) -> list[str]:
    """The names of what normalises queries and keys after projection."""
    return [name for name in _NORMS if name in module._modules]


def _project(host: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of ``x [B, T, C]``, heads apart, normalised where the class does it, not rotated."""
    made: list[Tensor] = [getattr(host, role)(x) for role in ROLES[:3]]
    norms = _norms(host)
    whole = [name for name in norms if _is_of_all_heads(host, name)]
    for name in whole:
        made[_NORMS[name]] = getattr(host, name)(made[_NORMS[name]])
    heads = [x.unflatten(-1, (-1, host.head_dim)).transpose(1, 2) for x in made]  # [B, h, T, D] each
    for name in norms:
        if name not in whole:
            heads[_NORMS[name]] = getattr(host, name)(heads[_NORMS[name]])
    q, k, v = heads
    return q, k, v


def _is_of_all_heads(host: Any, name: str) -> bool:
    """Whether a norm takes all heads of a token together; else each by itself."""
    weight = getattr(getattr(host, name), "weight", None)
    return weight is not None and weight.shape[-1] != host.head_dim


def _output(host: Any, y: Tensor) -> Tensor:
    out: Tensor = (host.o_proj if "o_proj" in host._modules else host.dense)(y)
    return nn.functional.dropout(out, _output_dropout(host), host.training) if _output_dropout(host) else out


def _output_dropout(host: Any) -> float:
    """The share of outputs that a block drops itself, which few classes do."""
    return float(getattr(host, "residual_dropout", 0.0))


def _weights(module: nn.Module) -> Projections:
    """The weights of a module, by reference."""
    host: Any = module
    return Projections.of_linears(
        (as_linear(getattr(module, name), name) for name in _names(module).values()),
        head_dim=int(host.head_dim),
        rotary=_rotary(module),
        scale=float(host.scaling),
    )


def _window(module: nn.Module) -> int | None:
    """The sliding window of a module's layer."""
    # Some classes keep it on the module, where it may be off for this layer, others in the configuration alone.
    config = getattr(module, "config", None)
    types = getattr(config, "layer_types", None)
    slides = types is None or types[module.layer_idx] == "sliding_attention"
    window = getattr(module, "sliding_window", getattr(config, "sliding_window", None))
    return window if slides else None


def _reasons(module: nn.Module) -> Mapping[Need, tuple[str, ...]]:
    """Why a module cannot be converted to what is read, to other weights, or be replaced."""
    host: Any = module
    every: list[str] = []
    if getattr(host, "attn_logit_softcapping", None) is not None:
        every.append(
            f"it caps its scores softly (attn_logit_softcapping={host.attn_logit_softcapping}), which needs an "
            "operation that does"
        )
    if "sinks" in host._parameters:
        every.append("its softmax has sinks that are learned, which needs an operation that has them")
    if getattr(host, "is_causal", True) is False:
        every.append("it reads later tokens too (use_bidirectional_attention)")
    weights = [
        f"its {name} normalises keys after projection, which needs merged heads with a norm of their own"
        for name in _norms(module)
        if _NORMS[name]
    ]
    return reasons_for(module, always=every, weights=weights)


def with_weights(module: nn.Module, projections: Projections) -> nn.Module:
    """A module of the same class with other weights; the original is untouched."""
    return with_separate(module, _names(module), projections)


def _rope_parameters(module: nn.Module) -> dict[str, Any]:
    """What the host's configuration says about the rotation of a module's layer, copied."""
    config: Any = module.config
    parameters = dict(getattr(config, "rope_parameters", None) or {})
    # One set for each kind of layer, where they differ.
    own = parameters.get(getattr(module, "layer_type", None) or "")
    return dict(own) if isinstance(own, Mapping) else parameters


def _rotary(module: nn.Module) -> RotaryConfig | None:
    host: Any = module
    if not getattr(host, "use_rope", True):
        return None
    parameters = _rope_parameters(module)
    rotated = getattr(host, "rotary_ndims", None)
    if rotated is not None:
        parameters["partial_rotary_factor"] = rotated / host.head_dim
    elif parameters.get("rope_type", "default") == "default":
        # These hosts turn whole heads then, whatever it says.
        parameters.pop("partial_rotary_factor", None)
    return RotaryConfig.from_parameters(
        parameters,
        head_dim=int(host.head_dim),
        max_positions=getattr(host.config, "max_position_embeddings", None),
    )


FAMILY = Family(name="llama", classes=CLASSES, block=describe, with_weights=with_weights)
