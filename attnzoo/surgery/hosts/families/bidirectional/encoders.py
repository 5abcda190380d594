"""Encoders of transformers: tokens read what comes before and behind, positions are learned, and nothing is cached.

In BERT and what is built like it the output's projection stands outside the attention module, with the norm and the
residual: a block here is the module inside, whose output is what its heads give. ALBERT has all of them in the module,
which the model applies in every layer.

Recognised by class name and attributes, so that nothing is imported before a model is there: up to transformers 5.22
``ViTAttention`` is the name of what holds a ``ViTSelfAttention``.

Letters: B batch, T tokens, C model width, H query heads, D head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.base.evicting.policy import PolicyAttention
from attnzoo.surgery.hosts import attention_function
from attnzoo.surgery.hosts.block import ROLES, AttentionBlock, Family, Need, no_rotation
from attnzoo.surgery.hosts.families.bidirectional.grouped_encoder import GroupedEncoderAttention
from attnzoo.surgery.hosts.projections import Projections, as_linear, size_of

_OUTSIDE_PATH = "output.dense"
"""Where the output's projection stands outside of the module: its path from what holds both."""

_HEAD_WIDTHS = ("attention_head_size", "head_dim")
"""What classes call the width of a head."""


@dataclass(frozen=True)
class _Names:
    """What a class calls its projections.

    Attributes:
        inputs: Those of queries, keys and values.
        output: The output's; ``None`` where it stands outside the module.
        norm: That of the sum of the module's input and its output, where it is inside.
    """

    inputs: tuple[str, str, str]
    output: str | None = None
    norm: str | None = None


_OUTSIDE = _Names(("query", "key", "value"))
_AS_LAYERS_HERE = _Names(("q_proj", "k_proj", "v_proj"), "o_proj")

_NAMES: dict[str, tuple[_Names, ...]] = {
    "BertSelfAttention": (_OUTSIDE,),
    "BertCrossAttention": (_OUTSIDE,),
    "RobertaSelfAttention": (_OUTSIDE,),
    "RobertaCrossAttention": (_OUTSIDE,),
    "AlbertAttention": (_Names(("query", "key", "value"), "dense", "LayerNorm"),),
    "DistilBertSelfAttention": (_Names(("q_lin", "k_lin", "v_lin"), "out_lin"),),
    "ViTAttention": (_AS_LAYERS_HERE,),
    "ViTSelfAttention": (_OUTSIDE,),
    "DeiTAttention": (_AS_LAYERS_HERE,),
    "DeiTSelfAttention": (_OUTSIDE,),
}
"""By class, what its versions call their projections."""


def recognise(module: nn.Module) -> bool:
    """Whether a module is one of these classes, with the projections that its name lets expect."""
    return _names_of(module) is not None


def _names_of(module: nn.Module) -> _Names | None:
    known = _NAMES.get(type(module).__name__, ())
    return next((names for names in known if all(hasattr(module, name) for name in names.inputs)), None)


def describe(module: nn.Module) -> AttentionBlock:
    """A module of this family; to be looked at, its projections need their sizes alone.

    Raises:
        ConversionError: If a projection does not say its sizes.
    """
    host: Any = module
    names = _names_of(module) or _OUTSIDE
    head_dim = int(next(getattr(host, name) for name in _HEAD_WIDTHS if hasattr(host, name)))
    heads = size_of(module, names.inputs[0], "out_features") // head_dim
    roles = dict(zip(ROLES, (*names.inputs, names.output), strict=True))
    return AttentionBlock(
        heads=heads,
        kv_heads=size_of(module, names.inputs[1], "out_features") // head_dim,
        head_dim=head_dim,
        value_dim=head_dim,
        width=size_of(module, names.inputs[0], "in_features"),
        cached_values=int,
        project=partial(_project, host, names, head_dim),
        output=partial(_output, host, names.output),
        projections={role: getattr(module, name) for role, name in roles.items() if name is not None},
        weights=partial(_weights, module, names, head_dim),
        rotary=no_rotation,
        rope_type=None,
        scale=float(host.scaling),
        causal=host.is_causal is not False,
        window=None,
        reply="pair",
        reasons=_reasons(module),
        planes=None,
        dropout=_dropout(host),
        finish=None if names.norm is None else partial(_add_and_norm, names.norm),
        output_path=names.output or _OUTSIDE_PATH,
        output_outside=names.output is None,
    )


