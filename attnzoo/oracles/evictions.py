r"""Which rows of a KV head stay when they are chosen by what they hold, row by row.

Source: Zhang et al. 2023, *H2O* (arXiv:2306.14048); Oren et al. 2024, *Transformers are Multi-State RNNs* (TOVA,
arXiv:2401.06104); Li et al. 2024, *SnapKV* (arXiv:2404.14469); Devoto et al. 2024, *A Simple and Effective L2
Norm-Based Strategy for KV Cache Compression* (arXiv:2406.11430); Li et al. 2024, *EMS* (arXiv:2412.08521); Huang et al.
2024, *Locret* (arXiv:2410.01805).

A row is a key, a value and a mass m: its score is :math:`\sigma q \cdot k + \log m`. Letters: ``g`` query heads of a KV
head, ``D`` key width, ``Dv`` value width; ``i`` a query, ``j`` a row, ``n`` tokens seen.

What the formulas leave open, and how it is read here:
- shares are taken per query head and averaged over queries; only then are the heads of a group joined;
- "window" shares are those that the last queries would give to the rows that are held now, each over the rows that are
  not behind it; fewer queries than the window's are averaged over those that there are;
- the mass of all queries was added up when they were asked, over what was held then; it is divided by the number of
  queries that were asked while the row was there, its own token's included;
- neighbours for pooling are neighbours among the rows held; the window's own rows lend theirs to no other, as in
  SnapKV's listing 1, and their shares, of rows that are to stay in any case, are no measure for others in EMS either;
- the first rows are those of positions below ``sink``, the last ones of positions from ``n - recent`` on;
- equal scores: the earlier row stays; equally similar centres: the earlier one takes the row;
- a centre keeps its own position, shares and score, whatever it takes in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Query:
    """The queries of one token: ``rows`` of the g heads of a group ``[g, D]``."""

    position: int
    rows: Tensor


@dataclass(eq=False)
class HeldRow:
    """What a head holds: a token, or the mean of several.

    Attributes:
        position: In the sequence; that of the centre, or of the first token that a head has lost.
        k: Key, rotated ``[D]``.
        v: Value ``[Dv]``.
        mass: Tokens that it stands for.
        received: Share of attention that every query so far gave it, summed ``[g]``.
        asked: How many queries could see it.
        score: Of its token, made when it came.
        folded: Whether it stands for what a head has lost.
        moment: Of a folded row, mean of :math:`k^T M k` of what it stands for.
        spread: What is added to the logarithm of its mass.
    """

    position: int
    k: Tensor
    v: Tensor
    received: Tensor
    mass: float = 1.0
    asked: int = 0
    score: float = 0.0
    folded: bool = False
    moment: float = 0.0
    spread: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A choice of rows by their scores.

    Attributes:
        score: "window", the share of the last queries; "mass", that of all; "norm", short keys first; "ems", the larger
            of both shares; "given", what the row came with.
        budget: Rows that stay; or else
        share: rows that stay for each token seen, rounded, and no fewer than those that stay in any case.
        sink: First tokens that stay.
        recent: Last tokens that stay.
        window: Queries of "window" and "ems".
        pool: Rows over which the share of the last queries is the largest of its neighbours', odd.
        group: How the query heads of a KV head are joined.
        every: Tokens between two choices while decoding.
        similarity: From which cosine on a row that is lost joins a row that stays; ``None`` merges nothing.
        weighs: Whether a row counts as much as all that it stands for.
        fold: Whether one row more stands for all rows that nothing is left of else.
    """

    score: Literal["window", "mass", "norm", "ems", "given"]
    budget: int = 0
    share: float | None = None
    sink: int = 0
    recent: int = 0
    window: int = 1
    pool: int = 1
    group: Literal["max", "mean"] = "max"
    every: int | None = None
    similarity: float | None = None
    weighs: bool = True
    fold: bool = False


def shares(query: Tensor, rows: Sequence[HeldRow], scale: float) -> Tensor:
    r"""What one query of one head gives to each row, :math:`p_j = softmax_j(\sigma q \cdot k_j + \log m_j)`."""
    log_mass = query.new_tensor([math.log(row.mass) + row.spread for row in rows])
    return torch.softmax(scale * (torch.stack([row.k for row in rows]) @ query) + log_mass, 0)


def merged(rows: Sequence[HeldRow], centre: HeldRow, *, weighs: bool = True) -> HeldRow:
    r"""The row that stands for all of them.

    .. math:: m = \sum_j m_j, \quad k = \sum_j m_j k_j / m, \quad v = \sum_j m_j v_j / m
    """
    mass = math.fsum(row.mass for row in rows)
    key = torch.zeros_like(centre.k)
    value = torch.zeros_like(centre.v)
    for row in rows:
        key = key + row.mass / mass * row.k
        value = value + row.mass / mass * row.v
    return replace(centre, k=key, v=value, mass=mass if weighs else centre.mass)


def folded(rows: Sequence[HeldRow], second: Tensor | None = None) -> HeldRow:
    r"""The row that stands for all that a head has lost, in the order in which they were lost.

    .. math:: \log m + \tfrac{1}{2} ( \overline{k^T M k} - \hat k^T M \hat k )

    Args:
        rows: A row of this kind, if there is one yet, and those that join it.
        second: M, the second moment of scaled queries ``[D, D]``; ``None`` leaves the second term out.
    """
    row = merged(rows, rows[0])
    row.folded = True
    if second is not None:
        each = [old.moment if old.folded else float(old.k @ second @ old.k) for old in rows]
        row.moment = math.fsum(old.mass * moment for old, moment in zip(rows, each, strict=True)) / row.mass
        row.spread = (row.moment - float(row.k @ second @ row.k)) / 2
    return row


