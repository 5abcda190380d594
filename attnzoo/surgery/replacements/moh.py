"""Mixture-of-head attention in a pretrained model: all heads active at first, which is the model's own function."""

from __future__ import annotations

from typing import Any

import torch

from attnzoo.base.config import AttentionConfig
from attnzoo.base.layer import AttentionLayer
from attnzoo.surgery.hosts.site import Site
from attnzoo.surgery.replacements.spec import ReplacementSpec
from attnzoo.variants.moh.config import MoHConfig
from attnzoo.variants.moh.layer import MoHAttention


def defaults(site: Site) -> dict[str, Any]:
    """All heads active."""
    return {"active_heads": "all"}


def start(layer: AttentionLayer) -> None:
    """Routers at zero: with all heads active every gate is exactly 1."""
    if isinstance(layer, MoHAttention):
        with torch.no_grad():
            for router in (layer.router, layer.shared_router, layer.type_router):
                if router is not None:
                    router.weight.zero_()


def warn(config: AttentionConfig) -> str | None:
    """Fewer heads, or gates below 1, make another function."""
    if not isinstance(config, MoHConfig):
        return None
    counts = config.counts
    found = []
    if counts.active < counts.routed:
        hint = "" if config.router == "norm" else "; a router at zero takes the first heads, router='norm' the longest"
        share = f"{counts.shared + counts.active} of {config.num_heads} heads are left to each token"
        found.append(f"{share}, which needs healing{hint}")
    if config.router == "learned" and config.gate_norm == "paper":
        found.append("gate_norm='paper' makes gates less than 1, which needs healing")
    if config.window is not None and not config.sink:
        found.append("without a sink, models that were trained without a window lose the token they lean on")
    return f"moh: {'; '.join(found)}" if found else None


SPEC = ReplacementSpec(defaults=defaults, start=start, warn=warn)
