"""Attention over pages against the rules, row by row, however calls are cut, padded and batched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnzoo.base.evicting.calls import EvictingInputs, attend_evicting
from attnzoo.cache.evicting.cache import EvictingCache
from attnzoo.cache.kv_cache import Stream
from attnzoo.cache.pages.rows import gathered
from attnzoo.cache.policies.budget import Budgeted
from attnzoo.cache.policies.ems import EMS
from attnzoo.cache.policies.reading import Pages
from attnzoo.cache.policies.scored import H2O, TOVA, SnapKV
from attnzoo.oracles.evictions import Choice
from attnzoo.oracles.policies import Call, Life, PageChoice, Remembers, life
from tests.attnzoo.base.paged.paged_calls import (
    GROUPS,
    HEADS,
    VALUES,
    WIDTH,
    Everything,
    Placed,
    by_place,
    empty_cache,
    run,
    sequences,
)

PLACED = [
    Everything(),
    Placed(),
    Placed(full=(False, False), sinks=0, local=1),
    Placed(fold=True),
    Placed(full=(False, False), fold=True, slack=5),
    Placed(slack=6, local=3),
]
TOLERANCE = 1e-12


@st.composite
def splits(draw: st.DrawFn, most: int = 40) -> list[list[int]]:
    batch = draw(st.integers(1, 2))
    calls = []
    left = [most] * batch
    for _ in range(draw(st.integers(1, 9))):
        tokens = draw(st.sampled_from([1, 1, 1, 2, 3, 9, 17]))
        lengths = [min(draw(st.sampled_from([tokens, tokens, tokens, 0])), n) for n in left]
        if max(lengths):
            calls.append(lengths)
            left = [n - count for n, count in zip(left, lengths, strict=True)]
    return calls or [[1] * batch]


def totals(calls: list[list[int]]) -> list[int]:
    return [sum(column) for column in zip(*calls, strict=True)]


@settings(max_examples=25)
@given(
    calls=splits(), policy=st.sampled_from(PLACED), seed=st.integers(0, 99), impl=st.sampled_from(["auto", "reference"])
)
def test_what_is_held_by_place_follows_its_rule_under_any_split(calls, policy, seed, impl) -> None:
    tensors = sequences(len(calls[0]), max(totals(calls)), seed)
    out = run(empty_cache(policy, len(calls[0])), tensors, calls, impl)
    for item, tokens in enumerate(totals(calls)):
        expected = by_place([x[item, :, :tokens] for x in tensors], policy)
        torch.testing.assert_close(out[item, :, :tokens], expected, rtol=0, atol=TOLERANCE)


CHOOSING = [
    (SnapKV(budget=9, sink=2, window=3, pool=1, page=4), Choice(score="window", budget=9, window=3)),
    (SnapKV(budget=9, sink=1, window=2, pool=1, page=4, every=5), Choice(score="window", budget=9, window=2)),
    (H2O(budget=8, sink=1, local=0.5, page=4, every=4), Choice(score="mass", budget=8)),
    (TOVA(budget=6, sink=0, page=4, every=3), Choice(score="window", budget=6)),
    (EMS(budget=7, sink=1, window=2, pool=1, page=4, similarity=0.1), Choice(score="ems", budget=7, window=2)),
    (
        EMS(budget=7, sink=1, window=2, pool=1, page=4, similarity=0.1, weighs=False, every=6),
        Choice(score="ems", budget=7, window=2, weighs=False),
    ),
]


def choice_of(policy: Budgeted, choice: Choice) -> Choice:
    """The oracle's words for what a policy says."""
    choice = replace(choice, sink=policy.sink, recent=policy.recent(choice.budget), group=policy.group)
    choice = replace(choice, every=policy.every)
    return replace(choice, similarity=policy.similarity) if isinstance(policy, EMS) else choice


