r"""What a policy is shown of the rows that are held: among it the share of attention that queries give them.

The share that query i of a head gives to row j is :math:`p_{ij} = softmax_j(\sigma q_i \cdot k_j + b_j)`, over the rows
that are not behind it. Shares are averaged over queries for each query head; then the heads of a group are joined.

Letters: B batch, H query heads, G KV heads, g query heads of a KV head, R rows of the head that holds most, W last
queries, D key width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.cache.pages.pool import PagePool
from attnzoo.cache.pages.rows import gathered
from attnzoo.cache.policies.protocol import Policy, Seen
from attnzoo.cache.streams import Ring

QUERY_MARGIN = 16
"""Tokens that may be taken back since rows were chosen, beside a policy's slack, where shares of queries are asked for.

A query is as large as a row and a half in a layer with three query heads for a KV head, and the rows are few.
"""


@dataclass(frozen=True, eq=False)
class LastQueries:
    """The last queries of each item.

    Attributes:
        q: Rotated, ``[B, H, W, D]``; zeros before an item's first.
        scale: The factor on scores.
    """

    q: Tensor
    scale: float


def query_ring(policy: Policy, q: Tensor) -> Ring:
    """An empty ring for the last queries, as many as a policy's window has.

    As many as its slack says may be taken back, and ``QUERY_MARGIN`` more.

    Args:
        policy: Whose window.
        q: Queries ``[B, H, T, D]``.
    """
    margin = policy.slack + QUERY_MARGIN
    shape = (q.shape[0], q.shape[1], policy.window + margin + 1, q.shape[3])
    return Ring(policy.window, torch.zeros(shape, dtype=q.dtype, device=q.device), margin)


def seen_of(
    pool: PagePool,
    policy: Policy,
    tokens: Tensor,
    *,
    last: LastQueries | None = None,
    beside: tuple[Tensor, Tensor] | None = None,
) -> Seen:
    """What a policy is shown.

    Args:
        pool: What is held.
        policy: What is asked for.
        tokens: Tokens that each item has seen, int64 ``[B]``, where the pool lies.
        last: The last queries, where shares of theirs are asked for.
        beside: Keys ``[B, G, D]`` and biases ``[B, G]`` of compensation rows, where there are any.
    """
    rows, _ = gathered(pool)
    k = rows["k"].to(pool.device)
    position = rows["position"].long()
    bias = rows["bias"]
    signals = {}
    if "score" in policy.needs:
        signals["score"] = rows["score"]
    if "mass" in policy.needs:
        queries = (tokens.view(-1, 1, 1) - position).clamp(min=1)
        # Every query since a row's own token could see it.
        mean = rows["mass"] / queries.unsqueeze(-1)
        signals["mass"] = joined(mean.transpose(-1, -2), policy.group).masked_fill(position < 0, 0)
    if "window_mass" in policy.needs and last is not None:
        each = window_mass(last, k, position, bias, tokens=tokens, beside=beside)
        signals["window_mass"] = joined(each, policy.group)
    return Seen(k, rows["v"].to(pool.device), position, bias, tokens, signals)


def joined(mass: Tensor, group: str) -> Tensor:
    """One number for the query heads of a group, ``[B, G, g, R]`` to ``[B, G, R]``."""
    return mass.amax(2) if group == "max" else mass.mean(2)


def window_mass(
    last: LastQueries,
    k: Tensor,
    position: Tensor,
    bias: Tensor,
    *,
    tokens: Tensor,
    beside: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Mean share that the last queries give to each row, ``[B, G, g, R]``, in the dtype of biases.

    Args:
        last: These queries.
        k: Keys ``[B, G, R, D]``.
        position: Of each row ``[B, G, R]``, -1 for none.
        bias: Of each row ``[B, G, R]``.
        tokens: Tokens that each item has seen, int64 ``[B]``.
        beside: Keys and biases of compensation rows, which take their share too.
    """
    batch, groups, held, width = k.shape
    count = last.q.shape[2]
    asked = torch.arange(-count, 0, device=k.device) + tokens.unsqueeze(1)  # [B, W]
    q = last.q.to(bias.dtype).reshape(batch, groups, -1, width)  # [B, G, g * W, D]
    score = torch.matmul(q * last.scale, k.to(bias.dtype).transpose(-1, -2)).unflatten(2, (-1, count))
    score = score + bias[:, :, None, None]
    behind = position[:, :, None, None] > asked[:, None, None, :, None]
    score = score.masked_fill(behind, -torch.inf)
    if beside is not None:
        lost = torch.matmul(q * last.scale, beside[0].to(bias.dtype).unsqueeze(-1)).unflatten(2, (-1, count))
        score = torch.cat((score, lost + beside[1][:, :, None, None, None]), -1)
    share = score.softmax(-1)[..., :held]
    share = share.masked_fill((asked < 0)[:, None, None, :, None], 0)
    # Fewer queries than the window's are averaged over those that there are.
    there = (asked >= 0).sum(1).clamp(min=1)
    mean: Tensor = share.nan_to_num(0).sum(3) / there.view(-1, 1, 1, 1)
    return mean
