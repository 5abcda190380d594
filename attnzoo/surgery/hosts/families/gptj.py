"""GPT-J: separate projections without biases, and neighbours turned in the leading part of a head.

The host's tables are sines and cosines, in this order, of each plane once. Its configuration has no number of KV heads:
a block with fewer is a :class:`GroupedAttention`. Recognised from the version on in which it attends through the
attention interface.

Letters: B batch, T query tokens, C model width, H query heads, D head width.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.base.rope import RotaryConfig
from attnzoo.surgery.hosts.block import AttentionBlock, Family
from attnzoo.surgery.hosts.families.grouped import GroupedAttention
from attnzoo.surgery.hosts.families.reasons import reasons_for
from attnzoo.surgery.hosts.families.same_class import with_separate
from attnzoo.surgery.hosts.projections import Projections, as_linear

CLASS = "GPTJAttention"
NAMES = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "o_proj": "out_proj"}
"""What the class calls what projects, by role."""
BASE = 10_000.0
"""Of the rotation's angles; the configuration has none."""


def recognise(module: nn.Module) -> bool:
    """Whether a module is of this class, and attends through the attention interface."""
    return type(module).__name__ == CLASS and hasattr(module, "scaling")


def describe(module: nn.Module) -> AttentionBlock:
    """A module of this family; its projections may be anything that is called."""
    host: Any = module
    heads = int(host.num_attention_heads)
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
        rotary=partial(_rotary, host),
        rope_type="default",
        scale=float(host.scaling),
        causal=True,
        window=None,
        reply="pair",
        reasons=reasons_for(module),
        planes="neighbours",
        dropout=float(host.attention_dropout),
        output_dropout=float(host.resid_dropout.p),
        output_path=NAMES["o_proj"],
        tables=cosines_and_sines,
    )


def cosines_and_sines(tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Cosines and sines of all planes, twice, of the host's own tables."""
    sin, cos = tables
    return torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)


def _project(host: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of ``x [B, T, C]``, heads apart, not rotated."""
    parts = (host.q_proj(x), host.k_proj(x), host.v_proj(x))
    q, k, v = (part.unflatten(-1, (-1, host.head_dim)).transpose(1, 2) for part in parts)  # [B, H, T, D] each
    return q, k, v


def _output(host: Any, y: Tensor) -> Tensor:
    out: Tensor = host.resid_dropout(host.out_proj(y))
    return out


def _rotary(host: Any) -> RotaryConfig:
    rotated = host.rotary_dim or host.head_dim
    return RotaryConfig.from_parameters(
        {"rope_type": "default", "rope_theta": BASE, "partial_rotary_factor": rotated / host.head_dim},
        head_dim=int(host.head_dim),
        max_positions=getattr(host.config, "max_position_embeddings", None),
        interleaved=True,
    )


def _weights(module: nn.Module) -> Projections:
    """The weights of a module, by reference."""
    host: Any = module
    return Projections.of_linears(
        (as_linear(getattr(module, name), name) for name in NAMES.values()),
        head_dim=int(host.head_dim),
        rotary=_rotary(host),
        scale=float(host.scaling),
    )


def with_weights(module: nn.Module, projections: Projections) -> nn.Module:
    """A block with other weights: one of the same class where it has as many KV heads as query heads."""
    p = projections
    if isinstance(module, GroupedAttention):
        return GroupedAttention(module, module.block(), FAMILY.name, p)
    biases = (p.q_bias, p.k_bias, p.v_bias, p.o_bias)
    if p.num_kv_heads != p.num_heads or any(bias is not None for bias in biases):
        return GroupedAttention(module, describe(module), FAMILY.name, p)
    return with_separate(module, NAMES, p)


FAMILY = Family(name="gptj", classes=(CLASS,), block=describe, with_weights=with_weights, recognise=recognise)
