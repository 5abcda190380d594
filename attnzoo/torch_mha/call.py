"""One call of torch's multi-head attention, checked, batch first, and with its masks apart.

In torch's masks True and -inf hide, the inverse of ``scaled_dot_product_attention``; other values of a floating mask
are added to the scores.

Letters: B batch, T query tokens, S key tokens, C model width, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo.base.inputs import check_layout
from attnzoo_kernels.errors import ShapeError, UnsupportedError
from attnzoo_kernels.runtime.plain import advice


@dataclass(frozen=True, kw_only=True)
class TorchSizes:
    """What a module takes: widths of queries, keys and values, heads H, and where the batch stands."""

    query: int
    key: int
    value: int
    heads: int
    batch_first: bool


@dataclass(frozen=True, eq=False, kw_only=True)
class TorchCall:
    """A call.

    Attributes:
        query: ``[B, T, C]``.
        key: ``[B, S, Ck]``.
        value: ``[B, S, Cv]``.
        key_padding: What hides or moves keys, ``[B, S]``, bool or floating.
        attn_mask: What hides or moves pairs, ``[T, S]`` or ``[B, H, T, S]``, bool or floating; ``None`` beside
            ``causal``, whose mask is known.
        causal: Whether a token reads itself and earlier ones alone, of as many keys as queries.
        is_self: Whether keys come from the queries' own tokens.
        one_source: Whether keys and values come from the same tokens.
        is_batched: Whether the caller's tensors have a batch dimension.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    key_padding: Tensor | None
    attn_mask: Tensor | None
    causal: bool
    is_self: bool
    one_source: bool
    is_batched: bool


def read_call(
    sizes: TorchSizes,
    tokens: tuple[Tensor, Tensor, Tensor],
    *,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
) -> TorchCall:
    """A call from what torch's forward is given.

    Args:
        sizes: Of the module.
        tokens: Queries, keys and values as the caller has them.
        key_padding_mask: As torch's.
        attn_mask: As torch's.
        is_causal: As torch's: the mask, if one is given, is the causal one.

    Raises:
        TypeError: If an argument is no tensor, or of the wrong kind of dtype.
        ShapeError: If shapes do not fit.
    """
    query, key, value = tokens
    widths = (sizes.query, sizes.key, sizes.value)
    for name, x, width in zip(("query", "key", "value"), tokens, widths, strict=True):
        _check_tokens(name, x, width, like=query)
    is_batched = query.dim() == 3
    if not is_batched:
        query, key, value = (x.unsqueeze(0) for x in tokens)
        key_padding_mask = _with_batch(key_padding_mask)
    elif not sizes.batch_first:
        query, key, value = (x.transpose(0, 1) for x in tokens)
    batch, rows, _ = query.shape
    keys = key.shape[1]
    if key.shape[0] != batch or value.shape[:2] != key.shape[:2]:
        raise ShapeError(
            f"key, value: expected as many items as the query, {batch}, and equally many tokens, got "
            f"{list(key.shape[:2])} and {list(value.shape[:2])}"
        )
    if key_padding_mask is not None:
        _check_mask("key_padding_mask", key_padding_mask, (batch, keys))
    if attn_mask is not None:
        attn_mask = _pairs(attn_mask, (batch, sizes.heads, rows, keys))
    hinted = is_causal and rows == keys
    if is_causal and attn_mask is None and not hinted:
        raise ShapeError(f"is_causal: expected an attn_mask, or as many keys as queries, got {rows} and {keys}")
    return TorchCall(
        query=query,
        key=key,
        value=value,
        key_padding=key_padding_mask,
        attn_mask=None if hinted else attn_mask,
        causal=hinted,
        is_self=tokens[0] is tokens[1],
        one_source=tokens[1] is tokens[2],
        is_batched=is_batched,
    )


def _with_batch(padding: Tensor | None) -> Tensor | None:
    """The padding of one item, as that of a batch."""
    if padding is None or not isinstance(padding, Tensor):
        return padding
    if padding.dim() != 1:
        raise ShapeError(f"key_padding_mask: expected [S] beside tokens without a batch, got {list(padding.shape)}")
    return padding.unsqueeze(0)


def _check_tokens(name: str, x: Any, width: int, like: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}{advice(x)}")
    check_layout(name, x)
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {x.dtype}")
    if x.dim() not in (2, 3) or x.dim() != like.dim() or x.shape[-1] != width:
        shape = f"{like.dim()} dimensions as the query has" if like.dim() in (2, 3) else "2 or 3 dimensions"
        raise ShapeError(f"{name}: expected {shape}, the last of {width}, got {list(x.shape)}")


def _check_mask(name: str, mask: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name}: expected bool, true where it hides, or a floating dtype, got {mask.dtype}")
    if mask.dim() != len(shape) or any(found != size for found, size in zip(mask.shape, shape, strict=True)):
        raise ShapeError(f"{name}: expected {list(shape)}, got {list(mask.shape)}")


def _pairs(mask: Any, shape: tuple[int, int, int, int]) -> Tensor:
    """A mask ``[T, S]``, or one ``[B * H, T, S]`` as ``[B, H, T, S]``."""
    batch, heads, rows, keys = shape
    if isinstance(mask, Tensor) and mask.dim() == 3:
        _check_mask("attn_mask", mask, (batch * heads, rows, keys))
        return mask.view(batch, heads, rows, keys) if mask.is_contiguous() else mask.reshape(shape)
    _check_mask("attn_mask", mask, (rows, keys))
    pairs: Tensor = mask
    return pairs


def refuse_jagged(tokens: tuple[Tensor, Tensor, Tensor], *, batch_first: bool, masked: bool) -> Tensor:
    """The one nested tensor of a call: self attention, of items that end where their tokens do.

    Raises:
        UnsupportedError: If it is anything else.
    """
    query, key, value = tokens
    if query is not key or key is not value:
        raise UnsupportedError("query, key, value: expected one and the same nested tensor, got several")
    if query.layout is not torch.strided or query.dim() != 3 or not batch_first:
        raise UnsupportedError(
            f"query: expected a nested tensor [B, T, C] of the layout torch.strided, and batch_first, got "
            f"{query.dim()} dimensions, {query.layout} and batch_first={batch_first}; pad it "
            "(torch.nested.to_padded_tensor)"
        )
    if masked:
        raise UnsupportedError(
            "key_padding_mask, attn_mask: expected None beside a nested tensor, which says where its items end"
        )
    return query
