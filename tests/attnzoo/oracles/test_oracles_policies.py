"""The oracle of policies against masked attention, and against facts that need no code."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from attnzoo.oracles.evictions import Choice, HeldRow, merged, retaining_scores
from attnzoo.oracles.policies import Call, Life, Near, PageChoice, Remembers, bound, life, near_blocks, page_score
from tests.attnzoo.oracles.published import near, random

T = 23
Q = random(2, T, 4, seed=1)
K = random(T, 4, seed=2)
V = random(T, 3, seed=3)
SPLITS = ((T,), (9, 5, 9), (1,) * T, (2, 1, 1, 13, 0, 6))
SNAPKV = Choice(score="window", budget=7, sink=1, recent=2, window=3, pool=3)


def lived(splits: Sequence[int], policy: Remembers, k: Tensor = K, v: Tensor = V, given: Tensor | None = None) -> Life:
    return life(Q, k, v, [Call(n) for n in splits], policy=policy, given=given)


def masked(sees: Tensor, bias: Tensor | None = None, k: Tensor = K, v: Tensor = V) -> Tensor:
    score = Q @ k.T / 2
    if bias is not None:
        score = score + bias
    return torch.softmax(score.masked_fill(~sees, -math.inf), -1) @ v


def places(rows: Sequence[HeldRow]) -> list[int]:
    return [row.position for row in rows]


CAUSAL = torch.ones(T, T).tril().bool()


@pytest.mark.parametrize("splits", SPLITS)
def test_a_head_without_a_policy_is_dense(splits: tuple[int, ...]) -> None:
    near(lived(splits, Remembers()).out, masked(CAUSAL))


@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("slack", [0, 3])
def test_forgetting_by_place_is_a_mask_however_calls_are_cut(splits: tuple[int, ...], slack: int) -> None:
    block = torch.arange(T) // 4
    sees = CAUSAL & ((block[:, None] - block < 2) | (block < 1))
    got = lived(splits, Remembers(near=Near(block=4, local=2, sink=1, slack=slack)))
    near(got.out, masked(sees))
    assert places(got.held[-1]) == [s for s in range(T) if s < 4 or s // 4 > (T - slack) // 4 - 2]


@pytest.mark.parametrize("splits", SPLITS)
def test_a_row_for_all_lost_ones_keeps_the_mass_and_is_exact_where_they_are_alike(splits: tuple[int, ...]) -> None:
    alike_k = K.clone()
    alike_v = V.clone()
    alike_k[4:16] = K[4]
    alike_v[4:16] = V[4]
    policy = Remembers(near=Near(block=4, local=2, sink=1, fold=True))
    got = lived(splits, policy, alike_k, alike_v)
    near(got.out, masked(CAUSAL, k=alike_k, v=alike_v))
    for n, held in zip(torch.tensor(splits).cumsum(0).tolist(), got.held, strict=True):
        assert sum(row.mass for row in held) == pytest.approx(n)
    near(lived(splits, policy).out, lived((T,), policy).out)


def test_a_choice_waits_for_the_first_call_of_one_token() -> None:
    policy = Remembers(choice=SNAPKV)
    prompt = lived((11, 7, 5), policy)
    near(prompt.out, masked(CAUSAL))
    assert [len(held) for held in prompt.held] == [11, 18, 23]
    one = lived((11, 7, 1, 1, 1, 1, 1), policy)
    other = lived((3, 15, 1, 1, 1, 1, 1), policy)
    assert [len(held) for held in one.held] == [11, 18, 8, 9, 10, 11, 12]
    near(one.out, other.out)
    near(one.out[:, :18], masked(CAUSAL)[:, :18])
    assert not torch.allclose(one.out, masked(CAUSAL))
    assert {0, 16, 17} <= set(places(one.held[2]))


def test_a_choice_comes_back_every_so_many_tokens() -> None:
    got = lived((15, *[1] * 8), Remembers(choice=replace(SNAPKV, every=3)))
    assert [len(held) for held in got.held] == [15, 8, 9, 10, 8, 9, 10, 8, 9]


def test_a_budget_for_everything_is_dense_and_larger_ones_keep_what_smaller_ones_do() -> None:
    splits = (19, 1, 1, 1, 1)
    scored = (
        SNAPKV,
        replace(SNAPKV, score="ems"),
        replace(SNAPKV, score="mass", group="mean"),
        replace(SNAPKV, score="norm"),
    )
    for choice in scored:
        near(lived(splits, Remembers(choice=replace(choice, budget=T))).out, masked(CAUSAL))
        kept = [
            set(places(lived(splits, Remembers(choice=replace(choice, budget=n))).held[1])) for n in range(4, 20, 3)
        ]
        assert all(small <= large for small, large in pairwise(kept))


def test_merging_nothing_is_dropping_and_merging_everything_keeps_the_mass() -> None:
    splits = (19, 1, 1, 1, 1)
    dropping = lived(splits, Remembers(choice=SNAPKV))
    near(lived(splits, Remembers(choice=replace(SNAPKV, similarity=1.01))).out, dropping.out)
    merging = lived(splits, Remembers(choice=replace(SNAPKV, similarity=-1.0)))
    assert sum(row.mass for row in merging.held[1]) == pytest.approx(20)
    light = lived(splits, Remembers(choice=replace(SNAPKV, similarity=-1.0, weighs=False)))
    assert {row.mass for row in light.held[1]} == {1.0}
    near(
        torch.stack([row.k for row in light.held[1][:-1]]),
        torch.stack([row.k for row in merging.held[1][:-1]]),
    )


def test_duplicates_merge_exactly() -> None:
    k = K[torch.arange(T) % 5]
    v = V[torch.arange(T) % 5]
    policy = Remembers(choice=Choice(score="norm", budget=8, recent=5, similarity=0.999))
    near(lived((18, 1, 1, 1, 1, 1), policy, k, v).out, masked(CAUSAL, k=k, v=v))


def test_the_mass_of_all_queries_is_that_of_a_table() -> None:
    share = torch.softmax((Q[:, :20] @ K[:20].T / 2).masked_fill(~CAUSAL[:20, :20], -math.inf), -1)
    mean = (share.sum(1) / torch.arange(20, 0, -1)).amax(0)
    got = lived((20, 1, 1, 1), Remembers(choice=Choice(score="mass", budget=9)))
    assert places(got.held[1])[:9] == sorted(mean.topk(9).indices.tolist())


def test_bounds_are_above_every_score_and_finer_ones_nearer() -> None:
    rows = [HeldRow(j, K[j], V[j], torch.zeros(2)) for j in range(12)]
    true = float((Q[:, 15] @ K[:12].T).max())
    assert page_score(Q[:, 15], rows, 12) >= page_score(Q[:, 15], rows, 4) >= page_score(Q[:, 15], rows, 1) - 1e-12
    assert page_score(Q[:, 15], rows, 1) == pytest.approx(true)
    assert bound(Q[0, 15], rows[:1]) == pytest.approx(float(Q[0, 15] @ K[0]))


def test_reading_all_pages_is_dense_and_three_pages_are_the_forced_ones() -> None:
    splits = (18, 1, 1, 1, 1, 1)
    near(lived(splits, Remembers(pages=PageChoice(page=4, pages=6))).out, masked(CAUSAL))
    sees = CAUSAL.clone()
    for t in range(18, T):
        sees[t, 4 : (-(-t // 4) - 2) * 4] = False
    near(lived(splits, Remembers(pages=PageChoice(page=4, pages=3))).out, masked(sees))


def test_pages_that_are_used_again_grow_by_new_ones() -> None:
    splits = (18, 1, 1, 1, 1, 1)
    again = lived(splits, Remembers(pages=PageChoice(page=2, pages=4, reuse=9)))
    first = lived(splits, Remembers(pages=PageChoice(page=2, pages=4)))
    near(again.out[:, :19], first.out[:, :19])
    assert not torch.allclose(again.out, first.out)


def test_a_merged_row_is_the_mean_by_mass() -> None:
    rows = [HeldRow(j, K[j], V[j], torch.zeros(2), mass=float(j + 1)) for j in range(3)]
    whole = merged(rows, rows[1])
    weight = torch.tensor([1.0, 2.0, 3.0]).double() / 6
    near(whole.k, weight @ K[:3])
    near(whole.v, weight @ V[:3])
    assert whole.mass == 6
    assert whole.position == 1
    assert merged(rows, rows[1], weighs=False).mass == 2


def test_windows_of_tokens_are_rounded_to_blocks_that_show_at_least_as_many() -> None:
    assert near_blocks(256, 64) == 5
    assert near_blocks(1, 4) == near_blocks(4, 4) == 2


def test_scores_that_rows_come_with_are_a_network_of_their_token_alone() -> None:
    q, k, v = random(4, 5, 3, seed=4), random(2, 5, 3, seed=5), random(2, 5, 2, seed=6)
    first, second = random(7, 22, seed=7), random(2, 7, seed=8)
    inputs = torch.cat([x.transpose(0, 1).flatten(1) for x in (q, k, v)], 1)
    near(retaining_scores(q, k, v, first, second), (torch.nn.functional.silu(inputs @ first.T) @ second.T).T)
    given = random(T, seed=9)
    got = lived((20, 1, 1, 1), Remembers(choice=Choice(score="given", budget=6, recent=2)), given=given)
    assert places(got.held[1])[:6] == [*sorted(given[:18].topk(4).indices.tolist()), 18, 19]
