"""What :func:`attnzoo.surgery.convert` takes for each variant, and what it starts from."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from attnzoo.base.config import AttentionConfig
from attnzoo.surgery.kinds import kind_for
from attnzoo.surgery.kinds.kind import REQUIRED as REQUIRED
from attnzoo.surgery.kinds.kind import default_of


def options_of(variant: str) -> dict[str, Any]:
    """The options that ``convert`` takes for a variant, by name, with their defaults.

    Raises:
        ConfigError: If no variant has this name.
        UnsupportedError: If it is not convertible.

    Example:
        >>> options_of("lowrank_gqa")["method"]
        'required'
    """
    return kind_for(variant, {}).options(variant)


def layer_options(config_class: type[AttentionConfig]) -> dict[str, Any]:
    """The options of a layer beside ``dim`` and ``num_heads``, by name, with their defaults."""
    return {field.name: default_of(field) for field in fields(config_class) if field.name not in ("dim", "num_heads")}
