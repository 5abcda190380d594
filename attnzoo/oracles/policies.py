r"""What a KV head remembers: the life of one head of one sequence, call by call and token by token.

Source: Xiao et al. 2023, *Efficient Streaming Language Models with Attention Sinks* (arXiv:2309.17453); Xiao et al.
2024, *DuoAttention* (arXiv:2410.10819); Tang et al. 2024, *RazorAttention* (arXiv:2407.15891); Tang et al. 2024,
*Quest* (arXiv:2406.10774); Yang et al. 2025, *LServe* (arXiv:2502.14866); choices of rows: see ``evictions.py``.

.. math:: o = \sum_j p_j v_j, \quad p_j = softmax_j(\sigma q \cdot k_j + \log m_j)

over the rows j that are held and the own call's rows up to the query. A policy says what is held and what is read.

Letters: ``g`` query heads of a KV head, ``T`` tokens, ``D`` key width, ``Dv`` value width, ``w`` tokens in a block or
rows in a page, ``L`` near blocks; ``t`` a token's position, ``n`` tokens seen.

What the formulas leave open, and how it is read here:
- behind a call, heads that forget by place hold what the block rule shows to the next token, or to the one ``slack``
  tokens before it;
- a row that stands for all lost ones stands for them at each query as the rule has it there, so that calls are cut at
  will; it comes before the others;
- pages are counted in what is held before a call; the own token is read besides;
- a choice of pages that is used again grows by the pages that were begun since;
- rows are chosen at the start of a one-column call in which the sequence has a token, if a longer call has written to
  the sequence since the last choice, or ``every`` tokens have come since.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from attnzoo.oracles.evictions import Choice, HeldRow, Query, chosen, folded, shares


@dataclass(frozen=True, eq=False, kw_only=True)
class Near:
    """What is held by place alone.

    Attributes:
        block: Tokens in a block.
        local: Near blocks, the own one included.
        sink: First blocks.
        fold: Whether one row stands for all that have left.
        second: Second moment of scaled queries ``[D, D]``, by which that row's mass is mended.
        slack: Tokens that leaving is deferred by.
    """

    block: int
    local: int
    sink: int = 0
    fold: bool = False
    second: Tensor | None = None
    slack: int = 0


@dataclass(frozen=True, kw_only=True)
class PageChoice:
    """Which pages a one-token call reads.

    Attributes:
        page: Rows in a page.
        pages: Pages that are read, the forced ones among them: the first and the last two.
        part: Rows that bounds are taken over; a page's bound is the largest of its parts'.
        reuse: Calls that use one choice.
    """

    page: int
    pages: int
    part: int | None = None
    reuse: int = 1


@dataclass(frozen=True, kw_only=True)
class Remembers:
    """One head's policy; a head without any holds and reads everything.

    Attributes:
        near: What is held by place.
        choice: What is held by score.
        pages: What is read.
    """

    near: Near | None = None
    choice: Choice | None = None
    pages: PageChoice | None = None


@dataclass(frozen=True)
class Call:
    """A call.

    Attributes:
        tokens: The sequence's tokens in it; 0 where it pauses.
        columns: Tokens of the longest sequence of its batch; ``None`` where that is this one.
        chooses: Whether rows are chosen before it in any case.
    """

    tokens: int
    columns: int | None = None
    chooses: bool = False


@dataclass(eq=False)
class Life:
    """What came of it: ``out`` ``[g, T, Dv]``, and what was ``held`` behind each call, in the order of positions."""

    out: Tensor
    held: list[list[HeldRow]] = field(default_factory=list)


def near_blocks(window: int, block: int) -> int:
    """Near blocks that show every row at least ``window`` earlier tokens: ``ceil(window / block) + 1``."""
    return -(-window // block) + 1


def rule(near: Near, t: int, s: int) -> bool:
    r"""Whether the token at t reads the one at s by place.

    .. math:: \lfloor s/w \rfloor < sink \vee \lfloor t/w \rfloor - \lfloor s/w \rfloor < L
    """
    return s // near.block < near.sink or t // near.block - s // near.block < near.local


def by_place(near: Near, rows: Sequence[HeldRow], t: int) -> list[HeldRow]:
    """The rows as the token at t is shown them: those of the rule, and one for all others if there is such a row."""
    stay = [row for row in rows if not row.folded and rule(near, t, row.position)]
    lost = [row for row in rows if row.folded or not rule(near, t, row.position)]
    if not near.fold or not lost:
        return stay
    lost.sort(key=lambda row: not row.folded)
    return [folded(lost, near.second), *stay]


def bound(query: Tensor, rows: Sequence[HeldRow]) -> float:
    r"""No row's :math:`q \cdot k` is larger: :math:`\sum_d \max(q_d \max_j k_{jd}, q_d \min_j k_{jd})`."""
    total = 0.0
    for d in range(query.shape[0]):
        channel = [float(row.k[d]) for row in rows]
        total += max(float(query[d]) * max(channel), float(query[d]) * min(channel))
    return total


def page_score(queries: Tensor, rows: Sequence[HeldRow], part: int) -> float:
    """The largest bound of a page's parts for any query ``[g, D]`` of the group."""
    parts = [rows[start : start + part] for start in range(0, len(rows), part)]
    return max(bound(query, each) for query in queries for each in parts)


