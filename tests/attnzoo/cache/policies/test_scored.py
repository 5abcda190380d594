"""Laws of all policies that keep the rows with the best scores, and each one's score beside its formula."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnzoo.cache.policies.budget import Budgeted
from attnzoo.cache.policies.ems import EMS, most_similar
from attnzoo.cache.policies.protocol import Keep, Seen, policy_from
from attnzoo.cache.policies.scored import H2O, TOVA, KNorm, SnapKV
from attnzoo_kernels.errors import ConfigError
from tests.attnzoo.cache.policies.seen import chosen, item, merged, seen_of

Make = Callable[..., Budgeted]
SMALL: dict[str, Make] = {
    "snapkv": lambda **given: SnapKV(**{"sink": 2, "window": 3, "pool": 3, **given}),
    "h2o": lambda **given: H2O(**{"sink": 1, **given}),
    "tova": lambda **given: TOVA(**given),
    "knorm": lambda **given: KNorm(**{"sink": 2, "window": 3, **given}),
    "ems": lambda **given: EMS(**{"sink": 2, "window": 3, "pool": 3, "similarity": 0.2, **given}),
}
every_policy = pytest.mark.parametrize("name", SMALL)
few = settings(max_examples=15, deadline=None)
ragged = st.lists(st.lists(st.integers(0, 20), min_size=2, max_size=2), min_size=1, max_size=3)


@every_policy
@few
@given(rows=ragged, budget=st.integers(5, 24), seed=st.integers(0, 99))
def test_as_many_stay_as_the_budget_allows_and_forced_rows_among_them(
    name: str, rows: list[list[int]], budget: int, seed: int
) -> None:
    policy = SMALL[name](budget=budget)
    seen = seen_of(policy, rows, seed=seed)
    kept = policy.keep(seen)
    for b, of_item in enumerate(chosen(kept, seen)):
        for g, places in enumerate(of_item):
            assert places == sorted(set(places))
            assert len(places) == min(budget, rows[b][g])
            position = seen.position[b, g].tolist()
            last = int(seen.tokens[b]) - policy.recent(budget)
            forced = [j for j, p in enumerate(position) if p >= 0 and (p < policy.sink or p >= last)]
            assert set(forced) <= set(places)
    if kept is None:
        assert max(max(row) for row in rows) <= budget


@every_policy
@few
@given(rows=ragged, seed=st.integers(0, 99))
def test_a_larger_budget_keeps_what_a_smaller_one_does(name: str, rows: list[list[int]], seed: int) -> None:
    sets = []
    for budget in range(5, 22):
        policy = SMALL[name](budget=budget)
        seen = seen_of(policy, rows, seed=seed)
        sets.append(chosen(policy.keep(seen), seen))
    for smaller, larger in pairwise(sets):
        for few_rows, more_rows in zip(smaller, larger, strict=True):
            assert all(set(a) <= set(b) for a, b in zip(few_rows, more_rows, strict=True))


@every_policy
@few
@given(rows=ragged, seed=st.integers(0, 99), junk=st.sampled_from([0.0, 1e9, float("inf")]))
def test_neither_batch_mates_nor_places_without_a_row_change_anything(
    name: str, rows: list[list[int]], seed: int, junk: float
) -> None:
    for size in ({"budget": 8}, {"share": 0.5}):
        policy = SMALL[name](**size)
        seen = seen_of(policy, rows, seed=seed)
        kept = policy.keep(seen)
        whole = chosen(kept, seen)
        other = seen_of(policy, rows, seed=seed, junk=junk, width=seen.k.shape[2] + 3)
        assert chosen(policy.keep(other), other) == whole
        for b in range(len(rows)):
            alone = item(seen, b)
            of_item = policy.keep(alone)
            assert chosen(of_item, alone) == whole[b : b + 1]
            if kept is not None and kept.into is not None and of_item is not None and of_item.into is not None:
                lost = seen.held[b] & ~is_kept(kept, seen)[b]
                assert torch.equal(kept.into[b][lost], of_item.into[0][lost])


def is_kept(kept: Keep, seen: Seen) -> torch.Tensor:
    found = torch.zeros(*seen.position.shape[:2], seen.position.shape[2] + 1, dtype=torch.bool)
    found.scatter_(2, kept.rows.masked_fill(kept.rows < 0, seen.position.shape[2]), value=True)
    return found[..., :-1]


@every_policy
def test_of_equal_rows_the_earliest_stay(name: str) -> None:
    policy = SMALL[name](budget=10)
    seen = seen_of(policy, [[16]], tokens=[16])
    seen = replace(
        seen, k=torch.ones_like(seen.k), signals={n: torch.full_like(x, 0.25) for n, x in seen.signals.items()}
    )
    recent = policy.recent(10)
    assert chosen(policy.keep(seen), seen) == [[[*range(10 - recent), *range(16 - recent, 16)]]]


@every_policy
def test_rows_that_are_no_numbers_are_lost_first_and_hurt_no_other(name: str) -> None:
    policy = SMALL[name](budget=10)
    seen = seen_of(policy, [[16]], tokens=[16])
    clean = replace(seen, signals={n: x + 0.5 for n, x in seen.signals.items()})
    k = clean.k.clone()
    k[0, 0, 5] = torch.nan
    signals = {n: x.clone() for n, x in clean.signals.items()}
    for x in signals.values():
        x[0, 0, 5] = torch.nan
    kept = policy.keep(replace(clean, k=k, signals=signals))
    assert kept is not None
    # Pooling lends a row what its neighbours have.
    pooled = isinstance(policy, SnapKV | EMS)
    assert (5 in chosen(kept, clean)[0][0]) <= pooled
    assert len(chosen(kept, clean)[0][0]) == 10
    plain = SMALL[name](budget=10, **({"pool": 1} if pooled else {}))
    poisoned = plain.keep(replace(clean, k=k, signals=signals))
    assert poisoned is not None
    assert 5 not in chosen(poisoned, clean)[0][0]
    if poisoned.into is not None:
        assert poisoned.into[0, 0, 5] == -1
        lost = ~is_kept(poisoned, clean)[0, 0]
        lost[5] = False
        expected = EMS(budget=10, sink=2, window=3, pool=1, similarity=0.2)
        k_without = clean.k[:, :, [j for j in range(16) if j != 5]]
        rows = torch.tensor([[[j - (j > 5) for j in chosen(poisoned, clean)[0][0]]]])
        into = most_similar(k_without, rows, expected.similarity)
        assert poisoned.into[0, 0][lost].tolist() == into[0, 0][torch.cat([lost[:5], lost[6:]])].tolist()


@every_policy
def test_a_share_is_counted_in_each_items_own_tokens(name: str) -> None:
    policy = SMALL[name](share=0.25)
    seen = seen_of(policy, [[40, 40], [40, 12], [40, 40]], tokens=[40, 100, 401])
    assert [[len(head) for head in of_item] for of_item in chosen(policy.keep(seen), seen)] == [
        [10, 10],
        [25, 12],
        [40, 40],
    ]
    # No fewer than are forced.
    forced = policy.sink + policy.recent(0)
    assert policy.rows_of(4) == max(forced, 1)


@every_policy
@pytest.mark.parametrize("size", [{"budget": 64}, {"share": 0.3}])
def test_settings_make_it_again(name: str, size: dict[str, Any]) -> None:
    policy = SMALL[name](**size, every=5, page=32, slack=3)
    written = json.loads(json.dumps(policy.settings()))
    again = policy_from(written)
    assert type(again) is type(policy)
    assert again.settings() == policy.settings() == written
    assert policy.of_layer(3) is policy
    assert policy.compacts
    assert not policy.reads_pages
    assert policy.retention(4) is None
    policy.check(30, 3)


BAD = {
    "budget: expected one of budget and share": {},
    "budget: expected one of": {"budget": 64, "share": 0.5},
    "budget: expected 8 rows or more, the sink and the window, got 7": {"budget": 7, "sink": 4, "window": 4},
    "budget: expected 36 rows or more": {"budget": 40.0},
    "share: expected more than 0 and at most 1, got 0": {"share": 0},
    "share: expected more than 0": {"share": float("nan")},
    "sink: expected a whole number, 0 or more, got -1": {"budget": 64, "sink": -1},
    "window: expected a whole number": {"budget": 64, "window": True},
    "every: expected a whole number, 1 or more": {"budget": 64, "every": 0},
    "page: expected a whole number, 1 or more": {"budget": 64, "page": 0},
    "slack: expected a whole number": {"budget": 64, "slack": -2},
    "group: expected 'max' or 'mean', got 'sum'": {"budget": 64, "group": "sum"},
    "pool: expected an odd number": {"budget": 64, "pool": 4},
    "window: expected 1 or more": {"budget": 64, "window": 0},
}


@pytest.mark.parametrize("message", BAD)
def test_settings_that_do_not_fit_are_named(message: str) -> None:
    for make in (SnapKV, EMS):
        with pytest.raises(ConfigError) as found:
            make(**BAD[message])
        assert str(found.value).startswith(message)


def test_what_was_said_is_told() -> None:
    assert repr(SnapKV(budget=400, every=8)) == "SnapKV(every=8, budget=400)"
    assert repr(TOVA(share=0.2)) == "TOVA(share=0.2)"


def test_other_settings_that_do_not_fit_are_named() -> None:
    with pytest.raises(ConfigError, match="local: expected 0 to 1"):
        H2O(budget=64, local=1.5)
    with pytest.raises(ConfigError, match="window: expected 1 or more"):
        TOVA(budget=64, window=0)
    with pytest.raises(ConfigError, match="budget: expected 1 rows or more"):
        H2O(budget=0)
    with pytest.raises(ConfigError, match="local"):
        policy_from({"policy": "knorm", "budget": 64, "local": 0.5})


def test_snapkv_pools_what_the_window_attends_to_before_it() -> None:
    policy = SnapKV(budget=10, sink=2, window=3, pool=5)
    seen = seen_of(policy, [[16, 11]], tokens=[16])
    mass = seen.signals["window_mass"][0]
    score = policy.score(seen)[0]
    for g, rows in enumerate((16, 11)):
        before = [j for j in range(rows) if seen.position[0, g, j] < 13]
        for j in before:
            assert score[g, j] == max(mass[g, r] for r in before if abs(r - j) <= 2)


def test_h2o_halves_its_budget() -> None:
    policy = H2O(budget=8)
    seen = seen_of(policy, [[16]], tokens=[16])
    mass = torch.zeros(1, 1, 16)
    mass[0, 0, [1, 3, 5, 7]] = 0.5
    assert chosen(policy.keep(replace(seen, signals={"mass": mass})), seen) == [[[1, 3, 5, 7, 12, 13, 14, 15]]]


def test_tova_and_knorm_have_the_scores_of_their_formulas() -> None:
    seen = seen_of(TOVA(budget=4), [[9]])
    assert torch.equal(TOVA(budget=4).score(seen), seen.signals["window_mass"])
    expected = torch.stack([-(row.double() ** 2).sum().sqrt() for row in seen.k[0, 0]])
    torch.testing.assert_close(KNorm(budget=40).score(seen)[0, 0].double(), expected, rtol=1e-6, atol=0)


def test_ems_takes_the_larger_of_both_scores_each_over_its_largest() -> None:
    policy = EMS(budget=6, sink=1, window=2, pool=1)
    seen = seen_of(policy, [[8]], tokens=[8])
    signals = {
        "mass": torch.tensor([[[0.5, 0.1, 0.1, 0.4, 0.0, 0.0, 0.0, 0.2]]]),
        "window_mass": torch.tensor([[[0.01, 0.0, 0.02, 0.0, 0.01, 0.0, 0.7, 0.9]]]),
    }
    score = policy.score(replace(seen, signals=signals))[0, 0]
    torch.testing.assert_close(score[:6], torch.tensor([1.0, 0.2, 1.0, 0.8, 0.5, 0.0]))


@few
@given(rows=ragged, seed=st.integers(0, 99))
def test_merging_everything_conserves_mass_and_means(rows: list[list[int]], seed: int) -> None:
    policy = SMALL["ems"](budget=6, similarity=-1.0)
    seen = seen_of(policy, rows, seed=seed)
    kept = policy.keep(seen)
    if kept is None:
        return
    for b in range(len(rows)):
        for g in range(2):
            held = seen.held[b, g]
            if not bool(held.any()):
                continue
            k, _, mass = merged(seen, kept, b, g)
            before = seen.bias[b, g][held].double().exp()
            torch.testing.assert_close(mass.sum(), before.sum())
            torch.testing.assert_close(mass @ k, before @ seen.k[b, g][held].double(), rtol=1e-9, atol=1e-9)


def test_rows_that_are_the_same_merge_without_loss() -> None:
    policy = EMS(budget=6, sink=2, window=2, pool=1, similarity=0.999)
    seen = seen_of(policy, [[12]], tokens=[12])
    pattern = torch.tensor([0, 1, 2, 3, 2, 3, 2, 3, 3, 2, 4, 5])
    mass = torch.zeros(1, 1, 12)
    mass[0, 0, [2, 3]] = 0.5
    seen = replace(
        seen,
        k=seen.k[:, :, pattern],
        v=seen.v[:, :, pattern],
        bias=torch.zeros_like(seen.bias),
        signals={"mass": mass, "window_mass": mass},
    )
    kept = policy.keep(seen)
    assert kept is not None
    assert chosen(kept, seen) == [[[0, 1, 2, 3, 10, 11]]]
    k, v, mass_of = merged(seen, kept, 0, 0)
    q = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    before = torch.softmax(seen.k[0, 0].double() @ q, 0) @ seen.v[0, 0].double()
    torch.testing.assert_close(torch.softmax(k @ q + mass_of.log(), 0) @ v, before, rtol=1e-9, atol=1e-9)
    assert mass_of.tolist() == [1, 1, 4, 4, 1, 1]


def test_no_key_is_as_similar_as_more_than_the_same() -> None:
    seen = seen_of(SMALL["ems"](budget=6), [[12]])
    kept = SMALL["ems"](budget=6, similarity=1.01).keep(seen)
    assert kept is not None
    assert kept.into is not None
    assert bool((kept.into == -1).all())
    assert not SMALL["ems"](budget=6, weighs=False).keep(seen).weighs  # type: ignore[union-attr]
