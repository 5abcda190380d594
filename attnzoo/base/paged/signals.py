r"""How much attention rows receive from the queries of a call, from the log-sum-exp of its scores.

.. math:: M_j = \sum_i p_{ij}, \quad p_{ij} = \exp(\sigma q_i \cdot k_j + b_j - \ell_i)

Letters: B batch, T queries, H query heads, G KV heads, g query heads of a KV head, S rows, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHARES = 2**20
"""Shares that are held at a time: a block of queries by a block of heads by all rows that they read."""

LEAST_QUERIES = 16
"""Queries of a block at least, before heads are taken apart: keys are read once for all of them."""


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
    each = heads // groups
    dtype = lse.dtype
    # Items and KV heads side by side: each has its own queries, keys and sums.
    total = lse.new_zeros(batch * groups, each, slots)
    q = q.reshape(batch * groups, each, tokens, width)
    k = k.reshape(batch * groups, slots, width).to(dtype)
    lse = lse.reshape(batch * groups, each, tokens)
    shown = None if bias is None else bias.expand(batch, groups, slots).reshape(batch * groups, 1, slots)
    pairs = min(batch * groups, max(1, SHARES // (each * LEAST_QUERIES * slots)))
    for pair in range(0, batch * groups, pairs):
        own = slice(pair, pair + pairs)
        first = 0
        while first < tokens:
            # No more than so many shares at a time, whatever the prompt's length.
            last = min(tokens, first + max(1, SHARES // (pairs * each * slots)))
            seen = slots - tokens + last
            shares = _shares(
                q[own, :, first:last].to(dtype) * scale,
                k[own, :seen],
                lse[own, :, first:last],
                None if shown is None else shown[own, :, :seen],
            )
            total[own, :, :seen] += shares.sum(2)
            first = last
    received_by_row: Tensor = total.view(batch, groups, each, slots).transpose(-1, -2)
    return received_by_row


def _shares(rows: Tensor, k: Tensor, lse: Tensor, bias: Tensor | None) -> Tensor:
    """The shares of some queries, the last of which are those of the last rows.

    Args:
        rows: Scaled queries ``[N, g, R, D]``.
        k: Keys ``[N, s, D]``.
        lse: ``[N, g, R]``.
        bias: ``[N, 1, s]``.

    Returns:
        ``[N, g, R, s]``, 0 where there is no query, and at keys behind it.
    """
    count = rows.shape[2]
    score = torch.matmul(rows.flatten(1, 2), k.transpose(-1, -2))
    if bias is not None:
        score += bias
    share: Tensor = score.unflatten(1, rows.shape[1:3])
    end = lse.unsqueeze(-1)
    share.sub_(end).exp_().masked_fill_(end == -torch.inf, 0)
    # All rows before those of the queries themselves are behind none of them.
    behind = torch.ones(count, count, dtype=torch.bool, device=k.device).triu_(1)
    share[..., -count:].masked_fill_(behind, 0)
    return share
