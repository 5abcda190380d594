"""The cache by itself: a model of lists beside it, and what its buffers promise."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

import attnzoo
from attnzoo.cache.kv_cache import KVCache, Stream

MAX = 12


def cache_of(batch: int = 2) -> KVCache:
    return KVCache({"k": Stream(2, 3), "v": Stream(1, 2)}, batch=batch, max_length=MAX, dtype=torch.float64)


def values_of(batch: int, length: int, first: float) -> dict[str, Tensor]:
    """Values that are all different: which token they are of can be read off."""
    number = first + torch.arange(batch * length, dtype=torch.float64).view(batch, 1, length, 1)
    return {
        "k": number + torch.arange(6, dtype=torch.float64).view(1, 2, 1, 3) / 8,
        "v": -number - torch.arange(2, dtype=torch.float64).view(1, 1, 1, 2) / 8,
    }


class CacheIsLists(RuleBasedStateMachine):
    """Whatever is done to a cache, each item holds the tokens that a list of them would."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = cache_of()
        self.items: list[list[Tensor]] = [[], []]
        self.written = 1.0
        self.room = MAX

    @rule(length=st.integers(0, 4), padding=st.none() | st.lists(st.integers(0, 4), min_size=4, max_size=4))
    def append(self, length: int, padding: list[int] | None) -> None:
        batch = len(self.items)
        values = values_of(batch, length, self.written)
        self.written += batch * length
        real = [length if padding is None else min(length, padding[i % 4]) for i in range(batch)]
        lengths = length if padding is None else torch.tensor(real)
        fits = all(len(item) + new <= self.room for item, new in zip(self.items, real, strict=True))
        if not fits:
            with pytest.raises(ValueError, match=f"cache: expected at most max_length {self.room} tokens"):
                self.cache.append(values, lengths, differentiable=False)
            return
        seen = self.cache.append(values, lengths, differentiable=bool(length % 2))
        for i, item in enumerate(self.items):
            item += [torch.cat([v[i, :, t].flatten() for v in values.values()]) for t in range(real[i])]
            for t, token in enumerate(item):
                assert torch.equal(torch.cat([v[i, :, t].flatten() for v in seen.values()]), token)

    @rule(length=st.integers(0, MAX))
    def crop(self, length: int) -> None:
        self.cache.crop(length)
        self.items = [item[:length] for item in self.items]

    @rule(lengths=st.lists(st.integers(0, MAX), min_size=4, max_size=4))
    def crop_each(self, lengths: list[int]) -> None:
        lengths = lengths[: len(self.items)]
        self.cache.crop(torch.tensor(lengths))
        self.items = [item[:length] for item, length in zip(self.items, lengths, strict=True)]

    @rule(more=st.integers(0, 3))
    def grow(self, more: int) -> None:
        self.room += more
        self.cache.grow(self.room)

    @rule(index=st.lists(st.integers(0, 3), min_size=1, max_size=4))
    def reorder(self, index: list[int]) -> None:
        index = [i % len(self.items) for i in index]
        self.cache.reorder(torch.tensor(index))
        self.items = [list(self.items[i]) for i in index]

    @precondition(lambda self: any(self.items))
    @rule()
    def fork_and_spoil_the_original(self) -> None:
        spoiled, self.cache = self.cache, self.cache.fork()
        spoiled.crop(0)
        spoiled.append(values_of(len(self.items), 3, -99.0), 3, differentiable=False)

    @invariant()
    def items_are_held(self) -> None:
        assert self.cache.batch == len(self.items)
        assert self.cache.lengths.tolist() == [len(item) for item in self.items]
        assert self.cache.bound >= max(map(len, self.items))
        for i, item in enumerate(self.items):
            for t, token in enumerate(item):
                held = torch.cat([v[i, :, t].flatten() for v in self.cache.streams.values()])
                assert torch.equal(held, token)


TestCacheIsLists = CacheIsLists.TestCase
TestCacheIsLists.settings = settings(max_examples=40, stateful_step_count=15, deadline=None)


def test_buffers_start_as_zeros_and_are_no_inference_tensors() -> None:
    with torch.inference_mode():
        cache = cache_of()
    for stream in cache.streams.values():
        assert not stream.is_inference()
        assert (stream == 0).all()


def test_bytes_are_those_of_the_streams() -> None:
    assert cache_of().bytes_per_token == (2 * 3 + 1 * 2) * 8


