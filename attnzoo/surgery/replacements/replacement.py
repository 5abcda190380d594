"""A layer of attnzoo in the place of a host's attention block.

The layer's projections are the host's own modules, so that optimisers, tied weights and hooks stay as they are. What it
remembers lies in the host's cache as a layer of its own kind, see :mod:`attnzoo.surgery.hosts.caches.cache_layer`.

Letters: B batch, T query tokens, S slots of the host's cache (padding has slots too), C model width.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from attnzoo.base.layer import AttentionConfig, AttentionLayer
from attnzoo.surgery.hosts import attention_function
from attnzoo.surgery.hosts.block import ROLES, Block, Need, ReplacementModule
from attnzoo.surgery.hosts.calls import read_call
from attnzoo.surgery.hosts.families.known import block_of, family_of
from attnzoo.surgery.hosts.positions import are_counted, check_consecutive, real_slots
from attnzoo.surgery.hosts.projections import Projections, size_of
from attnzoo_kernels.errors import ConversionError, ShapeError, UnsupportedError

if TYPE_CHECKING:
    from attnzoo.surgery.hosts.caches.cache_layer import ReplacementCacheLayer


class Replacement(ReplacementModule):
    """An attnzoo layer that a host calls as its attention block.

    Attributes:
        layer: The layer; its ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj`` are the host's.
        variant: The layer's variant.
        by_slot: Whether the layer numbers the tokens itself; then a call's positions must be consecutive. Else the
            host's positions are what the layer rotates by.
        slots_per_token: Slots that the layer's cache has for each of the host's tokens.
    """

    def __init__(
        self, layer: AttentionLayer, host: nn.Module, *, by_slot: bool = False, slots_per_token: float = 1.0
    ) -> None:
        super().__init__(host, family_of(host).name)
        block = block_of(host)
        self.head_dim = layer.config.head_width
        self.scaling = block.scale
        self.attention_dropout = block.dropout
        self.by_slot = by_slot
        self.slots_per_token = slots_per_token
        for role, old in block.projections.items():
            new = getattr(layer, role)
            if old.weight.shape != new.weight.shape:
                raise ConversionError(f"{role}: expected {list(new.weight.shape)}, got {list(old.weight.shape)}")
            setattr(layer, role, old)
        self.layer = layer
        # The host's own modules keep their mode: nothing of the model changes before the replacement is placed.
        kept = {id(module) for old in block.projections.values() for module in old.modules()}
        for module in self.modules():
            if id(module) not in kept:
                module.training = host.training

    def block(self) -> Block:
        """What a family says about its blocks, of this module."""
        config = self.layer.config
        reason = f"it is a replacement by {self.variant!r} already; undo that conversion first"
        return Block(
            heads=size_of(self, "q_proj", "out_features") // self.head_dim,
            kv_heads=size_of(self, "k_proj", "out_features") // self.head_dim,
            head_dim=self.head_dim,
            value_dim=self.head_dim,
            width=size_of(self, "q_proj", "in_features"),
            cached_values=lambda: -(-self.bytes_per_token // self.q_proj.weight.element_size()),
            project=self._project,
            output=self.o_proj,
            projections={role: getattr(self.layer, role) for role in ROLES},
            weights=self._weights,
            rotary=lambda: config.rotary,
            rope_type=None,
            scale=self.scaling,
            causal=config.causal,
            window=None,
            reply="pair",
            reasons=dict.fromkeys(Need, (reason,)),
        )

    @property
    def variant(self) -> str:
        """The name of the layer's variant."""
        return self.layer.config.kind

    @property
    def current_config(self) -> AttentionConfig:
        """The layer's configuration, with the attributes of it that may be set later as they are now."""
        config: AttentionConfig = getattr(self.layer, "current_config", self.layer.config)
        return config

    @property
    def q_proj(self) -> nn.Linear:
        """The host's query projection."""
        return self.layer.q_proj

    @property
    def k_proj(self) -> nn.Linear:
        """The host's key projection."""
        return self.layer.k_proj

    @property
    def v_proj(self) -> nn.Linear:
        """The host's value projection."""
        return self.layer.v_proj

    @property
    def o_proj(self) -> nn.Linear:
        """The host's output projection."""
        return self.layer.o_proj

    @property
    def bytes_per_token(self) -> int:
        """Bytes that the layer's cache holds for each of the host's tokens, rounded up."""
        return math.ceil(self.layer.new_cache(1, 1, device="meta").bytes_per_token * self.slots_per_token)

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
            UnsupportedError: If an argument, a mask or a cache cannot be honoured.
            ShapeError: If mask and cache disagree about earlier tokens.
        """
        call = read_call(kwargs, cache)
        attention_function.check_implementation(self.config)
        if self.training and self.attention_dropout:
            raise UnsupportedError(
                f"dropout: expected 0, got {self.attention_dropout}; attention dropout is not offered"
            )
        # The KV cache: the layer's own, in the host's.
        held = None if call.cache is None else self._held(call.cache)
        first = 0 if held is None else held.seen
        tokens = hidden_states.shape[1]
        # Padding and positions, as the host gives them.
        geometry = attention_function.geometry_of(attention_mask, tokens, first + tokens)
        real = _real_slots(geometry, held, first, tokens)
        padding = None if real is None else ~real[:, first:]
        positions = self._positions(call.position_ids, position_embeddings, first, real)
        every = self.layer.tokens_per_landmark
        if positions is not None and real is None and are_counted(positions, first, every):
            # What the layer counts by itself needs no table of positions, and no plan in a decoding step.
            positions = None
        if held is None:
            return self.layer(hidden_states, positions, padding), None
        memory = held.room(self.layer, hidden_states)
        out = self.layer(hidden_states, positions, padding, memory)
        held.note(tokens, real)
        return out, None

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._heads(self.q_proj(x)), self._heads(self.k_proj(x)), self._heads(self.v_proj(x))

    def _heads(self, x: Tensor) -> Tensor:
        """``[B, T, h * D]`` to ``[B, h, T, D]``."""
        heads: Tensor = x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return heads

    def _weights(self) -> Projections:
        raise ConversionError(f"layer: expected a block of the host's, got one that {self.variant!r} computes")

    def _held(self, cache: Any) -> ReplacementCacheLayer:
        # Importing the host's library is for callers who have one of its caches.
        from attnzoo.surgery.hosts.caches.cache_layer import replacement_layer

        return replacement_layer(cache, self.layer_idx)

    def _positions(self, ids: Tensor | None, embeddings: Any, first: int, real: Tensor | None) -> Tensor | None:
        if self.by_slot:
            check_consecutive(ids, first, real, f"a replacement by {self.variant!r}")
            return None
        if ids is None and embeddings is not None and self.layer.config.rotary is not None:
            raise UnsupportedError("position_ids: expected beside position_embeddings, got None")
        return ids


def _real_slots(
    geometry: attention_function.Geometry, held: ReplacementCacheLayer | None, first: int, tokens: int
) -> Tensor | None:
    """Which slots up to a call's last hold tokens, bool ``[B, S]``, after checking it against earlier calls."""
    if isinstance(geometry.first, Tensor) or geometry.first != first:
        raise ShapeError(f"attention_mask: expected one whose queries begin at slot {first}, got {geometry.first}")
    return real_slots(geometry.real, None if held is None else held.real, first, tokens)
