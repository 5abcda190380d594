"""A layer of attnzoo in the place of a host's attention block.

The layer's projections are the host's own modules, so that optimisers, tied weights and hooks stay as they are. What it
remembers lies in the host's cache as a layer of its own kind, see :mod:`attnzoo.surgery.hosts.cache_layer`.

Letters: B batch, T query tokens, S slots of the host's cache (padding has slots too), C model width.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attnzoo.base.layer import AttentionConfig, AttentionLayer
from attnzoo.surgery.hosts import attention_function
from attnzoo.surgery.hosts.calls import read_call
from attnzoo_kernels.errors import ConversionError, ShapeError, UnsupportedError

if TYPE_CHECKING:
    from attnzoo.surgery.hosts.cache_layer import SeatCacheLayer

ROLES = ("q_proj", "k_proj", "v_proj", "o_proj")


class LayerSeat(nn.Module):
    """An attnzoo layer that a host of the Llama family calls as its attention block.

    Attributes:
        layer: The layer; its ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj`` are the host's.
        variant: The layer's variant.
        by_slot: Whether the layer numbers the tokens itself; then a call's positions must be consecutive. Else the
            host's positions are what the layer rotates by.
        slots_per_token: Slots that the layer's cache has for each of the host's tokens.
    """

    needs_interface = True

    def __init__(
        self, layer: AttentionLayer, host: nn.Module, *, by_slot: bool = False, slots_per_token: float = 1.0
    ) -> None:
        super().__init__()
        block: Any = host
        self.config, self.layer_idx = block.config, int(block.layer_idx)
        self.head_dim, self.scaling, self.is_causal = layer.config.head_width, float(block.scaling), True
        self.attention_dropout = float(getattr(block, "attention_dropout", 0.0))
        self.by_slot, self.slots_per_token = by_slot, slots_per_token
        for role in ROLES:
            old, new = getattr(block, role), getattr(layer, role)
            if old.weight.shape != new.weight.shape:
                raise ConversionError(f"{role}: expected {list(new.weight.shape)}, got {list(old.weight.shape)}")
            setattr(layer, role, old)
        self.layer = layer
        # The host's own modules keep their mode: nothing of the model changes before the seat is placed.
        kept = {id(module) for role in ROLES for module in getattr(block, role).modules()}
        for module in self.modules():
            if id(module) not in kept:
                module.training = host.training

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        attention_function.register()

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
        held = None if call.cache is None else self._held(call.cache)
        first, tokens = 0 if held is None else held.seen, hidden_states.shape[1]
        geometry = attention_function.geometry_of(attention_mask, tokens, first + tokens)
        real = _real_slots(geometry, held, first, tokens)
        padding = None if real is None else ~real[:, first:]
        positions = self._positions(call.position_ids, position_embeddings, first, real)
        if held is None:
            return self.layer(hidden_states, positions, padding), None
        memory = held.room(self.layer, hidden_states)
        out = self.layer(hidden_states, positions, padding, memory)
        held.note(tokens, real)
        return out, None

    def _held(self, cache: Any) -> SeatCacheLayer:
        # Importing the host's library is for callers who have one of its caches.
        from attnzoo.surgery.hosts.cache_layer import seat_layer

        return seat_layer(cache, self.layer_idx)

    def _positions(self, ids: Tensor | None, embeddings: Any, first: int, real: Tensor | None) -> Tensor | None:
        if self.by_slot:
            attention_function.check_consecutive(ids, first, real, f"a seat of {self.variant!r}")
            return None
        if ids is None and embeddings is not None and self.layer.config.rotary is not None:
            raise UnsupportedError("position_ids: expected beside position_embeddings, got None")
        return ids


def _real_slots(
    geometry: attention_function.Geometry, held: SeatCacheLayer | None, first: int, tokens: int
) -> Tensor | None:
    """Which slots up to a call's last hold tokens, bool ``[B, S]``, after checking it against earlier calls."""
    if isinstance(geometry.first, Tensor) or geometry.first != first:
        raise ShapeError(f"attention_mask: expected one whose queries begin at slot {first}, got {geometry.first}")
    real, before = geometry.real, None if held is None else held.real
    if real is None:
        if before is not None:
            raise ShapeError("attention_mask: expected the padding of earlier calls again, got none")
        return None
    if real.shape[1] < first + tokens:
        raise ShapeError(f"attention_mask: expected {first + tokens} slots, got {real.shape[1]}")
    real = real[:, : first + tokens].bool()
    if first and not torch.compiler.is_compiling():
        past = real[:, :first]
        if not (bool(past.all()) if before is None else torch.equal(past, before)):
            raise ShapeError("attention_mask: expected the padding of earlier calls again, got another")
    return real
