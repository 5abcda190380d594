"""A block of the same class as another, with room for other weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from attnzoo.surgery.hosts import attention_function


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
