"""Calls over pages: their inputs, and what all ways of reading need of them.

Letters: B batch, T tokens of a call, H query heads, G KV heads, h heads of an extent, D head width, Dv value width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnzoo.base.layer import is_training
from attnzoo.base.steps import HeldInputs
from attnzoo.cache.evicting.cache import of_heads
from attnzoo.cache.lengths import Lengths
from attnzoo.cache.pages.cache import PagedCache
from attnzoo.cache.pages.extents import Extent
from attnzoo.cache.pages.pool import PagePool
from attnzoo_kernels.runtime.plain import is_plain


@dataclass(frozen=True, eq=False)
class PagedInputs(HeldInputs):
    """A call's own tokens and rows; what is remembered lies in pages.

    Attributes:
        cache: Whose pages.
    """

    cache: PagedCache = field(kw_only=True)


@dataclass(frozen=True)
class Way:
    """How the operation is run: the factor on scores, and the implementation."""

    scale: float
    impl: str


def own_of(inputs: PagedInputs, extent: Extent) -> tuple[Tensor, Tensor, Tensor]:
    """The call's queries ``[B, h * H / G, T, D]``, keys and values ``[B, h, T, D]`` for the heads of an extent."""
    groups = inputs.k.shape[1]
    q = of_heads(inputs.q.unflatten(1, (groups, -1)), extent.heads).flatten(1, 2)
    return q, of_heads(inputs.k, extent.heads), of_heads(inputs.v, extent.heads)


def row_slots(inputs: PagedInputs, first: int | Tensor) -> Tensor:
    """The slots of rows that begin at ``first``, int32 ``[B|1, 1, T]``; -1 where there is no token."""
    token = torch.arange(inputs.q.shape[2], device=inputs.q.device)
    real = Lengths(inputs.lengths).holds(token)
    return torch.where(real, token + Lengths(first).column(), -1).to(torch.int32).view(-1, 1, token.shape[0])


def in_order(pool: PagePool, parts: Sequence[Tensor], groups: int) -> Tensor:
    """The query heads of all extents ``[B, h * H / G, T, D]`` in their order, ``[B, H, T, D]``."""
    heads = [head for extent in pool.extents for head in extent.heads]
    out = parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)
    if heads == sorted(heads):
        return out
    order = torch.tensor(heads, device=out.device).argsort()
    sorted_out: Tensor = out.unflatten(1, (groups, -1)).index_select(1, order).flatten(1, 2)
    return sorted_out


def precise_of(q: Tensor) -> torch.dtype:
    """The dtype of biases beside some queries."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def may_place(inputs: PagedInputs, impl: str) -> bool:
    """Whether a call is one row that may be written where it is read: every item has a token, and nobody watches."""
    q = inputs.q
    if q.shape[2] != 1 or impl != "auto" or Lengths(inputs.lengths).differ or not is_plain(q):
        return False
    if is_training(q, inputs.k, inputs.v) or torch.is_autocast_enabled(q.device.type):
        return False
    held = inputs.cache.pool.tensors
    return all(x.dtype == held[name].dtype for name, x in (("k", q), ("k", inputs.k), ("v", inputs.v)))
