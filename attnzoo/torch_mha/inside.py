"""The layer of a variant inside torch's multi-head attention, once for each causality that calls may ask for.

torch says with each call whether it is causal, a layer's configuration says it once: where a variant can be both, there
are two layers with the same weights, of which the module owns one.

Letters: B batch, T query tokens, S key tokens, C model width, H heads, D head width.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.base import registry
from attnzoo.base.config import AttentionConfig
from attnzoo.base.layer import AttentionLayer
from attnzoo.factory import create, get_config
from attnzoo.reporting.choices import check_known
from attnzoo.reporting.warn import silent
from attnzoo_kernels.errors import ConfigError, UnsupportedError

OF_THE_MODULE = frozenset({"dim", "num_heads", "num_kv_heads", "head_dim", "bias"})
"""Fields of a variant's configuration that torch's arguments decide."""

ONE_CAUSALITY = {"rcmha": "its convolutions have their own token in the middle, or behind it, and so other weights"}
"""Variants whose weights mean something else in causal calls, and why."""

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True, eq=False)
class PackedProjector:
    """torch's packed weights in the place of a layer's own projections.

    Attributes:
        source: The module that has them.
    """

    source: Any

    @property
    def products(self) -> bool:
        """False: one product is for queries, keys and values."""
        return False

    def module(self, name: str) -> nn.Module | None:
        """The output's projection alone is a module."""
        found: nn.Module | None = self.source.out_proj if name == "o_proj" else None
        return found

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[B, T, C]`` to q, k, v ``[B, H, T, D]``."""
        heads: tuple[Tensor, Tensor, Tensor] = self.source.project(x, x, x)
        return heads

    def output(self, y: Tensor) -> Tensor:
        """``[B, T, H * D]`` to ``[B, T, C]``."""
        out: Tensor = self.source.out_proj(y)
        return out


def config_of(variant: str, sizes: dict[str, Any], options: dict[str, Any]) -> AttentionConfig:
    """A variant's configuration for a module, not causal where the variant can be so.

    Args:
        variant: Its name.
        sizes: Fields in ``OF_THE_MODULE``.
        options: The others; without a ``rotary`` there is none, as in torch. With ``causal`` only causal calls are
            taken.

    Raises:
        ConfigError: If the variant or an option is unknown, or does not fit.
    """
    config_class = get_config(variant)
    known = [field.name for field in fields(config_class) if field.name not in OF_THE_MODULE]
    for name in options:
        check_known(name, known, f"options of {variant!r} here")
    causal = registry.variants[variant].causal_promise != "bidirectional-capable"
    return config_class(**{**sizes, "causal": causal, "rotary": None, **options})


def build_layer(
    config: AttentionConfig, source: nn.Module, device: torch.device | str | None, dtype: torch.dtype | None
) -> AttentionLayer:
    """A layer that projects by a module's packed weights, and has no weights but those that are the variant's own.

    Raises:
        UnsupportedError: If the variant has other projections than torch's.
    """
    shape = (config.dim, config.dim)
    layer = create(config, device="meta", dtype=dtype)
    found = {name: getattr(getattr(layer, name, None), "weight", None) for name in PROJECTIONS}
    odd = [name for name, weight in found.items() if weight is None or tuple(weight.shape) != shape]
    if odd:
        raise UnsupportedError(
            f"variant: expected one with torch's projections {list(shape)}, got {config.kind!r}, whose {odd[0]} is "
            "another; use attnzoo.create"
        )
    layer.project_by(PackedProjector(source))
    if next(layer.parameters(), None) is None and next(layer.buffers(), None) is None:
        return layer
    # Weights of the variant's own need memory, and values.
    with silent():
        layer = create(config, device=device, dtype=dtype)
    layer.project_by(PackedProjector(source))
    return layer


def causal_twin(layer: AttentionLayer) -> AttentionLayer | str:
    """The same layer for causal calls, with the same weights and modules; or why there is none."""
    kind = layer.config.kind
    if kind in ONE_CAUSALITY:
        return f"{ONE_CAUSALITY[kind]}; build it with causal=True"
    try:
        config = replace(layer.config, causal=True)
    except ConfigError as error:
        return str(error)
    twin = copy.copy(layer)
    twin.config = config
    return twin


def why_no_context(layer: AttentionLayer) -> str | None:
    """Why a layer cannot read other tokens than its own; ``None`` if it can."""
    kind = layer.config.kind
    if getattr(layer.config, "window", None) is not None:
        return f"a window of {kind!r} counts tokens of one sequence"
    try:
        layer.check_context(None, None)
    except UnsupportedError as error:
        return str(error)
    return None
