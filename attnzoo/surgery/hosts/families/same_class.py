"""A block of the same class as another, with room for other weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from attnzoo.surgery.hosts import attention_function
from attnzoo.surgery.hosts.projections import Projections, as_linear, set_weights


def of_same_class(module: nn.Module, num_kv_heads: int) -> nn.Module:
    """A module of the same class on the meta device, with so many KV heads where the configuration has a number."""
    host: Any = module
    config = copy.copy(host.config)
    if hasattr(config, "num_key_value_heads"):
        config.num_key_value_heads = num_kv_heads
    with torch.device("meta"):
        new: Any = type(host)(config, layer_idx=host.layer_idx)
    # The model's own, so that a later change of its attention implementation reaches this block too.
    new.config = host.config
    found: nn.Module = new
    return found


def keep_rest(new: nn.Module, old: nn.Module, projections: Sequence[str], num_kv_heads: int) -> None:
    """Gives a new block all children of an old one but its projections, its mode, and what it follows."""
    for name, child in old.named_children():
        if name not in projections:
            new.add_module(name, child)
    attention_function.take_over(new, old, num_kv_heads)


def with_separate(module: nn.Module, names: Mapping[str, str], projections: Projections) -> nn.Module:
    """A block of the same class with other weights, where each role has a projection of its own.

    Args:
        module: The block, which is untouched.
        names: What its class calls its projections, by role.
        projections: The weights.

    Raises:
        ConversionError: If a projection is no ``nn.Linear``.
    """
    new = of_same_class(module, projections.num_kv_heads)
    for role, child in names.items():
        name = role.removesuffix("_proj")
        weight = getattr(projections, name)
        bias = getattr(projections, f"{name}_bias")
        old = as_linear(getattr(module, child), child)
        set_weights(as_linear(getattr(new, child), child), weight, bias, like=old)
    keep_rest(new, module, tuple(names.values()), projections.num_kv_heads)
    return new
