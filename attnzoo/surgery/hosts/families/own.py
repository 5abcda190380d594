"""attnzoo's own layers, in anybody's model: nothing about them has to be found out, since they say it themselves.

Letters: B batch, T tokens, C model width, H query heads, G KV heads, D head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import cast

from torch import Tensor, nn

from attnzoo.base.layer import AttentionLayer
from attnzoo.base.rope import RotaryConfig
from attnzoo.base.weights import PROJECTIONS
from attnzoo.surgery.hosts.block import AttentionBlock, Family, Need
from attnzoo.surgery.hosts.projections import Projections, as_linear

HOST = "attnzoo"


def describe(module: nn.Module) -> AttentionBlock:
    """A layer, as its configuration has it."""
    layer = cast(AttentionLayer, module)
    config = layer.config
    return AttentionBlock(
        heads=config.num_heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_width,
        value_dim=config.head_width,
        width=config.dim,
        cached_values=partial(_cached_values, layer),
        project=partial(_project, layer),
        output=layer.output_of,
        projections={role: getattr(layer, role) for role in PROJECTIONS if hasattr(layer, role)},
        weights=partial(_weights, layer),
        rotary=partial(_rotary, layer),
        rope_type=None,
        scale=_scale(layer),
        causal=config.causal,
        window=None,
        reply="tensor",
        reasons=_reasons(layer),
        planes=None if config.rotary is None else "neighbours" if config.rotary.interleaved else "halves",
    )


def _cached_values(layer: AttentionLayer) -> int:
    """Values that its caches hold for each token; of a layer that is not causal there are none."""
    if not layer.config.causal:
        return 0
    return sum(stream.heads * stream.width for stream in layer.streams().values() if stream.dtype is None)


def _project(layer: AttentionLayer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return layer.heads_of(x)


def _rotary(layer: AttentionLayer) -> RotaryConfig | None:
    return layer.config.rotary


def _scale(layer: AttentionLayer) -> float:
    scale = layer.config.scale
    return float(layer.config.head_width**-0.5) if scale is None else float(scale)


def _weights(layer: AttentionLayer) -> Projections:
    """The weights of a layer, by reference."""
    return Projections.of_linears(
        (as_linear(getattr(layer, role, None), role) for role in PROJECTIONS),
        head_dim=layer.config.head_width,
        rotary=layer.config.rotary,
        scale=_scale(layer),
    )


def _reasons(layer: AttentionLayer) -> Mapping[Need, tuple[str, ...]]:
    """Why a layer's place cannot be taken: what it has beside four projections would be lost."""
    own = [name for name, _ in layer.named_parameters() if name.partition(".")[0] not in PROJECTIONS]
    reasons: tuple[str, ...] = ()
    if own:
        reasons = (f"it is {layer.config.kind!r}, whose own weights ({own[0]}) would be lost",)
    return dict.fromkeys(Need, reasons)


def _is_own(module: nn.Module) -> bool:
    """Whether a module is a layer of the zoo with projections of its own; those inside replacements have none."""
    return isinstance(module, AttentionLayer) and module.projector is None


FAMILY = Family(name=HOST, classes=("attnzoo.AttentionLayer",), block=describe, with_weights=None, recognise=_is_own)
