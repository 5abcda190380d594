"""Rings and grouped streams: a model of lists beside them, and what a crop or a failed call leaves."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from attnzoo.cache import editing
from attnzoo.cache import streams as cache_streams
from attnzoo.cache.kv_cache import KVCache, Stream

MAX, HISTORY, MARGIN, EVERY = 40, 3, 4, 4


def cache_of(batch: int = 2, max_length: int = MAX) -> KVCache:
    streams = {"k": Stream(1, 2), "tail": Stream(2, 1, ring=HISTORY), "mean": Stream(1, 2, every=EVERY)}
    return KVCache(streams, batch=batch, max_length=max_length, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _small_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (editing, cache_streams):
        monkeypatch.setattr(module, "CROP_MARGIN", MARGIN)


def numbers(batch: int, length: int, first: float) -> Tensor:
    """One number for each token, ``[B, T]``, all different."""
    return first + torch.arange(batch * length, dtype=torch.float64).view(batch, length)


def feed(cache: KVCache, number: Tensor, lengths: int | Tensor) -> None:
    """Appends tokens ``[B, T]`` and completes groups, as a layer does: a group's value is its tokens' sum."""
    token = number[:, None, :, None]
    before = cache.offset
    cache.append({"k": token.expand(-1, -1, -1, 2), "tail": token.expand(-1, 2, -1, -1)}, lengths, differentiable=False)
    padded = torch.nn.functional.pad(cache.streams["k"], (0, 0, 0, EVERY))
    groups = (EVERY - 1 + number.shape[1]) // EVERY
    first = (before if isinstance(before, Tensor) else torch.full((number.shape[0],), before)) // EVERY
    at = first[:, None] * EVERY + torch.arange(groups * EVERY)
    rows = padded.gather(2, at.clamp(max=MAX)[:, None, :, None].expand(-1, -1, -1, 2))
    cache.complete({"mean": rows.unflatten(2, (groups, EVERY)).sum(3)}, before)


class StreamsAreLists(RuleBasedStateMachine):
    """Whatever is done to a cache, rings and groups follow from the list of each item's tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        for module in (editing, cache_streams):
            self.patch.setattr(module, "CROP_MARGIN", MARGIN)
        self.cache = cache_of()
        self.items: list[list[float]] = [[], []]
        self.margins = [MARGIN, MARGIN]
        self.written = 1.0

    def teardown(self) -> None:
        self.patch.undo()

    def _new(self, length: int, padding: list[int] | None) -> tuple[Tensor, int | Tensor, list[int]]:
        batch = len(self.items)
        number = numbers(batch, length, self.written)
        self.written += batch * length
        real = [length if padding is None else min(length, padding[i % 4]) for i in range(batch)]
        # What lies behind an item's tokens must go nowhere.
        number = torch.where(torch.arange(length) < torch.tensor(real)[:, None], number, torch.nan)
        return number, length if padding is None else torch.tensor(real), real

    @rule(length=st.integers(0, 9), padding=st.none() | st.lists(st.integers(0, 9), min_size=4, max_size=4))
    def append(self, length: int, padding: list[int] | None) -> None:
        number, lengths, real = self._new(length, padding)
        if any(len(item) + new > MAX for item, new in zip(self.items, real, strict=True)):
            return
        feed(self.cache, number, lengths)
        for i, item in enumerate(self.items):
            item += number[i, : real[i]].tolist()
            self.margins[i] = min(self.margins[i] + real[i], MARGIN)

    @rule(length=st.integers(0, 9), padding=st.none() | st.lists(st.integers(0, 9), min_size=4, max_size=4))
    def fail(self, length: int, padding: list[int] | None) -> None:
        number, lengths, real = self._new(length, padding)
        if any(len(item) + new > MAX for item, new in zip(self.items, real, strict=True)):
            return
        with pytest.raises(KeyError), self.cache.all_or_nothing():
            feed(self.cache, number, lengths)
            raise KeyError
        # What the call wrote in place shortens the margin.
        self.margins = [max(0, margin - MARGIN) for margin in self.margins]

    @rule(length=st.integers(0, MAX))
    def crop(self, length: int) -> None:
        try:
            self.cache.crop(length)
        except ValueError as error:
            assert "length: expected at most 4 tokens to be cropped" in str(error)
            # A refusal is only right where some item would be left without its history.
            assert any(
                0 < length < len(item) and len(item) - length > margin
                for item, margin in zip(self.items, self.margins, strict=True)
            )
            return
        for i, item in enumerate(self.items):
            self.margins[i] = max(0, self.margins[i] - max(0, len(item) - length))
            del item[length:]
            if not item:
                self.margins[i] = MARGIN

    @rule(index=st.lists(st.integers(0, 3), min_size=1, max_size=4))
    def reorder(self, index: list[int]) -> None:
        index = [i % len(self.items) for i in index]
        self.cache.reorder(torch.tensor(index))
        self.items = [list(self.items[i]) for i in index]
        self.margins = [self.margins[i] for i in index]

    @precondition(lambda self: any(self.items))
    @rule(pickled=st.booleans())
    def fork_and_spoil_the_original(self, pickled: bool) -> None:
        spoiled = self.cache
        self.cache = pickle.loads(pickle.dumps(spoiled)) if pickled else copy.deepcopy(spoiled)
        spoiled.crop(0)
        feed(spoiled, numbers(len(self.items), 9, -99.0), 9)

    @invariant()
    def last_values_and_groups_are_held(self) -> None:
        for count in (0, 1, HISTORY):
            tail = self.cache.history("tail", count)
            assert tail.shape == (len(self.items), 2, count, 1)
            for i, item in enumerate(self.items):
                last = ([0.0] * count + item)[len(item) :]
                assert tail[i, 0, :, 0].tolist() == tail[i, 1, :, 0].tolist() == last
        groups = self.cache.groups("mean")
        for i, item in enumerate(self.items):
            sums = [sum(item[g : g + EVERY]) for g in range(0, len(item) - EVERY + 1, EVERY)]
            held = groups[i, 0, :, 0].tolist()
            assert held == pytest.approx(sums + [0.0] * (len(held) - len(sums)))


