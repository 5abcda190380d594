"""Landmark blocks in CPU memory: the answers of a resident cache, and only what is read is fetched."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import attnzoo
from attnzoo.cache.kv_cache import KVCache
from attnzoo.selection import offloading
from tests.attnzoo.cases import Case, assert_same, build, tokens

TOTAL = 75


def layer_of(dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    return Case("landmark", "small").layer(dtype=dtype, **changes)


def offloaded(layer: Any, batch: int, length: int, **options: Any) -> KVCache:
    cache: KVCache = layer.new_cache(batch, length, offload=True, **options)
    assert cache.offloaded_nbytes > 0
    return cache


def called(layer: Any, x: Tensor, ends: list[int], cache: Any, key_padding: Tensor | None = None) -> Tensor:
    outs = []
    for a, b in pairwise([0, *ends]):
        part = None if key_padding is None else key_padding[:, a:b]
        outs.append(layer.attend(x[:, a:b], key_padding=part, cache=cache).out)
    return torch.cat(outs, 1)


@settings(max_examples=20, deadline=None)
@given(ends=st.sets(st.integers(1, TOTAL - 1), max_size=6), padded=st.booleans(), mode=st.sampled_from(["soft", None]))
@example(ends={24, 25, 31, 32, 33}, padded=False, mode=None)
@example(ends={24, 25, 31, 32, 33}, padded=True, mode=None)
def test_any_calls_give_what_one_call_gives(ends: set[int], padded: bool, mode: Any) -> None:
    layer = layer_of(mode=mode)
    x = tokens(layer, 3, TOTAL)
    key_padding = None
    if padded:
        key_padding = torch.rand(3, TOTAL, generator=torch.Generator().manual_seed(0)) < 0.4
        key_padding[2, :40] = True
    with torch.no_grad():
        out = called(layer, x, [*sorted(ends), TOTAL], offloaded(layer, 3, TOTAL), key_padding)
        assert_same(out, layer.attend(x, key_padding=key_padding).out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_token_by_token_is_prefill(dtype: torch.dtype) -> None:
    layer = layer_of(dtype)
    x = tokens(layer, 2, TOTAL)
    with torch.no_grad():
        assert_same(called(layer, x, list(range(1, TOTAL + 1)), offloaded(layer, 2, TOTAL)), layer(x))


@pytest.mark.parametrize("options", [{"rotary": None}, {"num_kv_heads": 1}, {"block_size": 51, "top_k": 1}])
def test_options_do_not_matter(options: dict[str, Any]) -> None:
    layer = layer_of(**options)
    x = tokens(layer, 2, 230)
    with torch.no_grad():
        assert_same(called(layer, x, [140, 141, 203, 204, 230], offloaded(layer, 2, 230)), layer(x))


def test_a_cache_of_a_narrower_dtype_rounds_as_the_resident_one() -> None:
    layer = layer_of(torch.float32)
    x = tokens(layer, 2, TOTAL)
    with torch.no_grad():
        resident = called(layer, x, [40, 41, TOTAL], layer.new_cache(2, TOTAL, dtype=torch.bfloat16))
        assert_same(called(layer, x, [40, 41, TOTAL], offloaded(layer, 2, TOTAL, dtype=torch.bfloat16)), resident)


def ragged(layer: Any, cache: Any) -> Tensor:
    """A cache with 60 and 31 tokens, and what came out."""
    key_padding = torch.arange(60) < torch.tensor([[0], [29]])
    out: Tensor = layer.attend(tokens(layer, 2, 60), key_padding=key_padding, cache=cache).out
    return out


@pytest.mark.parametrize("keep", [0, 7, 31, 44, torch.tensor([57, 24]), torch.tensor([8, 31])], ids=str)
@pytest.mark.parametrize("even", [True, False], ids=["even", "ragged"])
def test_cropping_brings_the_unfinished_block_back(keep: Any, even: bool) -> None:
    layer = layer_of()
    new = tokens(layer, 2, 30, seed=3)
    outs = []
    with torch.no_grad():
        for cache in (offloaded(layer, 2, 100), layer.new_cache(2, 100)):
            if even:
                layer.attend(tokens(layer, 2, 60), cache=cache)
            else:
                ragged(layer, cache)
            cache.crop(keep)
            outs.append(called(layer, new, [1, 2, 30], cache))
    assert_same(*outs)


def test_reordering_forking_and_growing_take_the_host_along() -> None:
    layer = layer_of()
    new = tokens(layer, 3, 40, seed=3)
    outs = []
    with torch.no_grad():
        for cache in (offloaded(layer, 2, 60), layer.new_cache(2, 120)):
            ragged(layer, cache)
            branch = cache.fork()
            if cache.max_length < 120:
                for each in (cache, branch):
                    each.grow(120)
            layer.attend(tokens(layer, 2, 20, seed=4), cache=cache)
            cache.reorder(torch.tensor([1, 0, 1]))
            outs.append(torch.cat([called(layer, new, [1, 40], cache), called(layer, new[:2], [1, 40], branch)]))
    assert_same(*outs)


def test_a_call_that_fails_leaves_nothing() -> None:
    layer = layer_of()
    x = tokens(layer, 2, TOTAL)
    with torch.no_grad():
        expected = layer(x)
        for operates in (True, False):
            cache = offloaded(layer, 2, TOTAL)
            layer.attend(x[:, :43], cache=cache)
            if operates:
                layer.impl = "fastest"
                with pytest.raises(ValueError, match="impl"):
                    layer.attend(tokens(layer, 2, 20, seed=5), cache=cache)
                layer.impl = "auto"
            else:
                with pytest.raises(ValueError, match="cache: expected at most max_length"):
                    layer.attend(x, cache=cache)
            assert_same(called(layer, x[:, 43:], [1, 20, TOTAL - 43], cache), expected[:, 43:])


def test_training_from_the_hosts_memory_is_refused_and_leaves_nothing() -> None:
    layer = layer_of()
    x = tokens(layer, 2, TOTAL)
    cache = offloaded(layer, 2, TOTAL)
    with torch.no_grad():
        layer.attend(x[:, :45], cache=cache)
    with pytest.raises(attnzoo.UnsupportedError, match="cache: expected no gradients"):
        layer.attend(x[:, 45:], cache=cache)
    with torch.no_grad():
        assert_same(layer.attend(x[:, 45:], cache=cache).out, layer(x)[:, 45:])
    with pytest.raises(TypeError, match="offload: expected a bool"):
        layer.new_cache(2, TOTAL, offload=1)


@pytest.mark.parametrize("quirks", [False, True])
@pytest.mark.parametrize("offload", [False, True])
def test_calls_without_tokens_and_batches_without_items_do_nothing(quirks: bool, offload: bool) -> None:
    layer = layer_of(official_quirks=quirks)
    x = tokens(layer, 2, 60)
    outs = []
    with torch.no_grad():
        for empty in (True, False):
            cache = layer.new_cache(2, 60, offload=offload)
            layer.attend(x[:, :40], key_padding=torch.arange(40) < torch.tensor([[0], [9]]), cache=cache)
            if empty:
                assert layer.attend(x[:, :0], cache=cache).out.shape == (2, 0, 32)
                gone = layer.attend(x[:, :3], key_padding=torch.ones(2, 3, dtype=torch.bool), cache=cache).out
                assert not gone.any()
            pause = torch.tensor([[True], [False]])
            outs.append(layer.attend(x[:, 40:43], key_padding=pause.expand(-1, 3), cache=cache).out)
        nobody = layer.new_cache(0, 60, offload=offload)
        assert layer.attend(x[:0, :40], cache=nobody).out.shape == (0, 40, 32)
        assert layer.attend(x[:0, :5], cache=nobody).out.shape == (0, 5, 32)
    assert_same(*outs)
    assert not outs[0][0].any()
    assert outs[0][1].any()


def test_a_step_fetches_what_it_reads_and_the_device_holds_little(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = build(attnzoo.LandmarkConfig(dim=32, num_heads=4, num_kv_heads=2, block_size=8, top_k=2))
    x = tokens(layer, 1, 801)
    cache = offloaded(layer, 1, 801)
    fetched: list[Any] = []
    fetch = offloading.fetch_blocks

    def listening(memory: Any, plan: Any) -> Any:
        fetched.append(fetch(memory, plan))
        return fetched[-1]

    with torch.no_grad():
        layer.attend(x[:, :800], cache=cache)
        monkeypatch.setattr(offloading, "fetch_blocks", listening)
        plan = layer.attend(x[:, 800:], cache=cache).plan
    ((memory, _),) = fetched
    chosen = plan.info["blocks"][0, :, 0]  # [H, k]
    most = max(len(set(chosen[2 * group : 2 * group + 2].flatten().tolist())) for group in range(2))
    # What the heads of a group chose, and the unfinished block.
    assert memory.k.shape[2] == 8 * (most + 1)
    assert cache.nbytes - cache.offloaded_nbytes < cache.offloaded_nbytes / 12
    assert plan.density == pytest.approx((2 * 7 + 1) / 801)
