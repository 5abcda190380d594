"""Checking a call's arguments and making its :class:`Step`.

Letters: B batch, T tokens of a call, S context tokens, C model width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.base.padding import Alignment, take_rows
from attnzoo.base.steps import Step
from attnzoo.cache.kv_cache import KVCache
from attnzoo.cache.lengths import Lengths
from attnzoo_kernels import autocasts
from attnzoo_kernels.errors import ShapeError
from attnzoo_kernels.runtime.plain import NESTED, advice, is_plain, is_readable, odd_layout

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_inputs(
    x: Tensor, dim: int, positions: Tensor | None, key_padding: Tensor | None, context: Tensor | None
) -> None:
    """Raises unless the arguments of one call fit each other; reads metadata only.

    Raises:
        TypeError: If an argument is no Tensor or has the wrong kind of dtype.
        ShapeError: If a shape or device does not fit.
    """
    _check_tokens("x", x, dim, None)
    batch, tokens, _ = x.shape
    if context is not None:
        _check_tokens("context", context, dim, x)
    if positions is not None:
        _check_tensor("positions", positions, x)
        if positions.dtype not in _INTEGERS:
            raise TypeError(f"positions: expected integers, got {positions.dtype}")
        if not _has_shape(positions, (tokens,), (1, tokens), (batch, tokens)):
            raise ShapeError(f"positions: expected [{tokens}] or [{batch}, {tokens}], got {list(positions.shape)}")
    if key_padding is not None:
        _check_tensor("key_padding", key_padding, x)
        if key_padding.dtype != torch.bool:
            raise TypeError(f"key_padding: expected bool, true at padding, got {key_padding.dtype}")
        wanted = (batch, tokens if context is None else context.shape[1])
        if not _has_shape(key_padding, wanted):
            raise ShapeError(f"key_padding: expected {list(wanted)}, got {list(key_padding.shape)}")


def _has_shape(x: Tensor, *allowed: tuple[int, ...]) -> bool:
    """Whether a tensor has one of the shapes."""
    # Not "in": a compiler does not compare two symbolic sizes by it.
    return any(
        len(shape) == x.dim() and all(size == wanted for size, wanted in zip(x.shape, shape, strict=True))
        for shape in allowed
    )


def is_all_padding(key_padding: Tensor) -> bool:
    """Whether a call has tokens, and all are padding; False where looking would synchronise."""
    return key_padding.numel() > 0 and is_readable(key_padding) and bool(key_padding.all())


def check_dtype(name: str, x: Tensor, weight: Tensor) -> None:
    """Raises unless a tensor has the weights' dtype, or autocast will see to it.

    Raises:
        TypeError: If it has not.
    """
    if x.dtype != weight.dtype and not autocasts(x.device.type):
        raise TypeError(f"{name}: expected {weight.dtype} as the weights are, got {x.dtype}")


def self_step(x: Tensor, positions: Tensor | None, key_padding: Tensor | None, cache: KVCache | None) -> Step:
    """The step of a call whose keys come from x and a cache."""
    tokens = x.shape[1]
    offset: int | Tensor = 0 if cache is None else cache.offset
    if positions is not None:
        positions = positions.long()
        positions = positions if positions.dim() == 2 else positions.unsqueeze(0)
    # A program that is traced takes positions as they come.
    first = offset if positions is None and isinstance(offset, int) and is_plain(x) else None
    if key_padding is None:
        places = _default_positions(x, offset) if positions is None else positions
        return Step(x=x, positions=places, lengths=tokens, offset=offset, cache=cache, first=first)
    moved = Alignment.of(key_padding)
    if positions is None:
        places = _default_positions(x, offset)
    else:
        places = positions.expand(x.shape[0], -1).gather(1, moved.order)
    return Step(
        x=take_rows(x.masked_fill(key_padding.unsqueeze(-1), 0), moved.order),
        positions=places,
        lengths=moved.lengths,
        offset=offset,
        cache=cache,
        padding=key_padding,
        row_index=moved.row_index,
        first=first,
    )


def cross_step(x: Tensor, context: Tensor, key_padding: Tensor | None) -> Step:
    """The step of a call whose keys come from another sequence."""
    if key_padding is not None:
        context = context.masked_fill(key_padding.unsqueeze(-1), 0)
    return Step(x=x, positions=_default_positions(x, 0), lengths=x.shape[1], context=context, padding=key_padding)


def _default_positions(x: Tensor, offset: int | Tensor) -> Tensor:
    token = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
    return token + Lengths(offset).column()


def _check_tokens(name: str, x: Tensor, dim: int, like: Tensor | None) -> None:
    _check_tensor(name, x, like)
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {x.dtype}")
    batch = "B" if like is None else like.shape[0]
    if x.dim() != 3 or x.shape[2] != dim or (like is not None and x.shape[0] != like.shape[0]):
        raise ShapeError(f"{name}: expected [{batch}, {'T' if like is None else 'S'}, {dim}], got {list(x.shape)}")


def check_layout(name: str, x: Tensor) -> None:
    """Raises unless a tensor has a value at every place, one stride apart along each dimension.

    Raises:
        TypeError: If it is nested, sparse or of a library's own layout; the message says what to give instead.
    """
    odd = odd_layout(x)
    if odd == NESTED:
        raise TypeError(
            f"{name}: expected a plain Tensor, got a nested one; pad it (torch.nested.to_padded_tensor) and say in "
            "key_padding, true at padding, where its items end"
        )
    if odd is not None:
        raise TypeError(f"{name}: expected a plain (strided) Tensor, got the layout {odd}; call to_dense() on it")


def _check_tensor(name: str, x: Tensor, like: Tensor | None) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}{advice(x)}")
    check_layout(name, x)
    if like is not None and x.device != like.device:
        raise ShapeError(f"{name}: expected it on {like.device} as x is, got {x.device}")
