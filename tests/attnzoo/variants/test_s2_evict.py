"""S2's freeing cache: it answers as the keeping one, and holds what the pattern can still read."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import attnzoo
from attnzoo.base.evicting import calls
from attnzoo.base.evicting.layer import PolicyLayer
from attnzoo.cache.evicting.cache import EvictingCache
from attnzoo.cache.evicting.regions import StreamingRegion
from attnzoo.cache.retention import Kept
from attnzoo.oracles.s2 import reads
from tests.attnzoo.cases import assert_same, build, gradients, recipe_of, tokens
from tests.attnzoo.laws.test_contract_memory import left_padded
from tests.attnzoo.variants.test_s2 import CONFIGS, config_of, pattern_of
from tests.attnzoo_kernels.test_mutants import rewrite

CAUSAL = [name for name in CONFIGS if CONFIGS[name].get("causal", True)]


def layer_of(dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    return build(config_of(**options), dtype=dtype)


def answers(layer: Any, x: Tensor, ends: list[int], cache: Any, padding: Tensor | None = None) -> Tensor:
    """The outputs of calls that end at the given tokens, put together."""
    return torch.cat(
        [
            layer.attend(x[:, a:b], cache=cache, key_padding=None if padding is None else padding[:, a:b]).out
            for a, b in pairwise([0, *ends])
        ],
        1,
    )


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("ends", [list(range(1, 61)), [30, 31, 60], [60], [3, 7, 8, 24, 25, 26, 60]], ids=str)
def test_every_pattern_decodes_and_continues_as_one_call(name: str, ends: list[int]) -> None:
    layer = layer_of(**CONFIGS[name])
    x = tokens(layer, 2, 60)
    with torch.no_grad():
        assert_same(answers(layer, x, ends, layer.new_cache(2, 60, evict=True)), layer(x))


@st.composite
def patterns(draw: Any) -> dict[str, Any]:
    groups = draw(st.sampled_from([1, 2, 3]))
    heads = groups * draw(st.integers(1, 2))
    return {
        "dim": 4 * heads,
        "num_heads": heads,
        "num_kv_heads": groups,
        "block_size": draw(st.integers(1, 6)),
        "local_blocks": draw(st.integers(1, 4)),
        "vert_stride": draw(st.integers(1, 7)),
        "head_offset": draw(st.integers(0, 7)),
        "step": draw(st.none() | st.sampled_from(["dkernel", 0, 1, 3])),
        "num_dense_heads": draw(st.integers(0, groups)),
        "sink_blocks": draw(st.integers(0, 2)),
        "homogeneous": draw(st.booleans()),
    }


@settings(max_examples=60, deadline=None)
@given(options=patterns(), ends=st.sets(st.integers(1, 39), max_size=6), seed=st.none() | st.integers(0, 99))
@example(options={"block_size": 4, "local_blocks": 1, "vert_stride": 100}, ends={1, 2, 3}, seed=1)
def test_any_pattern_split_and_padding_is_the_keeping_cache(
    options: dict[str, Any], ends: set[int], seed: int | None
) -> None:
    layer = layer_of(**options)
    x, padding = tokens(layer, 3, 40), None
    if seed is not None:
        padding = torch.rand(3, 40, generator=torch.Generator().manual_seed(seed)) < 0.4
        padding[2] = True
        x = torch.where(padding.unsqueeze(-1), math.nan, x)
    keeping, freeing = layer.new_cache(3, 40), layer.new_cache(3, 40, evict=True)
    with torch.no_grad():
        expected = answers(layer, x, [*sorted(ends), 40], keeping, padding)
        assert_same(answers(layer, x, [*sorted(ends), 40], freeing, padding), expected)
    assert freeing.lengths.tolist() == keeping.lengths.tolist()
    assert freeing.length == keeping.length


def test_prompts_of_different_lengths_decode_as_if_alone() -> None:
    for dtype in (torch.float32, torch.float64):
        layer = layer_of(dtype, block_size=4, local_blocks=2, vert_stride=4, num_kv_heads=2, sink_blocks=1)
        prompts, steps = (64, 5, 37), 8
        rows = [tokens(layer, 1, prompt + steps, seed=prompt) for prompt in prompts]
        x, key_padding = left_padded([row[:, :-steps] for row in rows], 64)
        cache = layer.new_cache(3, 64 + steps, evict=True)
        new = torch.cat([row[:, -steps:] for row in rows])
        with torch.no_grad():
            out = [layer.attend(x, key_padding=key_padding, cache=cache).out]
            out += [layer(new[:, step : step + 1], cache=cache) for step in range(steps)]
            for item, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
                assert_same(torch.cat(out, 1)[item : item + 1, 64 - prompt :], layer(row))


@pytest.mark.parametrize("name", CAUSAL)
def test_what_is_held_is_the_largest_set_that_the_pattern_reads(name: str) -> None:
    """A dense head's bytes are those of all tokens, another's those of the blocks that the last block's rows read."""
    config = config_of(**CONFIGS[name])
    layer = build(config, dtype=torch.float32)
    pattern, recipe, size = pattern_of(config), recipe_of(config), config.block_size
    token = 2 * config.head_width * 4
    for length in (1, 45, 200):
        last = (length - 1) // size
        read = [sum(reads(pattern, n, last, j, recipe) for j in range(last + 1)) for n in range(config.kv_heads)]
        dense = config.kv_heads if config.vert_stride == 1 else config.num_dense_heads
        sparse = range(config.kv_heads - dense)
        most = min(length, max((read[n] for n in sparse), default=0) * size)
        rows = len(sparse) * most + dense * length
        cache = layer.new_cache(3, length, evict=True)
        assert cache.nbytes == 3 * rows * token
    for _ in range(3):
        before = cache.nbytes
        with torch.no_grad():
            layer(tokens(layer, 3, 60), cache=cache)
        assert cache.nbytes == before


