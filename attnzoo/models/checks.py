"""Checking what a model is given, before anything happens. Letters: B batch, T tokens, V words."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from attnzoo_kernels.errors import ConfigError, ShapeError
from attnzoo_kernels.runtime.plain import is_readable


def real_ids(ids: Tensor, key_padding: Tensor | None, words: int) -> Tensor:
    """The ids ``[B, T]``, 0 at padding.

    Raises:
        TypeError: If a tensor is none or has another dtype.
        ShapeError: If a shape or device does not fit, or a token is none of the words; values are read on CPUs alone.
    """
    _check_tensor("ids", ids, torch.int64)
    if ids.dim() != 2:
        raise ShapeError(f"ids: expected [B, T], got {list(ids.shape)}")
    if key_padding is not None:
        _check_tensor("key_padding", key_padding, torch.bool)
        if key_padding.shape != ids.shape or key_padding.device != ids.device:
            got = f"{list(key_padding.shape)} on {key_padding.device}"
            raise ShapeError(f"key_padding: expected {list(ids.shape)} on {ids.device} as ids, got {got}")
        ids = ids.masked_fill(key_padding, 0)
    if is_readable(ids) and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < words:
        raise ShapeError(f"ids: expected 0 to {words - 1}, got {int(ids.min())} to {int(ids.max())}")
    return ids


def last_tokens(ids: Tensor, key_padding: Tensor | None) -> Tensor:
    """Where the last token of each text ``[B, T]`` is, int64 ``[B]``.

    Raises:
        ShapeError: If a text has none.
    """
    place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    place = place if key_padding is None else place.masked_fill(key_padding, -1)
    if ids.shape[1] == 0 or bool((place < 0).all(1).any()):
        raise ShapeError(f"ids: expected a token or more in each text, got {list(ids.shape)} with none in one")
    return place.amax(1)


def check_stop_tokens(stop_tokens: Collection[int], words: int) -> None:
    """Raises unless these are ids of words.

    Raises:
        ConfigError: If they are not.
    """
    if not isinstance(stop_tokens, Collection) or not all(type(x) is int and 0 <= x < words for x in stop_tokens):
        raise ConfigError(f"stop_tokens: expected ids from 0 to {words - 1} in a list, got {stop_tokens!r}")


def _check_tensor(name: str, value: Any, dtype: torch.dtype) -> None:
    if not isinstance(value, Tensor) or value.dtype != dtype:
        raise TypeError(f"{name}: expected a Tensor of {dtype}, got {getattr(value, 'dtype', type(value).__name__)}")
