"""Joining attention over disjoint sets of keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnzoo_kernels.errors import ShapeError


def merge_states(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    r"""Joins attention states over disjoint sets of keys into the state over their union.

    .. math:: o = \sum_i e^{l_i - l} o_i, \qquad l = \log \sum_i e^{l_i}

    The operation is associative; the state of an empty set of keys is ``(0, -inf)``. Differentiable.

    Args:
        outs: Outputs ``[..., T, Dv]``, one for each set.
        lses: Log-sum-exps ``[..., T]``, natural log, one for each set.

    Returns:
        ``(out, lse)`` in the dtypes of the first state. A row that is empty everywhere gives ``(0, -inf)``.

    Raises:
        ShapeError: If there is no state, or shapes disagree.
    """
    if len(outs) == 0 or len(outs) != len(lses):
        raise ShapeError(f"outs, lses: expected as many of each, at least one, got {len(outs)} and {len(lses)}")
    for out, lse in zip(outs, lses, strict=True):
        if out.shape != outs[0].shape or lse.shape != out.shape[:-1]:
            raise ShapeError(
                f"outs, lses: expected outs {tuple(outs[0].shape)} and lses without the last dimension, "
                f"got {tuple(out.shape)} and {tuple(lse.shape)}"
            )
    stacked = torch.stack(list(lses))
    peak = stacked.detach().amax(0)
    # Not "greater than": a row of NaN is no empty row.
    live = peak != -torch.inf
    shift = torch.where(live, peak, 0.0)
    # The inner where keeps exp(-inf) out of the graph: its gradient against -inf would be NaN.
    seen = stacked != -torch.inf
    weights = torch.where(seen, torch.exp(torch.where(seen, stacked, shift) - shift), 0.0)
    total = torch.where(live, weights.sum(0), 1.0)
    parts = torch.stack([out.to(weights.dtype) for out in outs])
    out = ((weights / total).unsqueeze(-1) * parts).sum(0)
    lse = torch.where(live, shift + torch.log(total), -torch.inf)
    return out.to(outs[0].dtype), lse.to(lses[0].dtype)
