"""A layer of attnzoo in the place of a host's attention block.

The host's own modules project, under their names, so that optimisers, tied weights, adapters and hooks stay as they
are; what the block does round them, such as norms, is done as the family says. What the layer remembers lies in the
host's cache as a layer of its own kind, see :mod:`attnzoo.surgery.hosts.caches.cache_layer`.

Letters: B batch, T query tokens, S slots of the host's cache (padding has slots too), C model width.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from attnzoo.base.layer import AttentionConfig, AttentionLayer
from attnzoo.surgery.hosts import attention_function
from attnzoo.surgery.hosts.block import ROLES, AttentionBlock, Need, ReplacementModule
from attnzoo.surgery.hosts.calls import as_reply, named_arguments, read_call
from attnzoo.surgery.hosts.families.known import family_of
from attnzoo.surgery.hosts.positions import are_counted, check_consecutive, real_slots
from attnzoo.surgery.hosts.projections import Projections
from attnzoo.surgery.replacements.host_projector import HostProjector, adopt, view_of
from attnzoo_kernels.errors import ConversionError, ShapeError, UnsupportedError

if TYPE_CHECKING:
    from attnzoo.surgery.hosts.caches.cache_layer import ReplacementCacheLayer


class Replacement(ReplacementModule):
    """An attnzoo layer that a host calls as its attention block.

    Attributes:
        layer: The layer; it has no projections of its own.
        variant: The layer's variant.
        by_slot: Whether the layer numbers the tokens itself; then a call's positions must be consecutive. Else the
            host's positions are what the layer rotates by.
        slots_per_token: Slots that the layer's cache has for each of the host's tokens.
        arguments: What the host's own block calls its arguments, in their order.
        reply: What the host unpacks.
        drops: The share of attention weights that the host drops in training.
        finish: What follows inside the block, see :class:`~attnzoo.surgery.hosts.block.AttentionBlock`.
    """

    def __init__(
        self, layer: AttentionLayer, host: nn.Module, *, by_slot: bool = False, slots_per_token: float = 1.0
    ) -> None:
        super().__init__(host, family_of(host).name)
        self.by_slot = by_slot
        self.slots_per_token = slots_per_token
        adopt(self, host)
        # The host's own modules keep their mode: nothing of the model changes before the replacement is placed.
        kept = {id(module) for module in self.modules()} - {id(self)}
        projector = HostProjector(view_of(self, host))
        block = projector.block
        self.head_dim = block.head_dim
        self.scaling = block.scale
        self.drops = block.dropout
        self.reply = block.reply
        self.finish = block.finish
        self.arguments = tuple(inspect.signature(type(host).forward).parameters)[1:]
        layer.project_by(projector)
        self.layer = layer
        for module in self.modules():
            if id(module) not in kept:
                module.training = host.training

    @property
    def projector(self) -> HostProjector:
        """What projects: the host's modules."""
        return cast(HostProjector, self.layer.projector)

    def block(self) -> AttentionBlock:
        """What a family says about its blocks, of this module."""
        config = self.layer.config
        reason = f"it is a replacement by {self.variant!r} already; undo that conversion first"
        return replace(
            self.projector.block,
            projections={role: module for role in ROLES if (module := self.projector.module(role)) is not None},
            cached_values=lambda: -(-self.bytes_per_token // self.layer.compute_dtype.itemsize),
            weights=self._weights,
            rotary=lambda: config.rotary,
            rope_type=None,
            causal=config.causal,
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
    def bytes_per_token(self) -> int:
        """Bytes that the layer's cache holds for each of the host's tokens, rounded up; 0 where it has none."""
        if not self.layer.config.causal:
            return 0
        return math.ceil(self.layer.new_cache(1, 1, device="meta").bytes_per_token * self.slots_per_token)

    def forward(self, *given: Any, **named: Any) -> Any:
        """As the host calls it: ``[B, T, C]`` to ``[B, T, C]``, in what the host's own block answers with.

        Raises:
            UnsupportedError: If an argument, a mask or a cache cannot be honoured.
            ShapeError: If mask and cache disagree about earlier tokens.
        """
        arguments = named_arguments(self.arguments, given, named)
        hidden_states: Tensor = arguments.pop(self.arguments[0])
        embeddings = arguments.pop("position_embeddings", None)
        attention_mask = arguments.pop("attention_mask", None)
        causal = self.layer.config.causal
        call = read_call(arguments, causal=causal)
        if self.needs_interface:
            attention_function.check_implementation(self.config)
        if self.training and self.drops:
            raise UnsupportedError(f"dropout: expected 0, got {self.drops}; attention dropout is not offered")
        # The KV cache: the layer's own, in the host's.
        held = None if call.cache is None else self._held(call.cache)
        first = 0 if held is None else held.seen
        tokens = hidden_states.shape[1]
        # Padding and positions, as the host gives them.
        geometry = attention_function.geometry_of(attention_mask, tokens, first + tokens, causal=causal)
        real = _real_slots(geometry, held, first, tokens)
        padding = None if real is None else ~real[:, first:]
        positions = self._positions(call.position_ids, embeddings, first, real)
        every = self.layer.tokens_per_landmark
        if positions is not None and real is None and are_counted(positions, first, every):
            # What the layer counts by itself needs no table of positions, and no plan in a decoding step.
            positions = None
        if held is None:
            return as_reply(self.reply, self._finished(hidden_states, self.layer(hidden_states, positions, padding)))
        memory = held.room(self.layer, hidden_states)
        out = self.layer(hidden_states, positions, padding, memory)
        held.note(tokens, real)
        return as_reply(self.reply, self._finished(hidden_states, out), call.cache)

    def _finished(self, x: Tensor, out: Tensor) -> Tensor:
        return out if self.finish is None else self.finish(self, x, out)

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
