"""Windows whose caches evict: they answer as those that keep everything, and hold a window and a sink."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import attnzoo
from attnzoo.cache.evicting.cache import EvictingCache
from tests.attnzoo.cases import assert_same, build, gradients, tokens
from tests.attnzoo.laws.test_contract_memory import left_padded


def layer_of(dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    heads = options.pop("num_heads", 4)
    return build(attnzoo.get_config("mha")(dim=8 * heads, num_heads=heads, **options), dtype=dtype)


def answers(layer: Any, x: Tensor, ends: list[int], cache: Any, padding: Tensor | None = None) -> Tensor:
    """The outputs of calls that end at the given tokens, put together."""
    return torch.cat(
        [
            layer.attend(x[:, a:b], cache=cache, key_padding=None if padding is None else padding[:, a:b]).out
            for a, b in pairwise([0, *ends])
        ],
        1,
    )


@settings(max_examples=60, deadline=None)
@given(
    groups=st.sampled_from([1, 2, 4]),
    window=st.none() | st.integers(1, 45),
    sink=st.integers(0, 9),
    block=st.integers(1, 16),
    ends=st.sets(st.integers(1, 39), max_size=6),
    seed=st.none() | st.integers(0, 99),
)
def test_any_window_split_and_padding_is_the_keeping_cache(
    groups: int, window: int | None, sink: int, block: int, ends: set[int], seed: int | None
) -> None:
    layer = layer_of(num_kv_heads=groups, window=window, sink=sink if window else 0, block_size=block)
    x = tokens(layer, 3, 40)
    padding = None
    if seed is not None:
        padding = torch.rand(3, 40, generator=torch.Generator().manual_seed(seed)) < 0.4
        padding[2, 1:] = True
        x = torch.where(padding.unsqueeze(-1), math.nan, x)
    keeping, evicting = layer.new_cache(3, 40), layer.new_cache(3, 40, evict=True)
    with torch.no_grad():
        expected = answers(layer, x, [*sorted(ends), 40], keeping, padding)
        assert_same(answers(layer, x, [*sorted(ends), 40], evicting, padding), expected)
    assert evicting.lengths.tolist() == keeping.lengths.tolist()
    assert evicting.length == keeping.length


@pytest.mark.parametrize(
    "options",
    [
        {"window": 9},
        {"window": 9, "sink": 3, "num_kv_heads": 2},
        {"window": 1, "sink": 1},
        {"window": 1},
        {"window": 60, "sink": 70},
        {},
    ],
    ids=str,
)
def test_tokens_one_by_one_are_one_call_and_read_in_place(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = layer_of(**options)
    x = tokens(layer, 2, 60)
    taken = []
    original = EvictingCache.attend_row
    monkeypatch.setattr(EvictingCache, "attend_row", lambda *args: (taken.append(1), original(*args))[1])
    with torch.no_grad():
        cache = layer.new_cache(2, 60, evict=True)
        assert_same(answers(layer, x, list(range(1, 61)), cache), layer(x))
        assert len(taken) >= 59
        # What a layer's steps run is read in place too, but for an implementation by name.
        cache = layer.new_cache(2, 60, evict=True)
        layer.attend(x[:, :30], cache=cache)
        taken.clear()
        with attnzoo.record(layer):
            said = layer(x[:, 30:31], cache=cache)
        assert taken == [1]
        layer.impl = "reference"
        assert_same(torch.cat((said, layer(x[:, 31:32], cache=cache)), 1), layer(x)[:, 30:32])
        assert taken == [1]


@pytest.mark.parametrize("options", [{"window": 9, "sink": 3}, {"window": 9}, {"window": 4, "sink": 1}], ids=str)
def test_nobody_reads_what_was_evicted(options: dict[str, Any]) -> None:
    """NaN in every row of the buffers that the next token does not read changes nothing."""
    layer = layer_of(num_kv_heads=2, **options)
    x = tokens(layer, 1, 60)
    cache = layer.new_cache(1, 60, evict=True)
    with torch.no_grad():
        expected = layer(x)
        for token in range(60):
            (region,) = cache.regions
            (run,) = region.runs(token)
            for buffer in cache._buffers.values():
                free = torch.ones(buffer.shape[2], dtype=torch.bool)
                free[run.rows[0] : run.rows[1]] = False
                free[run.own] = True
                buffer[:, :, free] = math.nan
            assert_same(layer(x[:, token : token + 1], cache=cache), expected[:, token : token + 1])


def test_bytes_are_those_of_a_window_and_a_sink_however_long() -> None:
    layer = layer_of(torch.float32, window=16, sink=3, num_kv_heads=2)
    caches = [layer.new_cache(2, length, evict=True) for length in (100, 100_000)]
    for cache in caches:
        assert cache.nbytes == 2 * 2 * 2 * (16 + 3) * 8 * 4
    held = []
    with torch.no_grad():
        for chunk in tokens(layer, 2, 200).split([40, 1, 1, 90, 1, 67], 1):
            layer(chunk, cache=caches[1])
            storage = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in cache._buffers.values()}
            held.append((caches[1].nbytes, sum(storage.values())))
    assert len(set(held)) == 1
    assert (
        layer_of(torch.float32).new_cache(1, 50, evict=True).nbytes == layer_of(torch.float32).new_cache(1, 50).nbytes
    )


def test_room_grows_and_items_are_reordered_and_forked() -> None:
    layer = layer_of(window=9, sink=3, num_kv_heads=2)
    rows = [tokens(layer, 1, length, seed=length) for length in (40, 7, 23)]
    x, key_padding = left_padded(rows, 40)
    new = tokens(layer, 4, 9, seed=5)
    chosen = [2, 0, 0, 1]
    cache = layer.new_cache(3, 40, evict=True)
    with torch.no_grad():
        layer.attend(x, key_padding=key_padding, cache=cache)
        cache.grow(64)
        branch = cache.fork()
        layer(tokens(layer, 3, 12, seed=9), cache=branch)
        cache.reorder(torch.tensor(chosen))
        out = answers(layer, new, [5, 6, 7, 9], cache)
        for item, source in enumerate(chosen):
            alone = layer(torch.cat([rows[source], new[item : item + 1]], 1))
            assert_same(out[item : item + 1], alone[:, rows[source].shape[1] :])


def test_a_window_that_had_no_room_grows_into_it() -> None:
    layer = layer_of(window=9, sink=3)
    x = tokens(layer, 1, 30)
    cache = layer.new_cache(1, 4, evict=True)
    with torch.no_grad():
        first = layer(x[:, :4], cache=cache)
        cache.grow(40)
        assert_same(torch.cat((first, answers(layer, x[:, 4:], [3, 4, 26], cache)), 1), layer(x))


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_training_with_an_evicted_memory_is_training_with_a_kept_one(impl: str) -> None:
    layer = layer_of(window=9, sink=3, num_kv_heads=2)
    layer.impl = impl
    x = tokens(layer, 2, 30)
    new = tokens(layer, 2, 13, seed=1).requires_grad_()
    weight = tokens(layer, 2, 13, seed=2)
    grads = []
    for evict in (False, True):
        cache = layer.new_cache(2, 60, evict=evict)
        layer(x, cache=cache)
        out = layer(new, cache=cache)
        # Later writes break no earlier backward.
        layer(x[:, :17], cache=cache)
        grads.append(gradients(layer, new, out, weight))
    for name, grad in grads[1].items():
        assert_same(grad, grads[0][name])


def test_a_call_that_fails_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(window=9, sink=3)
    x = tokens(layer, 2, 60)
    cache = layer.new_cache(2, 60, evict=True)
    with torch.no_grad():
        expected = layer(x)
        layer(x[:, :30], cache=cache)
        failing = nn.Module()
        failing.forward = lambda _: (_ for _ in ()).throw(RuntimeError("stop"))  # type: ignore[method-assign]
        for count in (1, 25):
            with monkeypatch.context() as patch:
                patch.setitem(layer._modules, "o_proj", failing)
                with pytest.raises(RuntimeError, match="stop"):
                    layer.attend(tokens(layer, 2, count, seed=1), cache=cache)
            assert cache.length == 30
        # A quick step that fails has written its token already.
        with monkeypatch.context() as patch:
            patch.setattr(EvictingCache, "commit", lambda _: (_ for _ in ()).throw(RuntimeError("late")))
            with pytest.raises(RuntimeError, match="late"):
                layer(tokens(layer, 2, 1, seed=1), cache=cache)
        assert cache.length == 30
        assert_same(answers(layer, x[:, 30:], [1, 2, 30], cache), expected[:, 30:])
