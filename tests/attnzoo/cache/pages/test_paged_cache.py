"""A cache of pages between calls: tokens taken back, calls that fail, chosen items, copies, states, memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from attnzoo.cache.kv_cache import Stream
from attnzoo.cache.pages.apply import apply
from attnzoo.cache.pages.cache import PagedCache
from attnzoo.cache.pages.rows import gathered
from attnzoo.cache.policies.ems import EMS
from attnzoo.cache.policies.protocol import DROPPED, MERGED, Keep
from attnzoo.cache.policies.reading import Pages
from attnzoo.cache.policies.scored import H2O, KNorm, SnapKV
from attnzoo.cache.retention import Retention
from attnzoo_kernels.errors import ConfigError, ShapeError, UnsupportedError
from tests.attnzoo.base.paged.paged_calls import (
    GROUPS,
    WIDTH,
    Everything,
    Placed,
    call,
    check_pages,
    empty_cache,
    run,
    sequences,
)

SNAPKV = SnapKV(budget=9, sink=1, window=2, pool=1, page=4, every=6, slack=5)
POLICIES = [
    Everything(),
    Placed(slack=6),
    Placed(full=(False, False), fold=True, slack=5),
    SNAPKV,
    EMS(budget=7, sink=1, window=2, pool=1, page=4, similarity=0.1),
    Pages(page=4, budget=12, reuse=2),
]
BEFORE = [[17, 9], [1, 1], [1, 1], [3, 2], [1, 1]]
BEHIND = [[1, 1], [1, 1], [2, 5], [1, 1]]


def part(tensors: Sequence[Tensor], calls: Sequence[Sequence[int]], done: Sequence[Sequence[int]]) -> list[Tensor]:
    """What comes behind some calls, as sequences of their own."""
    first = [sum(column) for column in zip(*done, strict=True)]
    most = max(sum(column) for column in zip(*calls, strict=True))
    return [torch.stack([x[item, :, n : n + most] for item, n in enumerate(first)]) for x in tensors]


def equal_rows(cache: PagedCache, other: PagedCache) -> None:
    rows, counts = gathered(cache.pool)
    expected, number = gathered(other.pool)
    assert counts.tolist() == number.tolist()
    for name, x in rows.items():
        torch.testing.assert_close(x, expected[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda x: type(x).__name__)
def test_copies_states_and_chosen_items_go_on_as_the_first_does(policy) -> None:
    tensors = sequences(2, 50, 1)
    cache = empty_cache(policy, 2)
    run(cache, tensors, BEFORE)
    rest = part(tensors, BEHIND, BEFORE)
    fork = cache.fork()
    loaded = empty_cache(policy, 2, max_length=2000)
    state = cache.state_dict()
    assert all(x.is_contiguous() for x in state.values() if isinstance(x, Tensor))
    loaded.load_state_dict(state)
    swapped = cache.fork()
    swapped.reorder(torch.tensor([1, 0, 1]))
    # Lists of pages that a row may read again are no part of a state, nor of chosen items.
    cache.choice = None
    fork.choice = None
    expected = run(cache, rest, BEHIND)
    torch.testing.assert_close(run(fork, rest, BEHIND), expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(run(loaded, rest, BEHIND), expected, rtol=0, atol=1e-12, equal_nan=True)
    turned = [x[[1, 0, 1]] for x in rest]
    calls = [[b, a, b] for a, b in BEHIND]
    torch.testing.assert_close(run(swapped, turned, calls), expected[[1, 0, 1]], rtol=0, atol=1e-12, equal_nan=True)
    assert swapped.lengths.tolist() == cache.lengths[[1, 0, 1]].tolist()


@pytest.mark.parametrize("back", [1, 2, 5])
@pytest.mark.parametrize("policy", [Everything(), Placed(slack=6), Placed(fold=True, slack=6), SNAPKV], ids=str)
def test_what_is_left_is_as_if_the_others_had_never_come(policy, back: int) -> None:
    tensors = sequences(2, 60, 2)
    for calls in ([[14, 14]] + [[1, 1]] * 9, [[14, 14]] + [[1, 1]] * 5, [[14, 9]] + [[1, 1]] * 7):
        cache = empty_cache(policy, 2)
        run(cache, tensors, calls)
        other = empty_cache(policy, 2)
        run(other, tensors, calls[:-back])
        cache.crop(cache.lengths - back)
        check_pages(cache)
        assert cache.lengths.tolist() == other.lengths.tolist()
        rest = part(tensors, BEHIND, calls[:-back])
        out = run(cache, rest, BEHIND)
        torch.testing.assert_close(out, run(other, rest, BEHIND), rtol=0, atol=1e-12, equal_nan=True)


def test_too_many_tokens_are_not_taken_back() -> None:
    tensors = sequences(1, 40, 3)
    for policy in (Placed(), SnapKV(budget=9, sink=1, window=2, page=4), H2O(budget=8, sink=1, page=4)):
        cache = empty_cache(policy, 1)
        run(cache, tensors, [[21], [1], [1]])
        before = {name: x.clone() for name, x in gathered(cache.pool)[0].items()}
        with pytest.raises(UnsupportedError, match="crop"):
            cache.crop(15)
        assert cache.length == 23
        torch.testing.assert_close(gathered(cache.pool)[0], before, equal_nan=True)
        cache.crop(0)
        assert cache.length == 0
        assert cache.held_rows == 0


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda x: type(x).__name__)
def test_a_call_that_fails_leaves_everything_as_it_was(policy, tokens: int) -> None:
    tensors = sequences(2, 60, 4)
    cache = empty_cache(policy, 2)
    other = empty_cache(policy, 2)
    run(cache, tensors, BEFORE)
    run(other, tensors, BEFORE)
    rest = part(tensors, BEHIND, BEFORE)

    def fail() -> None:
        with cache.all_or_nothing():
            own = {"k": rest[1][:, :, :tokens] * 100, "v": rest[2][:, :, :tokens]}
            cache.stage(own, tokens)
            if tokens == 1:
                # A row is written before it is read.
                cache.write_ahead()
            raise RuntimeError

    for _ in range(2):
        with pytest.raises(RuntimeError):
            fail()
    check_pages(cache)
    assert cache.lengths.tolist() == other.lengths.tolist()
    equal_rows(cache, other)
    assert cache.pool.counts().tolist() == other.pool.counts().tolist()
    torch.testing.assert_close(run(cache, rest, BEHIND), run(other, rest, BEHIND), rtol=0, atol=0, equal_nan=True)


def test_memory_is_given_back_behind_a_prompt() -> None:
    tensors = sequences(1, 300, 5)
    cache = empty_cache(SnapKV(budget=20, window=4, page=4), 1)
    run(cache, tensors, [[256]])
    before = cache.nbytes
    run(cache, part(tensors, [[1]], [[256]]), [[1]])
    assert cache.held_rows == GROUPS * 21
    assert cache.pool.nbytes < before / 4


@pytest.mark.parametrize("budget", [410, 102])
def test_buffers_have_little_room_behind_a_prompt(budget: int) -> None:
    """An eighth of what is held or 16 rows a head; and few queries beside those that are asked for."""
    tensors = sequences(1, 1025, 5)
    cache = empty_cache(KNorm(budget=budget), 1, max_length=2000)
    run(cache, tensors, [[1024], [1]])
    assert cache.held_rows == GROUPS * (budget + 1)
    assert cache.nbytes < cache.held_bytes * 9 / 8 + GROUPS * 32 * cache.pool.held_bytes / cache.held_rows
    asked = empty_cache(SnapKV(budget=budget, window=32), 1, max_length=2000)
    run(asked, tensors, [[1024], [1]])
    assert asked.last_queries is not None
    assert asked.last_queries.values.shape[2] <= 32 + 17


def test_trimming_gives_back_what_is_free() -> None:
    tensors = sequences(1, 300, 6)
    cache = empty_cache(Everything(), 1)
    run(cache, tensors, [[256]])
    cache.crop(20)
    before = cache.nbytes
    cache.trim()
    check_pages(cache)
    assert cache.nbytes < before / 4
    assert 4 * len(cache.pool.free) <= cache.pool.tensors["k"].shape[0]


def held(rows: int, seed: int = 7) -> PagedCache:
    cache = empty_cache(Everything(), 1)
    run(cache, sequences(1, rows, seed), [[rows]])
    return cache


def test_merging_keeps_the_mass_and_the_mean() -> None:
    pool = held(10).pool
    before, _ = gathered(pool)
    before = {name: x.clone() for name, x in before.items()}
    rows = torch.tensor([0, 4, 9]).expand(1, GROUPS, -1)
    into = torch.tensor([0, 0, 1, MERGED, 0, DROPPED, 1, 2, MERGED, 0]).expand(1, GROUPS, -1)
    made, lost = apply(pool, Keep(rows, into))
    after, counts = gathered(made)
    assert counts.tolist() == [[3] * GROUPS]
    mass = after["bias"].exp()
    torch.testing.assert_close(mass[0, 0], mass.new_tensor([2, 3, 2]))
    torch.testing.assert_close(lost.mass, lost.mass.new_full((1, GROUPS), 2))
    torch.testing.assert_close(lost.k, before["k"][:, :, [3, 8]].sum(2))
    torch.testing.assert_close(after["k"][:, :, 1], before["k"][:, :, [2, 4, 6]].mean(2))
    torch.testing.assert_close(after["v"][:, :, 2], before["v"][:, :, [7, 9]].mean(2))
    assert after["position"][0, 0].tolist() == [0, 4, 9]
    # A second time, by mass.
    again, _ = apply(made, Keep(rows[:, :, :1] * 0, torch.zeros(1, GROUPS, 3, dtype=torch.int64)))
    whole, _ = gathered(again)
    torch.testing.assert_close(whole["k"][:, :, 0], before["k"][:, :, [0, 1, 2, 4, 6, 7, 9]].mean(2))
    assert float(whole["bias"][0, 0, 0]) == pytest.approx(math.log(7))


def test_a_merged_row_that_does_not_weigh_counts_once() -> None:
    pool = held(4).pool
    rows = torch.tensor([1]).expand(1, GROUPS, -1)
    made, _ = apply(pool, Keep(rows, torch.zeros(1, GROUPS, 4, dtype=torch.int64), weighs=False))
    assert not gathered(made)[0]["bias"].any()
    assert not made.weighed


def test_rows_that_are_the_same_are_merged_without_loss() -> None:
    q, k, v = sequences(1, 9, 8)
    k[:, :, 1:5] = k[:, :, :1]
    v[:, :, 1:5] = v[:, :, :1]
    cache = empty_cache(Everything(), 1)
    expected = run(empty_cache(Everything(), 1), (q, k, v), [[8], [1]])
    run(cache, (q, k, v), [[8]])
    into = torch.zeros(1, GROUPS, 8, dtype=torch.int64)
    pool, _ = apply(cache.pool, Keep(torch.tensor([0, 5, 6, 7]).expand(1, GROUPS, -1), into))
    cache.take_over(pool, cache.progress, None)
    out = call(cache, [x[:, :, 8:9] for x in (q, k, v)], 1)
    torch.testing.assert_close(out, expected[:, :, 8:9], rtol=0, atol=1e-12)


def test_heads_that_stay_whole_keep_all_their_rows() -> None:
    pool = held(10).pool
    keep = Keep(torch.tensor([2, 3]).expand(1, GROUPS, -1))
    made, _ = apply(pool, keep, torch.tensor([[True, False]]))
    rows, counts = gathered(made)
    assert counts.tolist() == [[10, 2]]
    assert rows["position"][0, 0].tolist() == list(range(10))
    assert len(made.extents) == 2


def test_what_does_not_fit_is_named() -> None:
    class Windowed(Placed):
        def retention(self, kv_heads: int) -> Retention:
            return Retention(2, 3, (False,) * kv_heads)

    with pytest.raises(ConfigError, match="page: expected 2"):
        empty_cache(Windowed(), 1)
    with pytest.raises(ConfigError, match="streams: expected k and v"):
        PagedCache({"k": Stream(1, 2)}, policy=Everything(), batch=1, max_length=9)
    cache = empty_cache(Everything(), 1)
    with pytest.raises(ShapeError, match=r"expected v \[1, 2, 3, 6\]"):
        cache.stage({"k": torch.zeros(1, GROUPS, 3, WIDTH), "v": torch.zeros(1, GROUPS, 3, WIDTH)}, 3)
    with pytest.raises(UnsupportedError, match="append"):
        cache.append({}, 1, differentiable=False)
    other = empty_cache(SNAPKV, 1)
    with pytest.raises(ConfigError, match="policy: expected the state"):
        other.load_state_dict(cache.state_dict())


def test_a_wider_dtype_is_taken_up() -> None:
    tensors = sequences(1, 20, 9)
    cache = empty_cache(Placed(), 1, dtype=torch.float32)
    run(cache, [x.float() for x in tensors], [[9], [1]])
    assert cache.pool.tensors["k"].dtype == torch.float32
    run(cache, part(tensors, [[1], [3]], [[10]]), [[1], [3]])
    assert cache.pool.tensors["k"].dtype == torch.float64
