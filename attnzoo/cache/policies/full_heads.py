"""Which KV heads keep, or read, everything: a bool for every one of a model.

Letters: L layers, G KV heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnzoo_kernels.errors import ConfigError


def full_heads(given: Any) -> Tensor:
    """The bools that a caller or a file gives, a tensor of their own on the CPU ``[L, G]``.

    Args:
        given: bool ``[L, G]``, a tensor or what makes one; ``[G]`` is one layer's.

    Raises:
        ConfigError: If they are none.
    """
    try:
        # On the CPU also where a model is being built without memory.
        full = torch.as_tensor(given, device="cpu").detach().clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"full: expected bool [L, G], got {type(given).__name__}: {error}") from error
    if full.dtype != torch.bool or full.dim() not in (1, 2) or not full.numel():
        raise ConfigError(f"full: expected bool [L, G], got {full.dtype} {list(full.shape)}")
    return full if full.dim() == 2 else full.unsqueeze(0)


def heads_of_layer(full: Tensor, layer: int) -> Tensor:
    """Those of one layer, bool ``[G]``.

    Raises:
        ConfigError: If there are none of this layer.
    """
    if not 0 <= layer < len(full):
        raise ConfigError(f"full: expected a row for layer {layer}, got {len(full)} rows")
    return full[layer]


def check_heads(full: Tensor, layers: int, kv_heads: int) -> None:
    """Raises unless there is a bool for every KV head of every layer.

    Raises:
        ConfigError: Naming what came and what was expected.
    """
    if list(full.shape) != [layers, kv_heads]:
        expected = f"[{layers}, {kv_heads}], one for each layer and KV head"
        raise ConfigError(f"full: expected {expected}, got {list(full.shape)}")
