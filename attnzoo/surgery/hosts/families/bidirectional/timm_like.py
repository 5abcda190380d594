"""Attention as timm writes it, in anybody's model: one product ``qkv``, norms of queries and keys, and ``proj``.

Recognised by attributes: its children are these and no others, it has no weights of its own beside them, and it is
called with ``x`` and nothing more than ``attn_mask`` and ``is_causal``. What has more, such as biases by distance, is
something else.

Source: huggingface/pytorch-image-models, ``timm.layers.Attention`` (1.0), read for its attributes.

Letters: B batch, T tokens, C model width, H heads, D head width.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from attnzoo.surgery.hosts.block import AttentionBlock, Family, Need, no_rotation
from attnzoo.surgery.hosts.families.bidirectional.grouped_encoder import GroupedEncoderAttention
from attnzoo.surgery.hosts.projections import Projections, as_linear

HOST = "timm"

_CHILDREN = {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop"}
_ARGUMENTS = {"x", "attn_mask", "is_causal"}


def recognise(module: nn.Module) -> bool:
    """Whether a module is such attention."""
    children = dict(module.named_children())
    host: Any = module
    return (
        {"qkv", "proj"} <= children.keys() <= _CHILDREN
        and all(isinstance(getattr(host, name, None), int) for name in ("num_heads", "head_dim"))
        and next(module.parameters(recurse=False), None) is None
        and set(list(inspect.signature(type(module).forward).parameters)[1:]) <= _ARGUMENTS
        and getattr(children["qkv"], "out_features", None) == 3 * host.num_heads * host.head_dim
    )


def describe(module: nn.Module) -> AttentionBlock:
    """A module of this family."""
    host: Any = module
    heads = int(host.num_heads)
    width = int(host.head_dim)
    return AttentionBlock(
        heads=heads,
        kv_heads=heads,
        head_dim=width,
        value_dim=width,
        width=int(host.qkv.in_features),
        cached_values=int,
        project=partial(_project, host),
        output=partial(_output, host),
        projections={"q_proj": host.qkv, "k_proj": host.qkv, "v_proj": host.qkv, "o_proj": host.proj},
        split=split,
        weights=partial(_weights, host),
        rotary=no_rotation,
        rope_type=None,
        scale=float(getattr(host, "scale", width**-0.5)),
        causal=False,
        window=None,
        reply="tensor",
        reasons=_reasons(host),
        planes=None,
        dropout=float(getattr(getattr(host, "attn_drop", None), "p", 0.0)),
        output_path="proj" if _is_nothing(getattr(host, "norm", None)) else "norm",
    )


def split(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the one product gives, ``[..., 3 * H * D]``, apart."""
    q, k, v = x.chunk(3, -1)
    return q, k, v


def _project(host: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[B, H, T, D]`` of ``x [B, T, C]``, normalised where the module does it."""
    q, k, v = (part.unflatten(-1, (host.num_heads, -1)).transpose(1, 2) for part in split(host.qkv(x)))
    for name in ("q_norm", "k_norm"):
        norm = getattr(host, name, None)
        if norm is not None and name == "q_norm":
            q = norm(q)
        elif norm is not None:
            k = norm(k)
    return q, k, v


def _output(host: Any, y: Tensor) -> Tensor:
    """The output ``[B, T, C]`` of joined heads ``[B, T, H * D]``, normalised and dropped out of as the module does."""
    steps = (getattr(host, name, None) for name in ("norm", "proj", "proj_drop"))
    for step in steps:
        y = y if step is None else step(y)
    return y


def _weights(host: Any) -> Projections:
    """The weights of a module, by reference."""
    qkv = as_linear(host.qkv, "qkv")
    proj = as_linear(host.proj, "o_proj")
    q, k, v = qkv.weight.chunk(3)
    q_bias, k_bias, v_bias = (None, None, None) if qkv.bias is None else qkv.bias.chunk(3)
    return Projections(
        q=q,
        k=k,
        v=v,
        o=proj.weight,
        q_bias=q_bias,
        k_bias=k_bias,
        v_bias=v_bias,
        o_bias=proj.bias,
        num_heads=int(host.num_heads),
        num_kv_heads=int(host.num_heads),
        head_dim=int(host.head_dim),
        rotary=None,
        scale=float(getattr(host, "scale", host.head_dim**-0.5)),
    )


def _reasons(host: Any) -> Mapping[Need, tuple[str, ...]]:
    """Why other weights cannot be given to a module."""
    norms = [name for name in ("q_norm", "k_norm", "norm") if not _is_nothing(getattr(host, name, None))]
    weights = tuple(f"it has a {name}, which needs merged heads with a norm of their own" for name in norms)
    return {Need.READING: (), Need.WEIGHTS: weights, Need.REPLACING: ()}


def _is_nothing(module: nn.Module | None) -> bool:
    return module is None or isinstance(module, nn.Identity)


def with_weights(module: nn.Module, projections: Projections) -> nn.Module:
    """A module with fewer heads of keys and values, which no longer has one product for all; the original stays."""
    old = module.block() if isinstance(module, GroupedEncoderAttention) else describe(module)
    return GroupedEncoderAttention(module, old, HOST, projections)


FAMILY = Family(
    name=HOST,
    classes=("Attention (timm's qkv and proj)",),
    block=describe,
    with_weights=with_weights,
    recognise=recognise,
)