def _dropout(host: Any) -> float:
    """The share of attention weights that is dropped in training, which classes keep as a module or as a number."""
    found = next(
        getattr(host, name) for name in ("attention_dropout", "dropout_prob", "dropout") if hasattr(host, name)
    )
    return float(getattr(found, "p", found))


def _project(host: Any, names: _Names, head_dim: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[B, H, T, D]`` of ``x [B, T, C]``."""
    q, k, v = (getattr(host, name)(x).unflatten(-1, (-1, head_dim)).transpose(1, 2) for name in names.inputs)
    return q, k, v


def _output(host: Any, name: str | None, y: Tensor) -> Tensor:
    """The output ``[B, T, C]`` of the heads' ``[B, T, H * D]``."""
    out: Tensor = y if name is None else getattr(host, name)(y)
    return out


def _add_and_norm(norm: str, holder: Any, x: Tensor, y: Tensor) -> Tensor:
    """The norm of the module's input and its output, which is dropped out of in training."""
    found: Tensor = getattr(holder, norm)(x + holder.output_dropout(y))
    return found


def _weights(module: nn.Module, names: _Names, head_dim: int) -> Projections:
    """The weights of a module, by reference; a projection that is not there is the identity."""
    host: Any = module
    q, k, v = (as_linear(getattr(module, name), role) for role, name in zip(ROLES, names.inputs, strict=False))
    if names.output is None:
        o = torch.eye(v.out_features, dtype=v.weight.dtype, device=v.weight.device)
        o_bias = None
    else:
        out = as_linear(getattr(module, names.output), "o_proj")
        o = out.weight
        o_bias = out.bias
    return Projections(
        q=q.weight,
        k=k.weight,
        v=v.weight,
        o=o,
        q_bias=q.bias,
        k_bias=k.bias,
        v_bias=v.bias,
        o_bias=o_bias,
        num_heads=q.out_features // head_dim,
        num_kv_heads=k.out_features // head_dim,
        head_dim=head_dim,
        rotary=None,
        scale=float(host.scaling),
    )


def _reasons(module: nn.Module) -> Mapping[Need, tuple[str, ...]]:
    """Why a module cannot be converted to what is read, to other weights, or be replaced."""
    own: list[str] = []
    if "Cross" in type(module).__name__:
        own.append("it is cross attention, whose keys come from another sequence")
    elif getattr(module, "is_causal", False):
        own.append("it is the attention of a decoder (is_decoder), and blocks of this family are converted in encoders")
    reading = list(own)
    replacing = list(own)
    pattern = attention_function.pattern_of(module)
    if pattern is not None:
        replacing.insert(0, "it follows a read pattern, which a replacement would not; undo that conversion first")
        if isinstance(pattern.layer, PolicyAttention):
            reading.insert(0, f"it follows {pattern.layer.policy}; undo that conversion first")
    return {Need.READING: tuple(reading), Need.WEIGHTS: tuple(replacing), Need.REPLACING: tuple(replacing)}


def with_weights(module: nn.Module, projections: Projections) -> nn.Module:
    """A block with other weights, of fewer KV heads maybe, which the host's classes cannot hold; the original stays."""
    old = module.block() if isinstance(module, GroupedEncoderAttention) else describe(module)
    return GroupedEncoderAttention(module, old, FAMILY.name, projections)


FAMILY = Family(name="encoders", classes=tuple(_NAMES), block=describe, with_weights=with_weights, recognise=recognise)