TestStreamsAreLists = StreamsAreLists.TestCase
TestStreamsAreLists.settings = settings(max_examples=60, stateful_step_count=15, deadline=None)


@pytest.mark.parametrize("lengths", [30, torch.tensor([30, 30])], ids=["common", "ragged"])
def test_what_the_margin_allows_can_be_cropped_and_no_more(lengths: int | Tensor) -> None:
    cache = cache_of()
    feed(cache, numbers(2, 30, 1.0), lengths)
    before = cache.history("tail", HISTORY)
    with pytest.raises(ValueError, match=r"length: expected at most 4 tokens to be cropped.*tail.*got 25 of 30"):
        cache.crop(25)
    assert cache.lengths.tolist() == [30, 30]
    assert torch.equal(cache.history("tail", HISTORY), before)
    assert cache.groups("mean").shape[2] == 7
    cache.crop(26)
    assert cache.history("tail", HISTORY)[0, 0, :, 0].tolist() == [24.0, 25.0, 26.0]
    with pytest.raises(ValueError, match="length"):
        cache.crop(25)
    cache.crop(0)
    feed(cache, numbers(2, 2, 7.0), 2)
    assert cache.history("tail", HISTORY)[0, 0, :, 0].tolist() == [0.0, 7.0, 8.0]


def test_a_ring_of_a_short_cache_forgets_nothing() -> None:
    cache = cache_of(max_length=HISTORY + MARGIN)
    feed(cache, numbers(2, 7, 1.0), 7)
    cache.crop(1)
    assert cache.history("tail", HISTORY)[0, 0, :, 0].tolist() == [0.0, 0.0, 1.0]


def test_a_long_call_that_fails_leaves_history_and_margin() -> None:
    cache = cache_of()
    feed(cache, numbers(2, 20, 1.0), 20)
    with pytest.raises(KeyError), cache.all_or_nothing():
        feed(cache, numbers(2, 20, 100.0), 20)
        raise KeyError
    cache.crop(16)
    assert cache.history("tail", HISTORY)[0, 0, :, 0].tolist() == [14.0, 15.0, 16.0]


def test_history_is_a_detached_copy() -> None:
    cache = cache_of()
    token = torch.ones(2, 1, 3, 2, dtype=torch.float64, requires_grad=True)
    cache.append({"k": token, "tail": token[..., :1].expand(-1, 2, -1, -1)}, 3, differentiable=True)
    history = cache.history("tail", 2)
    assert not history.requires_grad
    feed(cache, numbers(2, 30, 9.0), 30)
    assert (history == 1).all()


def test_streams_made_in_inference_mode_are_no_inference_tensors() -> None:
    with torch.inference_mode():
        cache = cache_of()
        feed(cache, numbers(2, 30, 1.0), 30)
        cache.reorder(torch.tensor([1, 0]))
    assert not any(stream.is_inference() for stream in cache.streams.values())
    feed(cache, numbers(2, 3, 1.0), 3)


def test_bytes_count_a_group_once_and_a_ring_not_for_each_token() -> None:
    cache = cache_of()
    assert cache.bytes_per_token == 2 * 8 + 2 * 8 // EVERY
    assert cache.nbytes == 2 * 8 * (2 * MAX + 2 * (HISTORY + MARGIN) + 2 * MAX // EVERY)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda c: c.history("k", 1), "name: expected a ring"),
        (lambda c: c.history("tail", HISTORY + 1), "count: expected 0 to 3"),
        (lambda c: c.groups("tail"), "name: expected a grouped stream"),
        (lambda c: c.complete({}, 0), "values: expected streams"),
        (lambda c: c.complete({"mean": torch.zeros(2, 1, 1, 3)}, 0), "mean"),
        (lambda c: c.complete({"mean": torch.zeros(2, 1, 1, 2)}, 0), "expected 2 groups of mean, got 1"),
        (lambda c: c.append({"k": torch.zeros(2, 1, 1, 2)}, 1, differentiable=False), "values: expected streams"),
        (
            lambda c: c.append(
                {"k": torch.zeros(2, 1, 1, 2), "tail": torch.zeros(2, 2, 2, 1)}, 1, differentiable=False
            ),
            "equally many tokens",
        ),
    ],
)
def test_misuse_is_refused_by_name(call: Any, match: str) -> None:
    cache = cache_of()
    feed(cache, numbers(2, 8, 1.0), 8)
    with pytest.raises(ValueError, match=match):
        call(cache)
    assert cache.lengths.tolist() == [8, 8]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"ring": 0}, "ring: expected an int >= 1"),
        ({"ring": 2.0}, "ring: expected an int >= 1"),
        ({"every": 0}, "every: expected an int >= 1"),
        ({"every": True}, "every: expected an int >= 1"),
        ({"ring": 2, "every": 2}, "ring: expected None beside every 2"),
    ],
)
def test_streams_of_no_kind_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Stream(1, 1, **options)


def test_a_cache_without_a_value_for_each_token_is_refused() -> None:
    with pytest.raises(ValueError, match="streams: expected one with a value for each token, got tail"):
        KVCache({"tail": Stream(1, 1, ring=2)}, batch=1, max_length=4)
