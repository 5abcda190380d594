"""Layers and configurations by a variant's name: what `attnzoo.create` and the command line go through."""

from __future__ import annotations

from dataclasses import fields, replace
from fnmatch import fnmatchcase
from typing import Any, overload

import torch

from attnzoo.base import registry
from attnzoo.base.config import AttentionConfig, build_config
from attnzoo.base.layer import AttentionLayer
from attnzoo.reporting.choices import check_known
from attnzoo_kernels.errors import ConfigError


def create(
    variant: str | AttentionConfig,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> AttentionLayer:
    """Builds a layer.

    Args:
        variant: A variant's name, or a configuration.
        device: Where the weights lie.
        dtype: Of the weights.
        **options: Fields of the variant's configuration; beside a configuration, they replace its fields.

    Raises:
        ConfigError: If the name or an option is unknown, or a value does not fit.

    Example:
        >>> create("mha", dim=64, num_heads=4)(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 64])
    """
    if isinstance(variant, AttentionConfig):
        for key in options:
            check_known(key, [field.name for field in fields(variant)], f"{type(variant).__name__} fields")
        config = replace(variant, **options) if options else variant
    else:
        config = build_config(get_config(variant), options)
    layer: type[AttentionLayer] | None = registry.variants.get(config.kind)
    if layer is None or layer.config_class is not type(config):
        raise ConfigError(f"variant: expected the configuration of a registered variant, got {type(config).__name__}")
    return layer(config, device=device, dtype=dtype)


def list_variants(pattern: str = "*") -> list[str]:
    """The registered names that match a shell pattern, sorted.

    Example:
        >>> list_variants("lo*")
        ['longheads', 'lowrank_gqa']
    """
    return sorted(name for name in registry.variants if fnmatchcase(name, pattern))


@overload
def get_config(name: str) -> type[AttentionConfig]: ...
@overload
def get_config(name: str, **options: Any) -> AttentionConfig: ...
def get_config(name: str, **options: Any) -> type[AttentionConfig] | AttentionConfig:
    """The configuration class of a variant, or with options a configuration.

    Args:
        name: The variant's name.
        **options: Fields of its configuration.

    Raises:
        TypeError: If the name is no string.
        ConfigError: If no variant has this name, with near ones, or an option is unknown, missing, or does not fit.

    Example:
        >>> get_config("moh").__name__
        'MoHConfig'
        >>> get_config("moh", dim=64, num_heads=8).active_heads is None
        True
    """
    if not isinstance(name, str):
        raise TypeError(f"variant: expected a name or a configuration, got {type(name).__name__}")
    check_known(name, sorted(registry.variants), "variants", class_names())
    config_class: type[AttentionConfig] = registry.variants[name].config_class
    return build_config(config_class, options) if options else config_class


def class_names() -> dict[str, str]:
    """The variant that each class of a layer or configuration belongs to."""
    layers = {layer.__name__: name for name, layer in registry.variants.items()}
    return layers | {layer.config_class.__name__: name for name, layer in registry.variants.items()}


def read_spec(text: str, argument: str = "variants") -> tuple[str, dict[str, Any]]:
    """A variant's name and options, written ``variant:option=value,option=value``.

    Raises:
        ConfigError: If the variant is unknown or an option is no ``name=value``; it names ``argument``.

    Example:
        >>> read_spec("s2:block_size=32,sink_blocks=0")
        ('s2', {'block_size': 32, 'sink_blocks': 0})
    """
    variant = spec_name(text, argument)
    get_config(variant)
    return variant, read_options(text, argument)


def spec_name(text: str, argument: str) -> str:
    """What stands before the colon.

    Raises:
        ConfigError: If there is nothing, or there are several names.
    """
    name = text.partition(":")[0].strip()
    if not name:
        raise ConfigError(f"{argument}: expected name:option=value,..., got {text!r}")
    if "," in name:
        raise ConfigError(f"{argument}: expected one name and its options, got {text!r}; give each one by itself")
    return name


def read_options(text: str, argument: str) -> dict[str, Any]:
    """The options of ``name:option=value,option=value``; values are numbers, booleans, nothing or words.

    Raises:
        ConfigError: If an option is no ``name=value``; it names ``argument``.

    Example:
        >>> read_options("duo:keep=0.25,window=192", "policy")
        {'keep': 0.25, 'window': 192}
    """
    what, colon, rest = text.partition(":")
    options: dict[str, Any] = {}
    for part in rest.split(",") if colon else []:
        name, equals, value = (word.strip() for word in part.partition("="))
        if not equals or not name.isidentifier() or not value:
            raise ConfigError(f"{argument}: expected {what}:name=value,..., got {text!r}")
        if name in options:
            raise ConfigError(f"{argument}: expected {name!r} once, got {text!r}")
        options[name] = _value(value)
    return options


def _value(text: str) -> Any:
    named = {"true": True, "false": False, "none": None}
    if text.lower() in named:
        return named[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