def lives(tensors: Sequence[Tensor], calls: list[list[int]], remembers: Remembers) -> Iterator[tuple[int, slice, Life]]:
    """For each item and KV head what the oracle says: the item, the query heads, their life."""
    q, k, v = tensors
    each = HEADS // GROUPS
    for item, tokens in enumerate(totals(calls)):
        mine = [Call(lengths[item], max(lengths)) for lengths in calls]
        for group in range(GROUPS):
            heads = slice(group * each, (group + 1) * each)
            own = (q[item, heads, :tokens], k[item, group, :tokens], v[item, group, :tokens])
            yield item, heads, life(*own, mine, policy=remembers)


@settings(max_examples=20)
@given(calls=splits(most=24), chosen=st.sampled_from(CHOOSING), seed=st.integers(0, 99))
def test_rows_are_chosen_as_the_oracle_says(calls, chosen, seed) -> None:
    policy, choice = chosen
    tensors = sequences(len(calls[0]), max(totals(calls)), seed)
    cache = empty_cache(policy, len(calls[0]))
    out = run(cache, tensors, calls)
    rows, counts = gathered(cache.pool)
    for item, heads, one in lives(tensors, calls, Remembers(choice=choice_of(policy, choice))):
        tokens = one.out.shape[1]
        torch.testing.assert_close(out[item, heads, :tokens], one.out, rtol=0, atol=TOLERANCE)
        group = heads.start * GROUPS // HEADS
        held = one.held[-1]
        assert rows["position"][item, group, : counts[item, group]].tolist() == [row.position for row in held]
        mass = rows["bias"][item, group, : counts[item, group]].exp()
        torch.testing.assert_close(mass, mass.new_tensor([row.mass for row in held]), rtol=0, atol=TOLERANCE)


@settings(max_examples=15)
@given(calls=splits(most=40), reuse=st.integers(1, 3), seed=st.integers(0, 99))
def test_pages_are_read_as_the_oracle_says(calls, reuse, seed) -> None:
    policy = Pages(page=4, budget=12, reuse=reuse)
    # An item that pauses uses no choice; here all of a batch go on together.
    calls = [[max(lengths)] * len(lengths) for lengths in calls]
    tensors = sequences(len(calls[0]), max(totals(calls)), seed)
    out = run(empty_cache(policy, len(calls[0])), tensors, calls)
    remembers = Remembers(pages=PageChoice(page=4, pages=3, reuse=reuse))
    for item, heads, one in lives(tensors, calls, remembers):
        torch.testing.assert_close(out[item, heads, : one.out.shape[1]], one.out, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("calls", [[[1]] * 30, [[7], [1], [1], [9], [1], [12], [1]], [[30], [1]]])
def test_both_storages_agree_on_what_is_held_by_place(calls: list[list[int]]) -> None:
    policy = Placed(local=3)
    tensors = sequences(1, sum(totals(calls)), 5)
    paged = empty_cache(policy, 1)
    streams = {"k": Stream(GROUPS, WIDTH), "v": Stream(GROUPS, VALUES)}
    retention = policy.retention(GROUPS)
    other = EvictingCache(streams, retention=retention, batch=1, max_length=100, dtype=torch.float64)
    out = run(paged, tensors, calls)
    first = 0
    for (tokens,) in calls:
        q, k, v = (x[:, :, first : first + tokens] for x in tensors)
        with other.all_or_nothing():
            other.stage({"k": k, "v": v}, tokens)
            expected = attend_evicting(EvictingInputs(q, k, v, cache=other, lengths=tokens), None, "auto")
        torch.testing.assert_close(out[:, :, first : first + tokens], expected, rtol=0, atol=TOLERANCE)
        first += tokens


def test_a_budget_for_all_is_dense() -> None:
    calls = [[20, 13], [1, 1], [3, 0], [1, 1]]
    tensors = sequences(2, 25, 3)
    out = run(empty_cache(SnapKV(budget=100, page=4, window=2), 2), tensors, calls)
    dense = run(empty_cache(Everything(), 2), tensors, calls)
    torch.testing.assert_close(out, dense, rtol=0, atol=TOLERANCE, equal_nan=True)
