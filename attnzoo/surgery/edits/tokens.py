"""Sets of tokens, as people name them: indices, or a mask.

Letters: B batch, S tokens, n tokens of a set.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnzoo_kernels.errors import ConfigError, ShapeError

Tokens = int | Sequence[int] | range | Tensor
"""Indices of tokens (int64 ``[n]``, an int, a list, a range), or a bool mask ``[S]`` or ``[B, S]``."""


def as_tokens(name: str, given: Any) -> Tensor:
    """Tokens as indices, int64 ``[n]``, or as a bool mask ``[B|1, S]``.

    Args:
        name: Of the argument, for messages.
        given: See :data:`Tokens`.

    Raises:
        ConfigError: If it is neither, names a token twice, or one before the first.
        ShapeError: If a mask has another number of dimensions.
    """
    if isinstance(given, Tensor) and given.dtype == torch.bool:
        if given.dim() not in (1, 2):
            raise ShapeError(f"{name}: expected a mask [S] or [B, S], got {list(given.shape)}")
        return given.view(1, -1) if given.dim() == 1 else given
    return _as_indices(name, given)


def real_first(x: Tensor, attention_mask: Tensor) -> Tensor:
    """What slots ``[B|1, S]`` have, for each item's tokens in their order, ``[B, S]``; padding comes behind.

    Args:
        x: A mask, or numbers.
        attention_mask: Where there are tokens, ``[B, S]``, as models are called with it.

    Raises:
        ShapeError: If they do not fit.
    """
    if attention_mask.dim() != 2 or x.shape[1:] != attention_mask.shape[1:] or len(x) not in (1, len(attention_mask)):
        raise ShapeError(f"attention_mask: expected one for {list(x.shape)}, got {list(attention_mask.shape)}")
    real = attention_mask.to(x.device).bool()
    order = (~real).to(torch.uint8).argsort(dim=1, stable=True)
    moved = x.expand(len(real), -1).gather(1, order)
    return moved & real.gather(1, order) if x.dtype == torch.bool else moved


def _as_indices(name: str, given: Any) -> Tensor:
    if isinstance(given, bool | str | bytes) or not isinstance(given, int | Sequence | Tensor):
        raise ConfigError(f"{name}: expected indices of tokens or a bool mask, got {type(given).__name__}")
    if isinstance(given, Tensor):
        if given.dim() > 1 or given.is_floating_point() or given.is_complex():
            raise ConfigError(f"{name}: expected integers [n] or a bool mask, got {given.dtype} {list(given.shape)}")
        given = given.reshape(-1).tolist()
    found = [given] if isinstance(given, int) else list(given)
    for index in found:
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise ConfigError(f"{name}: expected indices of tokens from 0 on, got {index!r}")
    if len(set(found)) < len(found):
        raise ConfigError(f"{name}: expected each token once, got {found}")
    return torch.tensor(found, dtype=torch.int64, device="cpu")