def test_bytes_fall_with_the_stride() -> None:
    layer = build(attnzoo.get_config("s2")(dim=64, num_heads=8, block_size=16, local_blocks=4, vert_stride=8))
    keeping, freeing = layer.new_cache(2, 8192), layer.new_cache(2, 8192, evict=True)
    assert freeing.nbytes < 0.14 * keeping.nbytes
    assert freeing.bytes_per_token < 0.14 * keeping.bytes_per_token
    sparse = layer_of(block_size=4, local_blocks=2, vert_stride=100_000, head_offset=1)
    short, long = (sparse.new_cache(1, length, evict=True).nbytes for length in (400, 3600))
    assert short == long


def test_plans_are_those_of_the_keeping_cache() -> None:
    layer = layer_of(block_size=4, local_blocks=2, vert_stride=4)
    x = tokens(layer, 2, 60)
    caches = layer.new_cache(2, 60), layer.new_cache(2, 60, evict=True)
    padding = torch.arange(20) < torch.tensor([[0], [7]])
    with torch.no_grad():
        for part, hidden in ((x[:, :30], None), (x[:, 30:31], None), (x[:, 31:51], padding), (x[:, 51:52], None)):
            kept, freed = (layer.attend(part, key_padding=hidden, cache=cache).plan for cache in caches)
            assert freed.density == kept.density
            assert torch.equal(freed.layout.to_mask(), kept.layout.to_mask())


def test_reordered_and_forked_items_go_on() -> None:
    layer = layer_of(block_size=4, local_blocks=2, vert_stride=4, num_kv_heads=2)
    rows = [tokens(layer, 1, length, seed=length) for length in (40, 7, 23)]
    x, key_padding = left_padded(rows, 40)
    new = tokens(layer, 4, 9, seed=5)
    chosen = [2, 0, 0, 1]
    cache = layer.new_cache(3, 64, evict=True)
    with torch.no_grad():
        layer.attend(x, key_padding=key_padding, cache=cache)
        branch = cache.fork()
        layer(tokens(layer, 3, 12, seed=9), cache=branch)
        cache.reorder(torch.tensor(chosen))
        out = layer(new, cache=cache)
        for item, source in enumerate(chosen):
            alone = layer(torch.cat([rows[source], new[item : item + 1]], 1))
            assert_same(out[item : item + 1], alone[:, rows[source].shape[1] :])
        out = layer(new[:3], cache=branch)
        for item, row in enumerate(rows):
            whole = torch.cat([row, tokens(layer, 3, 12, seed=9)[item : item + 1], new[item : item + 1]], 1)
            assert_same(out[item : item + 1], layer(whole)[:, -9:])


@pytest.mark.parametrize("impl", ["blocked", "reference"])
def test_training_with_a_freed_memory_is_training_with_a_kept_one(impl: str) -> None:
    layer = layer_of(block_size=4, local_blocks=1, vert_stride=3, num_kv_heads=2, num_dense_heads=1)
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
    layer = layer_of(block_size=4, local_blocks=1, vert_stride=3)
    x = tokens(layer, 2, 60)
    cache = layer.new_cache(2, 60, evict=True)
    with torch.no_grad():
        layer(x[:, :30], cache=cache)
        with monkeypatch.context() as patch:
            patch.setattr(layer.o_proj, "forward", lambda _: (_ for _ in ()).throw(RuntimeError("stop")))
            with pytest.raises(RuntimeError, match="stop"):
                layer(tokens(layer, 2, 25, seed=1), cache=cache)
        assert cache.length == 30
        with pytest.raises(ValueError, match="cache: expected at most max_length 60 tokens, got 61"):
            layer(tokens(layer, 2, 31, seed=1), cache=cache)
        assert_same(layer(x[:, 30:], cache=cache), layer(x)[:, 30:])


def test_half_precision_and_autocast_decode_as_they_prefill() -> None:
    layer = layer_of(torch.float32, block_size=4, local_blocks=2, vert_stride=4)
    x = tokens(layer, 2, 40)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert_same(answers(layer, x, [17, 30, *range(31, 41)], layer.new_cache(2, 40, evict=True)), layer(x), scale=4)
    half = layer.to(torch.bfloat16)
    with torch.no_grad():
        out = answers(half, x.bfloat16(), [30, *range(31, 41)], half.new_cache(2, 40, evict=True))
        assert_same(out, half(x.bfloat16()), scale=4)


