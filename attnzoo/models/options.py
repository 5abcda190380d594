"""From a variant's name, or one for each layer, and options for all of them to each layer's configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from attnzoo.base.config import AttentionConfig, check_int
from attnzoo.factory import get_config
from attnzoo.reporting.choices import check_known
from attnzoo_kernels.errors import ConfigError


def layer_configs(
    variant: str | Sequence[str], num_layers: int, sizes: Mapping[str, Any], options: Mapping[str, Any]
) -> list[AttentionConfig]:
    """The configuration of each layer's attention: the sizes, and those options that its variant has.

    Raises:
        TypeError: If a name is no string.
        ConfigError: If a name is unknown, there is not one for each layer, no layer has an option, or a value does not
            fit.
    """
    check_int("num_layers", num_layers, 1)
    names = [variant] * num_layers if isinstance(variant, str) else list(variant)
    if len(names) != num_layers:
        raise ConfigError(f"variant: expected a name, or {num_layers} as there are layers, got {len(names)}")
    if "causal" in options:
        raise ConfigError(f"causal: expected no such option, a CausalLM is causal, got {options['causal']!r}")
    known = {name: [field.name for field in fields(get_config(name))] for name in names}
    every = dict.fromkeys(field for own in known.values() for field in own if field != "causal")
    for key in options:
        check_known(key, every, f"options of {', '.join(known)}")
    return [get_config(name, **sizes, **{key: options[key] for key in options if key in known[name]}) for name in names]