def test_a_deep_copy_is_a_fork() -> None:
    cache = cache_of()
    cache.append(values_of(2, 3, 1.0), 3, differentiable=False)
    twin = copy.deepcopy(cache)
    cache.crop(0)
    assert twin.lengths.tolist() == [3, 3]
    assert torch.equal(twin.streams["k"][:, :, :3], values_of(2, 3, 1.0)["k"])


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"k": torch.zeros(2, 2, 1, 3)}, "streams"),
        ({"k": torch.zeros(2, 2, 1, 4), "v": torch.zeros(2, 1, 1, 2)}, "k"),
        ({"k": torch.zeros(3, 2, 1, 3), "v": torch.zeros(3, 1, 1, 2)}, "k"),
        ({"k": torch.zeros(2, 2, 1, 3), "v": torch.zeros(2, 1, 1, 2, dtype=torch.complex64)}, "v"),
    ],
)
def test_values_that_do_not_fit_are_refused(values: dict[str, Tensor], match: str) -> None:
    cache = cache_of()
    with pytest.raises(ValueError, match=rf"expected.*{match}"):
        cache.append(values, 1, differentiable=False)
    assert cache.lengths.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda c: c.crop(-1), ValueError, "length"),
        (lambda c: c.crop(1.0), TypeError, "length"),
        (lambda c: c.crop(True), TypeError, "length"),
        (lambda c: c.reorder(torch.tensor([0.5])), ValueError, "index"),
        (lambda c: c.reorder([0, 1]), (TypeError, ValueError), "index"),
        (lambda c: c.reorder(torch.tensor([[0]])), ValueError, "index"),
        (lambda c: c.reorder(torch.tensor([2])), ValueError, "index"),
        (lambda c: c.reorder(torch.tensor([-1])), ValueError, "index"),
    ],
)
def test_misuse_is_refused_by_name(call: Any, error: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        call(cache_of())


@pytest.mark.parametrize(
    ("batch", "max_length", "error", "match"),
    [
        (-1, 4, ValueError, "batch"),
        (1, 0, ValueError, "max_length"),
        (1, 2.0, TypeError, "max_length"),
        (True, 4, TypeError, "batch"),
    ],
)
def test_a_cache_of_no_size_is_refused(batch: Any, max_length: Any, error: Any, match: str) -> None:
    layer = attnzoo.create("mha", dim=8, num_heads=2)
    with pytest.raises(error, match=f"{match}: expected"):
        layer.new_cache(batch, max_length)


def test_a_cache_follows_the_layer() -> None:
    layer = attnzoo.create("mha", dim=8, num_heads=4, num_kv_heads=2).to(torch.bfloat16)
    streams = layer.new_cache(3, 5).streams
    assert set(streams) == {"k", "v"}
    for stream in streams.values():
        assert stream.shape == (3, 2, 5, 2)
        assert stream.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["mha", "s2"])
def test_what_was_cropped_away_is_not_read_where_lengths_differ(name: str) -> None:
    layer = attnzoo.create(attnzoo.get_config(name).small())
    x = torch.randn(2, 6, layer.config.dim)
    x[0, 5] = torch.nan
    cache = layer.new_cache(batch=2, max_length=20)
    layer(x, cache=cache)
    cache.crop(3)
    more = torch.randn(2, 6, layer.config.dim)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[0, 1:] = True
    out = layer.attend(more, cache=cache, key_padding=padding).out
    assert out.isfinite().all()


def test_what_was_cropped_away_is_handed_on_as_zeros() -> None:
    cache = cache_of()
    cache.append(values_of(2, 5, 1.0), 5, differentiable=False)
    cache.crop(2)
    seen = cache.append(values_of(2, 3, 2.0), torch.tensor([1, 3]), differentiable=False)
    for values in seen.values():
        assert not values[0, :, 3:].any()
        assert values[1].all()


def test_bad_lengths_for_each_item_and_less_room_are_refused() -> None:
    cache = cache_of()
    cache.append(values_of(2, 3, 1.0), 3, differentiable=False)
    for bad in (torch.tensor([1]), torch.tensor([1, -1]), torch.tensor([1.0, 2.0])):
        with pytest.raises(attnzoo.ShapeError, match=r"^length: "):
            cache.crop(bad)
    with pytest.raises(attnzoo.ShapeError, match=r"^max_length: "):
        cache.grow(MAX - 1)
    assert cache.lengths.tolist() == [3, 3]


@pytest.mark.parametrize("ragged", [False, True], ids=["even", "ragged"])
def test_rings_and_groups_grow_with_the_cache(ragged: bool) -> None:
    def filled(max_length: int, growth: int | None) -> KVCache:
        streams = {"k": Stream(1, 2), "last": Stream(1, 2, ring=3), "group": Stream(1, 2, every=4)}
        cache = KVCache(streams, batch=2, max_length=max_length)
        generator = torch.Generator().manual_seed(0)
        for step, tokens in enumerate((5, 2, 9)):
            if step == 1 and growth is not None:
                cache.grow(growth)
            value = torch.randn(2, 1, tokens, 2, generator=generator)
            before = cache.offset
            lengths = torch.tensor([tokens, tokens - 1]) if ragged else tokens
            cache.append({"k": value, "last": value}, lengths, differentiable=False)
            cache.complete({"group": torch.randn(2, 1, 3, 2, generator=generator)}, before)
        return cache

    grown, roomy = filled(7, 20), filled(20, None)
    cropped = torch.tensor([12, 9])
    for crop in (None, cropped):
        for cache in (grown, roomy):
            if crop is not None:
                cache.crop(crop)
        assert torch.equal(grown.lengths, roomy.lengths)
        assert torch.equal(grown.history("last", 3), roomy.history("last", 3))
        assert torch.equal(grown.groups("group"), roomy.groups("group"))
        assert all(torch.equal(grown.streams[name], roomy.streams[name]) for name in ("k", "group"))