def test_a_cache_crosses_inference_mode_and_empty_calls() -> None:
    layer = layer_of(block_size=4, local_blocks=2, vert_stride=4)
    x = tokens(layer, 2, 40)
    with torch.inference_mode():
        cache = layer.new_cache(2, 40, evict=True)
        first = layer(x[:, :20], cache=cache).clone()
    assert layer(x[:, :0], cache=cache).shape == (2, 0, 32)
    out = layer(x[:, 20:], cache=cache)
    assert_same(torch.cat([first, out], 1), layer(x))
    out.square().sum().backward()
    nobody = layer.new_cache(0, 5, evict=True)
    assert layer(x[:0, :3], cache=nobody).shape == (0, 3, 32)


def test_misuse_is_refused_by_name() -> None:
    layer = layer_of(block_size=4, local_blocks=2, vert_stride=4)
    cache = layer.new_cache(1, 8, evict=True)
    with pytest.raises(attnzoo.UnsupportedError, match="crop: a cache that evicts cannot go back"):
        cache.crop(0)
    with pytest.raises(attnzoo.ShapeError, match="max_length: expected at least 8, got 5"):
        cache.grow(5)
    with pytest.raises(attnzoo.UnsupportedError, match="append: "):
        cache.append({}, 1, differentiable=False)
    with pytest.raises(TypeError, match="evict: expected a bool, got int"):
        layer.new_cache(1, 8, evict=1)
    with pytest.raises(ValueError, match="max_length: expected at least 1, got 0"):
        layer.new_cache(1, 0, evict=True)
    with pytest.raises(TypeError, match="batch: expected an int"):
        layer.new_cache(1.0, 8, evict=True)
    with pytest.raises(attnzoo.UnsupportedError, match="cache: expected a causal layer"):
        layer_of(causal=False).new_cache(1, 8, evict=True)
    with pytest.raises(ValueError, match="cache: expected one that this layer's new_cache made"):
        layer_of(block_size=4, local_blocks=2, vert_stride=4)(tokens(layer, 1, 3), cache=cache)


def passes() -> bool:
    """A few calls beside the keeping cache, with splits inside blocks, padding, and blocks that are freed."""
    layer = layer_of(block_size=4, local_blocks=2, vert_stride=3, num_kv_heads=2, sink_blocks=1)
    x = tokens(layer, 2, 60)
    ragged = torch.rand(2, 60, generator=torch.Generator().manual_seed(3)) < 0.3
    try:
        for padding in (None, ragged):
            hidden = x if padding is None else torch.where(padding.unsqueeze(-1), math.nan, x)
            for ends in ([30, 31, 47, 60], [3, 9, 45, 60], list(range(1, 61))):
                caches = [layer.new_cache(2, 60, evict=evict) for evict in (False, True)]
                with torch.no_grad():
                    expected, out = (answers(layer, hidden, ends, cache, padding) for cache in caches)
                assert_same(out, expected)
    except (AssertionError, ValueError, IndexError, RuntimeError):
        return False
    return True


MUTANTS: dict[str, tuple[Any, str, str, str]] = {
    "a near block fewer in chunks": (calls, "_attend_blocks", "own - block < region.local", "own - block < 1"),
    "a near block more in chunks": (calls, "_attend_blocks", "own - block < region.local", "own - block < 3"),
    "kept blocks not read by chunks": (calls, "_attend_blocks", "(kept | (own", "(~kept & (own"),
    "rows off the sequence's grid": (calls, "_attend_blocks", "offset % size +", "0 * offset +"),
    "one near block too few is put together": (calls._Columns, "blocks", "- self.near", "- self.near + 1"),
    "kept blocks of an item's later rows": (calls._Columns, "blocks", "- region.local + 1", "+ 1"),
    "the row's own token lies elsewhere": (StreamingRegion, "runs", "(self.margin, row + 1)", "(self.margin, row)"),
    "blocks are kept before they leave": (StreamingRegion, "runs", "current - self.local + 1", "current"),
    "what leaves is never kept": (StreamingRegion, "_move", "elif stays:", "elif False:"),
    "the full block stays where it was": (
        StreamingRegion,
        "_move",
        "    else:\n        _write_over(left, filled, journal)",
        "    else:\n        pass",
    ),
    "the ring comes round late": (StreamingRegion, "row_of", "% max(self.places, 1)", "% max(self.places + 1, 1)"),
    "kept blocks out of order": (Kept, "nth", "self.stride * (index", "self.stride * (1 + index"),
    "lengths are not counted": (EvictingCache, "commit", "self.lengths + lengths", "self.lengths"),
    "own values of the call are not found": (EvictingCache, "_gathered", "token + behind", "token"),
    "the past forgotten": (PolicyLayer, "operate", "isinstance(inputs, HeldInputs)", "False"),
}


def test_the_right_one_passes() -> None:
    assert passes()


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, function, old, new = MUTANTS[name]
    rewrite(monkeypatch, owner, function, old, new)
    assert not passes()
