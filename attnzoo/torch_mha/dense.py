"""Attention over all pairs where a mask of any numbers, dropout or the weights themselves are asked for.

Letters: B batch, T query tokens, S key tokens, H heads, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import dropout, scaled_dot_product_attention


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, dropout_p: float = 0.0, scale: float | None = None
) -> Tensor:
    """Torch's fused attention of ``q [B, H, T, D]``, k, v ``[B, H, S, D]`` with an additive mask; as q.

    A row with nothing to read gives 0.
    """
    return scaled_dot_product_attention(q, k, v, mask, dropout_p, scale=scale)


def attend_with_weights(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, dropout_p: float = 0.0, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The same with its weights ``[B, H, T, S]``, after dropout; those of a row with nothing to read are 0."""
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-2, -1)
    nothing = None
    if mask is not None:
        scores = scores + mask
        # A softmax of nothing is no number, and neither is its gradient.
        nothing = (mask == -torch.inf).all(-1, keepdim=True)
        scores = scores.masked_fill(nothing, 0.0)
    weights = torch.softmax(scores, -1)
    if nothing is not None:
        weights = weights.masked_fill(nothing, 0.0)
    if dropout_p:
        weights = dropout(weights, dropout_p)
    return weights @ v, weights
