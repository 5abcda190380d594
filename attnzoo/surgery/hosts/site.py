"""An attention block in a model."""

from __future__ import annotations

from dataclasses import dataclass


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
    """

    path: str
    host: str
    layer: int
    heads: int
    kv_heads: int
    head_dim: int
    width: int
