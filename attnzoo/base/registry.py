"""The registered layer classes by name. A class enters by its class statement; nothing else registers."""

from __future__ import annotations

from typing import Any

from attnzoo_kernels.errors import ConfigError

# Layers register themselves here, so that this module cannot know their class.
variants: dict[str, type[Any]] = {}
"""Every registered layer class by name."""


def register(name: str, layer: type[Any]) -> None:
    """Enters a layer class and gives its configuration class the name as ``kind``.

    A class of the same module and qualified name replaces its predecessor, so that a notebook cell may run twice.

    Raises:
        ConfigError: If the name is no identifier, another class has it, or the configuration class has another name.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ConfigError(f"name: expected an identifier, got {name!r}")
    earlier = variants.get(name)
    if earlier is not None and (earlier.__module__, earlier.__qualname__) != (layer.__module__, layer.__qualname__):
        raise ConfigError(f"name: expected one that is free, got {name!r}, which {earlier.__qualname__} has")
    config_class = layer.__dict__.get("config_class")
    if config_class is None or vars(config_class).get("kind", name) != name:
        raise ConfigError(
            f"config_class: expected a configuration class of its own for {name!r}; a subclass of another variant "
            "also subclasses its configuration"
        )
    config_class.kind = name
    variants[name] = layer
