"""What :func:`attnzoo.surgery.convert` takes for each variant, and what it starts from."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields
from typing import Any

from attnzoo.base.config import AttentionConfig
from attnzoo.factory import get_config
from attnzoo.surgery.hosts.site import Site
from attnzoo.surgery.lowrank import factor
from attnzoo.surgery.replacements import SEATS
from attnzoo.surgery.replacements import spec as seats

READ_VARIANTS = ("mha", "s2")
"""Variants that change what is read, and no weight."""

READ_DEFAULTS: dict[str, dict[str, Any]] = {"mha": {}, "s2": {"sink_blocks": 1}}
"""What surgery starts from where it is not the layer's own default."""

REQUIRED = "required"
"""Stands for the default of an option that has none."""

_SOME_SITE = Site("", "", 0, heads=8, kv_heads=8, head_dim=16, width=128)


def options_of(variant: str) -> dict[str, Any]:
    """The options that ``convert`` takes for a variant, by name, with their defaults.

    Raises:
        ConfigError: If no variant has this name.
        UnsupportedError: If it is not convertible.

    Example:
        >>> options_of("lowrank_gqa")["method"]
        'required'
    """
    if variant == "lowrank_gqa":
        return {field.name: default_of(field) for field in fields(factor.Request)}
    config_class = get_config(variant)
    own = {field.name: default_of(field) for field in fields(config_class) if field.name not in seats.OF_THE_SITE}
    if variant in READ_VARIANTS:
        return own | READ_DEFAULTS[variant]
    spec = seats.spec_of(variant, SEATS, (*READ_VARIANTS, "lowrank_gqa"))
    taken = own | spec.defaults(_SOME_SITE)
    return {name: default for name, default in taken.items() if name not in spec.refused}


def layer_options(config_class: type[AttentionConfig]) -> dict[str, Any]:
    """The options of a layer beside ``dim`` and ``num_heads``, by name, with their defaults."""
    return {field.name: default_of(field) for field in fields(config_class) if field.name not in ("dim", "num_heads")}


def default_of(field: Field[Any]) -> Any:
    """A field's default, or ``REQUIRED``."""
    if field.default_factory is not MISSING:
        return field.default_factory()
    return REQUIRED if field.default is MISSING else field.default
