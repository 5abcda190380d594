"""Calls over pages: their inputs, and what all ways of reading need of them.

Letters: B batch, T tokens of a call, H query heads, G KV heads, h heads of an extent, D head width, Dv value width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnzoo.base.editing.reads import CallEdits as CallEdits
from attnzoo.base.steps import HeldInputs, is_training
from attnzoo.cache.lengths import Lengths
from attnzoo.cache.pages.cache import PagedCache
from attnzoo.cache.pages.pool import PagePool
from attnzoo_kernels.errors import UnsupportedError
from attnzoo_kernels.runtime.plain import is_plain


@dataclass(frozen=True, eq=False)
class PagedInputs(HeldInputs):
    """A call's own tokens and rows; what is remembered lies in pages.

    Attributes:
        cache: Whose pages.
    """

    cache: PagedCache = field(kw_only=True)


def in_order(pool: PagePool, parts: Sequence[Tensor], groups: int) -> Tensor:
    """The query heads of all extents ``[B, h * H / G, T, D]`` in their order, ``[B, H, T, D]``."""
    heads = [head for extent in pool.extents for head in extent.heads]
    out = parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)
    if heads == sorted(heads):
        return out
    order = torch.tensor(heads, device=out.device).argsort()
    sorted_out: Tensor = out.unflatten(1, (groups, -1)).index_select(1, order).flatten(1, 2)
    return sorted_out


def check_edits(inputs: PagedInputs) -> None:
    """Raises where keys are weighed by their tokens, and some rows stand for several.

    Raises:
        UnsupportedError: If so.
    """
    policy = inputs.cache.policy
    if inputs.edits is not None and policy.joins_rows and inputs.edits.weighs_keys:
        reason = f"rows that {policy} joins stand for several tokens, which cannot be weighed apart"
        raise UnsupportedError(f"key_bias, post: reads cannot be edited: {reason}", (reason,))


def precise_of(q: Tensor) -> torch.dtype:
    """The dtype of biases beside some queries."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def may_place(inputs: PagedInputs, impl: str) -> bool:
    """Whether a call is one row that may be written where it is read: every item has a token, and nobody watches."""
    q = inputs.q
    if q.shape[2] != 1 or impl != "auto" or Lengths(inputs.lengths).differ or not is_plain(q):
        return False
    if inputs.edits is not None:
        return False
    if is_training(q, inputs.k, inputs.v) or torch.is_autocast_enabled(q.device.type):
        return False
    held = inputs.cache.pool.tensors
    return all(x.dtype == held[name].dtype for name, x in (("k", q), ("k", inputs.k), ("v", inputs.v)))