def chosen_pages(queries: Tensor, rows: Sequence[HeldRow], rule: PageChoice) -> list[int]:
    """The pages of the rows held that a token reads, ascending; equal bounds: the earlier page."""
    pages = [rows[start : start + rule.page] for start in range(0, len(rows), rule.page)]
    count = len(pages)
    forced = {p for p in (0, count - 2, count - 1) if 0 <= p < count}
    value = [page_score(queries, page, rule.part or rule.page) for page in pages]
    rest = sorted((p for p in range(count) if p not in forced), key=lambda p: (-value[p], p))
    return sorted([*forced, *rest[: max(0, rule.pages - len(forced))]])


class Head:
    """One head as it lives: what it holds, and what it remembers of its calls.

    Args:
        policy: What is held and read.
        scale: The factor on scores.
    """

    def __init__(self, policy: Remembers, scale: float) -> None:
        self.policy = policy
        self.scale = scale
        self.held: list[HeldRow] = []
        self.queries: list[Query] = []
        self.tokens = 0
        self.since = 0
        self.longer = False
        self.listed: list[int] = []
        self.known = 0
        self.uses = 0

    def copy(self) -> Head:
        """One that goes its own way from here."""
        other = Head(self.policy, self.scale)
        other.__dict__.update(self.__dict__)
        other.held = [replace(row, received=row.received.clone()) for row in self.held]
        other.queries = list(self.queries)
        return other

    def choose(self) -> None:
        """Choose among the rows held."""
        self.longer = False
        self.since = 0
        if self.policy.choice is not None:
            self.held = chosen(self.held, self.queries, self.policy.choice, tokens=self.tokens, scale=self.scale)
            self.uses = 0

    def is_due(self, call: Call) -> bool:
        """Whether rows are chosen before a call."""
        if call.chooses:
            return True
        if call.tokens == 0 or (call.columns or call.tokens) > 1:
            return False
        every = self.policy.choice.every if self.policy.choice else None
        return self.longer or (every is not None and self.since >= every)

    def read(self, queries: Tensor, call: Call) -> list[HeldRow]:
        """The rows held that a token of this call reads."""
        rule = self.policy.pages
        if rule is None or (call.columns or call.tokens) > 1 or not self.held:
            self.uses = 0
            return self.held
        count = -(-len(self.held) // rule.page)
        if self.uses % rule.reuse == 0:
            self.listed = chosen_pages(queries, self.held, rule)
        else:
            self.listed = self.listed + list(range(self.known, count))
        self.known = count
        self.uses += 1
        return [row for j, row in enumerate(self.held) if j // rule.page in self.listed]

    def live(self, q: Tensor, k: Tensor, v: Tensor, call: Call, given: Tensor | None = None) -> Tensor:
        """One call.

        Args:
            q: Rotated queries of its heads ``[g, n, D]``, of the call's ``n`` tokens.
            k: Rotated keys ``[n, D]``.
            v: Values ``[n, Dv]``.
            call: Its sizes.
            given: Scores that the rows come with ``[n]``.

        Returns:
            ``[g, n, Dv]``.
        """
        if self.is_due(call):
            self.choose()
        own: list[HeldRow] = []
        columns = [q.new_zeros(q.shape[0], 0, v.shape[-1])]
        for n in range(call.tokens):
            t = self.tokens + n
            past = self.read(q[:, n], call)
            score = 0.0 if given is None else float(given[n])
            own.append(HeldRow(t, k[n], v[n], q.new_zeros(q.shape[0]), score=score))
            rows = past + own
            if self.policy.near is not None:
                rows = by_place(self.policy.near, rows, t)
            # Every row that is held could be seen, whether it is read or not.
            for row in self.held + own:
                row.asked += 1
            self.queries.append(Query(t, q[:, n]))
            columns.append(_asked(q[:, n], rows, self.scale).unsqueeze(1))
        self.tokens += call.tokens
        self.finish(own, call)
        return torch.cat(columns, 1)

    def finish(self, own: list[HeldRow], call: Call) -> None:
        """Hold the rows of a call that is over."""
        self.held = self.held + own
        if self.policy.near is not None and self.held:
            reader = max(0, self.tokens - self.policy.near.slack)
            self.held = by_place(self.policy.near, self.held, reader)
        self.since += call.tokens
        self.longer = self.longer or (call.tokens > 0 and (call.columns or call.tokens) > 1)


def life(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    calls: Sequence[Call],
    *,
    policy: Remembers,
    scale: float | None = None,
    given: Tensor | None = None,
) -> Life:
    """One KV head through all calls of one sequence.

    Args:
        q: Rotated queries of its heads ``[g, T, D]``.
        k: Rotated keys ``[T, D]``.
        v: Values ``[T, Dv]``.
        calls: How the T tokens come.
        policy: What is held and read.
        scale: The factor on scores; ``None`` means ``D ** -0.5``.
        given: Scores that rows come with ``[T]``.
    """
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    head = Head(policy, factor)
    parts: list[Tensor] = []
    held: list[list[HeldRow]] = []
    for call in calls:
        own = slice(head.tokens, head.tokens + call.tokens)
        score = None if given is None else given[own]
        parts.append(head.live(q[:, own], k[own], v[own], call, score))
        held.append(list(head.held))
    out = torch.cat(parts, 1) if parts else q.new_zeros(q.shape[0], 0, v.shape[-1])
    return Life(out, held)


def _asked(queries: Tensor, rows: Sequence[HeldRow], scale: float) -> Tensor:
    """Attention of one token's heads ``[g, D]`` over some rows, which add up what they receive, ``[g, Dv]``."""
    out = []
    for h in range(queries.shape[0]):
        share = shares(queries[h], rows, scale)
        for row, received in zip(rows, share.tolist(), strict=True):
            row.received[h] += received
        out.append(share @ torch.stack([row.v for row in rows]))
    return torch.stack(out)
