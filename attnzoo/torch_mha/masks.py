"""What torch's masks mean: sums of both for plain attention, and what variants can honour of them.

Letters: B batch, T query tokens, S key tokens, H heads.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnzoo.base.padding import Alignment
from attnzoo_kernels.errors import UnsupportedError
from attnzoo_kernels.runtime.plain import is_plain


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as numbers to add to scores: -inf where it hides."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -torch.inf)


def key_bias(padding: Tensor, dtype: torch.dtype) -> Tensor:
    """Padding ``[B, S]`` as the operation takes it, ``[B, 1, S]``."""
    return additive(padding, torch.float64 if dtype == torch.float64 else torch.float32).unsqueeze(1)


def causal_mask(rows: int, like: Tensor) -> Tensor:
    """The mask ``[T, T]`` that hides what comes later, bool."""
    return torch.ones(rows, rows, dtype=torch.bool, device=like.device).triu(1)


def padded(mask: Tensor | None, more: int) -> Tensor | None:
    """A mask ``[..., S]`` for more keys behind the others, which nothing hides."""
    return mask if mask is None or not more else pad(mask, (0, more))


def joined(pairs: Tensor | None, padding: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Both masks in one, ``[B|1, H|1, T|1, S]``, to be added to scores; ``None`` where neither is."""
    found = []
    if pairs is not None:
        found.append(additive(pairs, dtype).view(1, 1, *pairs.shape) if pairs.dim() == 2 else additive(pairs, dtype))
    if padding is not None:
        found.append(additive(padding, dtype)[:, None, None])
    return None if not found else found[0] if len(found) == 1 else found[0] + found[1]


def is_absent(mask: Tensor | None, variant: str) -> bool:
    """Whether a mask hides nothing and moves nothing.

    Raises:
        UnsupportedError: If its values cannot be looked at.
    """
    return mask is None or _pattern(mask, variant) == "none"


def is_causal(mask: Tensor | None, variant: str) -> bool:
    """Whether a mask ``[T, S]`` or ``[B, H, T, S]`` is the causal one; else it must hide nothing.

    Raises:
        UnsupportedError: If it is any other, or its values cannot be looked at.
    """
    if mask is None:
        return False
    pattern = _pattern(mask, variant)
    if pattern == "other":
        raise UnsupportedError(
            f"attn_mask: expected None, a mask that hides nothing, or the causal one, which {variant!r} has a rule of "
            "its own beside; got another: only 'mha' without options takes any mask"
        )
    return pattern == "causal"


def _pattern(mask: Tensor, variant: str) -> Literal["none", "causal", "other"]:
    if not is_plain(mask):
        raise UnsupportedError(
            f"attn_mask: expected None or is_causal=True with {variant!r} where values cannot be looked at, as while a "
            f"program is compiled, got a mask {list(mask.shape)}"
        )
    rows, keys = mask.shape[-2:]
    if mask.dtype != torch.bool and bool(mask.isnan().any()):
        return "other"
    if not bool(mask.any()):
        return "none"
    if rows != keys:
        return "other"
    causal = causal_mask(rows, mask)
    expected = causal if mask.dtype == torch.bool else additive(causal, mask.dtype)
    return "causal" if bool((mask == expected).all()) else "other"


def hidden_keys(padding: Tensor | None, variant: str) -> Tensor | None:
    """Which keys a padding ``[B, S]`` hides, bool; it must do nothing else.

    Raises:
        UnsupportedError: If it moves scores by numbers other than 0 and -inf.
    """
    if padding is None or padding.dtype == torch.bool:
        return padding
    hidden = padding == -torch.inf
    message = (
        f"key_padding_mask: expected bool, or 0 and -inf alone, with {variant!r}, got other numbers: only 'mha' "
        "without options adds them to scores"
    )
    fits = ((padding == 0) | hidden).all()
    if not is_plain(fits):
        cast(Any, torch)._assert_async(fits, message)
    elif not bool(fits):
        raise UnsupportedError(message)
    return hidden


def real_first(padding: Tensor) -> Tensor:
    """For each row the token that comes there when an item's real tokens are moved to the left, int64 ``[B, S]``."""
    return Alignment.of(padding).order