def joined(each: Tensor, group: str) -> float:
    """One number for the heads of a group ``[g]``."""
    return float(each.max() if group == "max" else each.mean())


def window_shares(rows: Sequence[HeldRow], queries: Sequence[Query], choice: Choice, scale: float) -> list[float]:
    """Mean share that the last queries give to each row."""
    last = queries[-choice.window :]
    total = [torch.zeros_like(row.received) for row in rows]
    for query in last:
        seen = [j for j, row in enumerate(rows) if row.position <= query.position]
        for h in range(query.rows.shape[0]):
            share_of = shares(query.rows[h], [rows[j] for j in seen], scale).tolist()
            for j, share in zip(seen, share_of, strict=True):
                total[j][h] += share
    return [joined(each / max(1, len(last)), choice.group) for each in total]


def mean_shares(rows: Sequence[HeldRow], choice: Choice) -> list[float]:
    """Mean share of the queries that could see each row."""
    return [joined(row.received / max(1, row.asked), choice.group) for row in rows]


def pooled(values: Sequence[float], width: int) -> list[float]:
    """The largest of each value and its ``width // 2`` neighbours to both sides."""
    side = width // 2
    return [max(values[max(0, j - side) : j + side + 1]) for j in range(len(values))]


def scores(
    rows: Sequence[HeldRow], queries: Sequence[Query], choice: Choice, *, tokens: int, scale: float
) -> list[float]:
    """How much each row matters but those that stand for what is lost; higher stays."""
    mine = [j for j, row in enumerate(rows) if not row.folded]
    if choice.score == "norm":
        return [-float(rows[j].k.norm()) for j in mine]
    if choice.score == "given":
        return [rows[j].score for j in mine]
    whole = mean_shares([rows[j] for j in mine], choice)
    if choice.score == "mass":
        return whole
    # The row for what is lost takes its share too.
    local = window_shares(rows, queries, choice, scale)
    local = [local[j] for j in mine]
    before = [rows[j].position < tokens - choice.window for j in mine]
    local = pooled([share if old else 0.0 for share, old in zip(local, before, strict=True)], choice.pool)
    if choice.score == "window":
        return local
    # EMS: both shares on the same scale, each by its largest.
    return [max(a / max(whole), b / max(local)) for a, b in zip(whole, local, strict=True)]


def nearest(row: HeldRow, stay: Sequence[HeldRow], similarity: float) -> HeldRow | None:
    """The row that stays whose key has the largest cosine with this one's, if that is large enough."""
    cosines = [float(torch.cosine_similarity(row.k, other.k, 0)) for other in stay]
    best = max(range(len(stay)), key=lambda c: (cosines[c], -c))
    return stay[best] if cosines[best] >= similarity else None


def chosen(
    rows: Sequence[HeldRow], queries: Sequence[Query], choice: Choice, *, tokens: int, scale: float
) -> list[HeldRow]:
    """What is held behind a choice, in the order of positions.

    Args:
        rows: What is held, in the order of positions.
        queries: All that were asked, in their order.
        choice: The rule.
        tokens: Tokens seen.
        scale: The factor on scores.
    """
    budget = choice.budget if choice.share is None else round(choice.share * tokens)
    budget = max(budget, choice.sink + choice.recent)
    beside = [row for row in rows if row.folded]
    held = [row for row in rows if not row.folded]
    if len(held) <= budget:
        return list(rows)
    value = scores(rows, queries, choice, tokens=tokens, scale=scale)
    forced = [row.position < choice.sink or row.position >= tokens - choice.recent for row in held]
    order = sorted(range(len(held)), key=lambda j: (not forced[j], -value[j], j))
    # Forced rows come first, however many they are.
    places = sorted(order[:budget])
    stay = [held[j] for j in places]
    members: dict[int, list[HeldRow]] = {id(row): [row] for row in stay}
    for row in held:
        if id(row) in members:
            continue
        centre = None if choice.similarity is None else nearest(row, stay, choice.similarity)
        (beside if centre is None else members[id(centre)]).append(row)
    left = [members[id(row)] for row in stay]
    kept = [each[0] if len(each) == 1 else merged(each, each[0], weighs=choice.weighs) for each in left]
    return [folded(beside), *kept] if choice.fold and beside else kept


def retaining_scores(q: Tensor, k: Tensor, v: Tensor, first: Tensor, second: Tensor) -> Tensor:
    r"""Locret's score of each token for every KV head, :math:`W_2 SiLU(W_1 [q; k; v])`.

    Args:
        q: Queries before rotation ``[H, T, D]``.
        k: Keys before rotation ``[G, T, D]``.
        v: Values ``[G, T, Dv]``.
        first: W1 ``[hidden, H D + G D + G Dv]``; heads lie behind one another.
        second: W2 ``[G, hidden]``.

    Returns:
        ``[G, T]``.
    """
    columns = []
    for t in range(q.shape[1]):
        inputs = torch.cat([x[h, t] for x in (q, k, v) for h in range(x.shape[0])])
        hidden = first @ inputs
        columns.append(second @ (hidden * torch.sigmoid(hidden)))
    return torch.stack(columns, 1) if columns else q.new_zeros(second.shape[0], 0)
