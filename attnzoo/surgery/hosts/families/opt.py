"""OPT: separate projections with biases, learned positions, no rotation, and queries scaled before their products.

Its configuration has no number of KV heads: a block with fewer is a :class:`GroupedAttention`.

Letters: B batch, T query tokens, C model width, H query heads, D head width.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from attnzoo.surgery.hosts.block import AttentionBlock, Family, no_rotation
from attnzoo.surgery.hosts.families.grouped import GroupedAttention
from attnzoo.surgery.hosts.families.reasons import reasons_for
from attnzoo.surgery.hosts.families.same_class import with_separate
from attnzoo.surgery.hosts.projections import Projections, product_weights

NAMES = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "o_proj": "out_proj"}
"""What the class calls what projects, by role."""


def describe(module: nn.Module) -> AttentionBlock:
    """A module of this family, which multiplies its queries before it attends; its projections may be anything."""
    host: Any = module
    heads = int(host.num_heads)
    head_dim = int(host.head_dim)
    return AttentionBlock(
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        value_dim=head_dim,
        width=int(host.embed_dim),
        cached_values=partial(int, 2 * heads * head_dim),
        project=partial(_project, host),
        output=partial(_output, host),
        projections={role: getattr(module, name) for role, name in NAMES.items()},
        weights=partial(_weights, module),
        rotary=no_rotation,
        rope_type=None,
        scale=float(host.scaling),
        query_factor=float(host.scaling),
        causal=True,
        window=None,
        reply="pair",
        reasons=reasons_for(module),
        planes=None,
        dropout=float(host.dropout),
        numbers="tokens",
        output_path=NAMES["o_proj"],
    )


def _project(host: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, not scaled, keys and values of ``x [B, T, C]``, heads apart."""
    parts = (host.q_proj(x), host.k_proj(x), host.v_proj(x))
    q, k, v = (part.unflatten(-1, (-1, host.head_dim)).transpose(1, 2) for part in parts)  # [B, H, T, D] each
    return q, k, v


def _output(host: Any, y: Tensor) -> Tensor:
    out: Tensor = host.out_proj(y)
    return out


def _weights(module: nn.Module) -> Projections:
    """The weights of a module, by reference."""
    host: Any = module
    q, k, v, o = (product_weights(getattr(module, name), name) for name in NAMES.values())
    return Projections(
        q=q[0],
        k=k[0],
        v=v[0],
        o=o[0],
        q_bias=q[1],
        k_bias=k[1],
        v_bias=v[1],
        o_bias=o[1],
        num_heads=int(host.num_heads),
        num_kv_heads=int(host.num_heads),
        head_dim=int(host.head_dim),
        rotary=None,
        scale=float(host.scaling),
    )


def with_weights(module: nn.Module, projections: Projections) -> nn.Module:
    """A block with other weights: one of the same class where it has as many KV heads as query heads."""
    p = projections
    if isinstance(module, GroupedAttention):
        return GroupedAttention(module, module.block(), FAMILY.name, p)
    if p.num_kv_heads != p.num_heads:
        return GroupedAttention(module, describe(module), FAMILY.name, p)
    return with_separate(module, NAMES, p)


FAMILY = Family(name="opt", classes=("OPTAttention",), block=describe, with_weights=with_weights)
