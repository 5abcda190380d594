"""A block with fewer KV heads than query heads, in hosts whose own classes have no setting for it.

Letters: B batch, T query tokens, S slots, C model width, H query heads, G KV heads, D head width.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from attnzoo.base.rope import RotaryConfig, apply_rotary
from attnzoo.surgery.hosts import attention_function
from attnzoo.surgery.hosts.attending import attend_as_host
from attnzoo.surgery.hosts.block import ROLES, AttentionBlock, ReplacementModule
from attnzoo.surgery.hosts.calls import take_cache
from attnzoo.surgery.hosts.families.reasons import reasons_for
from attnzoo.surgery.hosts.projections import Projections, new_linear


class GroupedAttention(ReplacementModule):
    """Grouped-query attention as an ordinary block of a host.

    It attends by whatever implementation the host is set to, and keeps G heads in the host's cache. Queries and keys
    are rotated by the host's own tables.

    Attributes:
        scaling: The factor on scores, as the host's block has it.
        query_factor: What the host's block multiplies its queries by beside that.
        num_key_value_groups: H / G, which implementations of attention ask for.
    """

    needs_interface = False

    def __init__(self, host: nn.Module, old: AttentionBlock, family: str, projections: Projections) -> None:
        super().__init__(host, family)
        p = projections
        self.head_dim = p.head_dim
        self.num_key_value_groups = p.num_heads // p.num_kv_heads
        self.scaling = old.asked_scale
        self.query_factor = p.scale / self.scaling
        self.rotary = p.rotary
        self.planes = old.planes
        self.tables = old.tables
        self.rope_type = old.rope_type
        self.attention_dropout = old.dropout
        self.output_dropout = old.output_dropout
        parts = {"q": p.q_bias, "k": p.k_bias, "v": p.v_bias, "o": p.o_bias}
        for name, bias in parts.items():
            weight: Tensor = getattr(p, name)
            role = f"{name}_proj"
            self.add_module(role, new_linear(weight, bias, like=old.projections[role]))
        attention_function.take_over(self, host, p.num_kv_heads)

    def block(self) -> AttentionBlock:
        """What a family says about its blocks, of this module."""
        q, k, v, o = (self.get_submodule(role) for role in ROLES)
        kv_heads = int(k.out_features) // self.head_dim  # type: ignore[arg-type]
        return AttentionBlock(
            heads=kv_heads * self.num_key_value_groups,
            kv_heads=kv_heads,
            head_dim=self.head_dim,
            value_dim=self.head_dim,
            width=int(q.in_features),  # type: ignore[arg-type]
            cached_values=partial(int, 2 * kv_heads * self.head_dim),
            project=self._project,
            output=self._output,
            projections={"q_proj": q, "k_proj": k, "v_proj": v, "o_proj": o},
            weights=self._weights,
            rotary=self._rotation,
            rope_type=self.rope_type,
            scale=self.scaling * self.query_factor,
            query_factor=self.query_factor,
            causal=True,
            window=None,
            reply="pair",
            reasons=reasons_for(self),
            planes=self.planes,
            tables=self.tables,
            dropout=self.attention_dropout,
            output_dropout=self.output_dropout,
        )

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Any = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        """As the host calls it: ``[B, T, C]`` to ``[B, T, C]`` and what its attention says of weights."""
        cache = take_cache(kwargs, cache)
        q, k, v = self._project(hidden_states)
        q = q * self.query_factor if self.query_factor != 1 else q
        if self.planes is not None and position_embeddings is not None:
            # The host's tables have each plane twice.
            cos, sin = self.tables(position_embeddings)
            planes = cos.shape[-1] // 2
            cos, sin = cos[..., :planes], sin[..., :planes]
            q, k = (apply_rotary(x, cos, sin, self.planes == "neighbours") for x in (q, k))
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        share = self.attention_dropout if self.training else 0.0
        attend = attend_as_host(self.config)
        out, weights = attend(self, q, k, v, attention_mask, dropout=share, scaling=self.scaling, **kwargs)
        return self._output(out.flatten(2)), weights

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (self.get_submodule(role)(x).unflatten(-1, (-1, self.head_dim)) for role in ROLES[:3])
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def _output(self, y: Tensor) -> Tensor:
        out: Tensor = self.get_submodule("o_proj")(y)
        return nn.functional.dropout(out, self.output_dropout, self.training)

    def _rotation(self) -> RotaryConfig | None:
        return self.rotary

    def _weights(self) -> Projections:
        return Projections.of_linears(
            (self.get_submodule(role) for role in ROLES),
            head_dim=self.head_dim,
            rotary=self.rotary,
            scale=self.scaling * self.query_factor,
        )
