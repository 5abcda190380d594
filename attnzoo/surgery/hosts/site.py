"""An attention block in a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from attnzoo_kernels.errors import ConfigError

GLOBAL = "where=lambda site: site.window is None takes the others"
"""What to do where blocks with windows of their own are in the way."""


@dataclass(frozen=True)
class Site:
    """Where an attention block is, and its sizes.

    Attributes:
        path: Its name in ``model.named_modules()``.
        host: The family that its module belongs to.
        layer: Its index among the model's attention blocks.
        heads: Query heads H.
        kv_heads: KV heads G.
        head_dim: Width D of a head.
        width: Width C of the model.
        window: Tokens of the block's own sliding window; ``None`` where it reads everything.
    """

    path: str
    host: str
    layer: int
    heads: int
    kv_heads: int
    head_dim: int
    width: int
    window: int | None = None


def within_window(site: Site, options: Mapping[str, Any]) -> dict[str, Any]:
    """The window and the sink of a variant at a site, within the block's own window.

    Raises:
        ConfigError: If a sink would be read that the block's own window leaves behind.
    """
    own = site.window
    if own is None:
        return {}
    window = options.get("window")
    if type(window) is int and window < own and options.get("sink"):
        raise ConfigError(
            f"sink: expected 0 at {site.path}, whose own sliding window of {own} tokens leaves the first ones behind, "
            f"got {options['sink']}; {GLOBAL}"
        )
    return {"window": own if window is None else min(window, own) if type(window) is int else window, "sink": 0}
