r"""How much attention rows receive from the queries of a call, from the log-sum-exp of its scores.

.. math:: M_j = \sum_i p_{ij}, \quad p_{ij} = \exp(\sigma q_i \cdot k_j + b_j - \ell_i)

Letters: B batch, T queries, H query heads, G KV heads, g query heads of a KV head, S rows, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 512
"""Queries whose shares are held at a time."""


def received(q: Tensor, k: Tensor, lse: Tensor, bias: Tensor | None, *, scale: float) -> Tensor:
    """The shares that all queries give to each row, added up, for each query head.

    The queries are those of the last T rows, and read the rows up to their own.

    Args:
        q: Queries ``[B, H, T, D]``.
        k: Keys ``[B, G, S, D]``.
        lse: Log-sum-exps of scores ``[B, H, T]``; -inf where there is no query.
        bias: Added to the scores of each row ``[B, G, S]``.
        scale: The factor on scores.

    Returns:
        ``[B, G, S, g]``, in the dtype of ``lse``.
    """
    batch, heads, tokens, width = q.shape
    groups = k.shape[1]
    slots = k.shape[2]
    dtype = lse.dtype
    total = lse.new_zeros(batch, groups, heads // groups, slots)
    rows = q.reshape(batch, groups, heads // groups, tokens, width)
    ends = lse.reshape(batch, groups, heads // groups, tokens)
    for first in range(0, tokens, ROWS):
        last = min(first + ROWS, tokens)
        # What the last of these queries reads.
        seen = slots - tokens + last
        part = rows[:, :, :, first:last].to(dtype).flatten(2, 3) * scale
        score = torch.matmul(part, k[:, :, :seen].to(dtype).transpose(-1, -2))
        score = score.unflatten(2, (heads // groups, last - first))
        if bias is not None:
            score = score + bias[:, :, None, None, :seen]
        end = ends[:, :, :, first:last].unsqueeze(-1)
        slot = torch.arange(seen, device=q.device)
        behind = slot > (torch.arange(first, last, device=q.device) + slots - tokens).unsqueeze(1)
        share = (score - end).exp_().masked_fill_(behind | (end == -torch.inf), 0)
        total[:, :, :, :seen] += share.sum(3)
    return total.transpose(-1, -2)
