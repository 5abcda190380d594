"""Families whose blocks project queries, keys and values by one module: Phi-3, GPT-NeoX and GPT-2.

They differ in names, in the order of the projection's rows, in rotation, and in GPT-2's transposed weights; a table's
row says it. Phi-3 has a setting for KV heads, so that fewer of them are an ordinary checkpoint; the other two have
none, and a block with fewer is a :class:`GroupedAttention`.

Letters: B batch, T query tokens, C model width, H query heads, G KV heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attnzoo.surgery.hosts.block import AttentionBlock, Family
from attnzoo.surgery.hosts.families.grouped import GroupedAttention
from attnzoo.surgery.hosts.families.reasons import reasons_for
from attnzoo.surgery.hosts.families.rotation import Rotation
from attnzoo.surgery.hosts.families.same_class import keep_rest, of_same_class
from attnzoo.surgery.hosts.projections import Projections, product_weights, set_weights

Order = Literal["roles", "heads"]


@dataclass(frozen=True, kw_only=True)
class FusedRows:
    """How the rows of one projection are those of queries, keys and values.

    Attributes:
        heads: H.
        kv_heads: G.
        head_dim: D.
        order: "roles": all queries, all keys, all values; "heads": each head's query, key and value, and G is H.
    """

    heads: int
    kv_heads: int
    head_dim: int
    order: Order

    def split(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Takes ``[..., n]`` apart into queries ``[..., H * D]``, keys and values, each with its heads in order."""
        if self.order == "heads":
            q, k, v = y.unflatten(-1, (self.heads, 3, self.head_dim)).unbind(-2)  # [..., H, D] each
            return q.flatten(-2), k.flatten(-2), v.flatten(-2)
        width = self.kv_heads * self.head_dim
        q, k, v = y.split((self.heads * self.head_dim, width, width), -1)
        return q, k, v

    def fuse(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The inverse of :meth:`split`."""
        if self.order == "heads":
            parts = [x.unflatten(-1, (self.heads, self.head_dim)) for x in (q, k, v)]
            return torch.stack(parts, -2).flatten(-3)
        return torch.cat((q, k, v), -1)


@dataclass(frozen=True, kw_only=True)
class Names:
    """What one of these classes calls its parts.

    Attributes:
        family: Of the family.
        attention: The class.
        fused: The module that projects queries, keys and values.
        output: The module that projects outputs.
        order: Of the rows of ``fused``.
        head_dim: The attribute that is D.
        rotation: How the class rotates.
        has_kv_heads: Whether its configuration has a number of KV heads.
        dropout: The attribute that says what share of attention weights it drops in training.
        output_dropout: The module that drops a share of outputs, or ``None``.
    """

    family: str
    attention: str
    fused: str
    output: str
    order: Order
    head_dim: str
    rotation: Rotation
    has_kv_heads: bool
    dropout: str = "attention_dropout"
    output_dropout: str | None = None

    @property
    def own(self) -> Family:
        """The family of this class alone."""
        return Family(
            name=self.family,
            classes=(self.attention,),
            block=partial(describe, self),
            with_weights=partial(with_weights, self),
        )


PHI3 = Names(
    family="phi3",
    attention="Phi3Attention",
    fused="qkv_proj",
    output="o_proj",
    order="roles",
    head_dim="head_dim",
    rotation=Rotation("halves"),
    has_kv_heads=True,
)
GPT_NEOX = Names(
    family="gpt_neox",
    attention="GPTNeoXAttention",
    fused="query_key_value",
    output="dense",
    order="heads",
    head_dim="head_size",
    rotation=Rotation("halves"),
    has_kv_heads=False,
)
GPT2 = Names(
    family="gpt2",
    attention="GPT2Attention",
    fused="c_attn",
    output="c_proj",
    order="roles",
    head_dim="head_dim",
    rotation=Rotation(None),
    has_kv_heads=False,
    dropout="attn_dropout",
    output_dropout="resid_dropout",
)


def describe(names: Names, module: nn.Module) -> AttentionBlock:
    """A module of one of these classes; its projections may be anything that is called."""
    host: Any = module
    rows = _rows(names, host)
    fused = getattr(host, names.fused)
    return AttentionBlock(
        heads=rows.heads,
        kv_heads=rows.kv_heads,
        head_dim=rows.head_dim,
        value_dim=rows.head_dim,
        width=int(host.config.hidden_size),
        cached_values=partial(int, 2 * rows.kv_heads * rows.head_dim),
        project=partial(_project, names, host),
        output=partial(_output, names, host),
        projections={"q_proj": fused, "k_proj": fused, "v_proj": fused, "o_proj": getattr(host, names.output)},
        weights=partial(_weights, names, module),
        rotary=partial(names.rotation.read, host.config, rows.head_dim),
        rope_type=names.rotation.name(host.config),
        scale=float(host.scaling),
        causal=True,
        window=getattr(host.config, "sliding_window", None),
        reply="pair",
        reasons=reasons_for(module, always=_reasons(host)),
        split=rows.split,
        planes=names.rotation.planes,
        dropout=_share(getattr(host, names.dropout)),
        output_path=names.output,
        output_dropout=0.0 if names.output_dropout is None else _share(getattr(host, names.output_dropout)),
    )


def _rows(names: Names, host: Any) -> FusedRows:
    heads = int(host.config.num_attention_heads)
    return FusedRows(
        heads=heads,
        kv_heads=int(host.num_key_value_heads) if names.has_kv_heads else heads,
        head_dim=int(getattr(host, names.head_dim)),
        order=names.order,
    )


def _share(dropout: Any) -> float:
    """What a module or a number drops."""
    return float(getattr(dropout, "p", dropout))


def _reasons(host: Any) -> list[str]:
    if getattr(host.config, "add_cross_attention", False):
        return ["its model has cross-attention, which reads what another model says"]
    return []


def _project(names: Names, host: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of ``x [B, T, C]``, heads apart, not rotated."""
    rows = _rows(names, host)
    parts = rows.split(getattr(host, names.fused)(x))
    q, k, v = (part.unflatten(-1, (-1, rows.head_dim)).transpose(1, 2) for part in parts)  # [B, h, T, D] each
    return q, k, v


def _output(names: Names, host: Any, y: Tensor) -> Tensor:
    out: Tensor = getattr(host, names.output)(y)
    return out if names.output_dropout is None else getattr(host, names.output_dropout)(out)


def _weights(names: Names, module: nn.Module) -> Projections:
    """The weights by role: views of the host's, but for rows in the order of heads, which are copied."""
    host: Any = module
    rows = _rows(names, host)
    weight, bias = product_weights(getattr(host, names.fused), names.fused)
    o, o_bias = product_weights(getattr(host, names.output), names.output)
    q, k, v = (part.T for part in rows.split(weight.T))
    q_bias, k_bias, v_bias = (None, None, None) if bias is None else rows.split(bias)
    return Projections(
        q=q,
        k=k,
        v=v,
        o=o,
        q_bias=q_bias,
        k_bias=k_bias,
        v_bias=v_bias,
        o_bias=o_bias,
        num_heads=rows.heads,
        num_kv_heads=rows.kv_heads,
        head_dim=rows.head_dim,
        rotary=names.rotation.read(host.config, rows.head_dim),
        scale=float(host.scaling),
    )


def with_weights(names: Names, module: nn.Module, projections: Projections) -> nn.Module:
    """A block with other weights, fused again: one of the same class where that holds so many KV heads."""
    p = projections
    if isinstance(module, GroupedAttention):
        return GroupedAttention(module, module.block(), names.family, p)
    if not names.has_kv_heads and p.num_kv_heads != p.num_heads:
        return GroupedAttention(module, describe(names, module), names.family, p)
    host: Any = module
    new = of_same_class(module, p.num_kv_heads)
    rows = replace(_rows(names, host), kv_heads=p.num_kv_heads)
    bias = None
    if p.q_bias is not None and p.k_bias is not None and p.v_bias is not None:
        bias = rows.fuse(p.q_bias, p.k_bias, p.v_bias)
    fused = rows.fuse(p.q.T, p.k.T, p.v.T).T
    set_weights(getattr(new, names.fused), fused, bias, like=getattr(host, names.fused))
    set_weights(getattr(new, names.output), p.o, p.o_bias, like=getattr(host, names.output))
    keep_rest(new, module, (names.fused, names.output), p.num_kv_heads)
    return new


FAMILIES = (PHI3.own, GPT_NEOX.own, GPT2.own)
