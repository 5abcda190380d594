"""Converted blocks that read a window or shards: their memory evicts by itself, and nothing that is said changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

import attnzoo
from attnzoo import surgery
from attnzoo.cache.evicting.cache import EvictingCache
from attnzoo.surgery.hosts.attention_function import pattern_of
from attnzoo.surgery.hosts.caches.evicting import MARGIN, EvictingCacheLayer
from attnzoo.surgery.hosts.caches.growing import GrowingLayer
from attnzoo.surgery.options import options_of
from tests.attnzoo.surgery.tiny import READING, assert_close, convert, converted, ids, logits, tiny

EXACT = 1e-11
EVICTING = ("window", "s2")
_models: dict[tuple[str, bool], Any] = {}


def model_of(kind: str, evict: bool = True) -> Any:
    """A model of each kind that evicts, and its twin that keeps everything; nothing here changes them."""
    if (kind, evict) not in _models:
        model = tiny(layers=2)
        variant, options = READING[kind]
        convert(model, variant, **options, **({} if evict else {"evict": False}))
        _models[kind, evict] = model
    return _models[kind, evict]


def said(model: Any, tokens: torch.Tensor, chunks: list[int], cache: Any = None) -> tuple[torch.Tensor, Any]:
    """The logits of calls of so many tokens, and the cache."""
    found = []
    for part in tokens.split(chunks, 1):
        with torch.no_grad():
            out = model(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits)
    return torch.cat(found, 1), cache


def layers_of(cache: Any) -> set[type]:
    return {type(layer) for layer in cache.layers}


@pytest.mark.parametrize("kind", EVICTING)
@pytest.mark.parametrize("chunks", [[30, *[1] * 30], [1] * 60, [7, 20, 1, 1, 31], [60]], ids=lambda x: str(len(x)))
def test_what_is_said_is_what_a_model_says_that_keeps_everything(kind: str, chunks: list[int]) -> None:
    tokens = ids(3, 60)
    found, cache = said(model_of(kind), tokens, chunks)
    kept, other = said(model_of(kind, evict=False), tokens, chunks)
    assert layers_of(cache) == {EvictingCacheLayer}
    assert layers_of(other) == {GrowingLayer}
    assert cache.get_seq_length() == other.get_seq_length() == 60
    assert_close(found, kept, EXACT)
    assert_close(found, logits(model_of(kind), tokens, use_cache=False), EXACT)


@pytest.mark.parametrize("kind", EVICTING)
def test_generate_makes_a_cache_that_evicts_and_beams_take_it_along(kind: str) -> None:
    tokens = ids(2, 14)
    options: dict[str, Any] = {"max_new_tokens": 14, "do_sample": False, "pad_token_id": 0}
    for more in ({}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}):
        found = model_of(kind).generate(tokens, return_dict_in_generate=True, **options, **more)
        assert layers_of(found.past_key_values) == {EvictingCacheLayer}
        assert found.sequences.tolist() == model_of(kind, evict=False).generate(tokens, **options, **more).tolist()


@pytest.mark.parametrize("kind", EVICTING)
def test_a_decoding_step_reads_the_regions_in_place(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    original = EvictingCache.decode_row
    monkeypatch.setattr(EvictingCache, "decode_row", lambda *args: (taken.append(1), original(*args))[1])
    model = model_of(kind)
    _, cache = said(model, ids(1, 20), [18, 1, 1])
    assert len(taken) == 2 * 2
    # A record has its plan.
    with attnzoo.record(model) as rec:
        said(model, ids(1, 1), [1], cache)
    assert len(rec.plans) == 2
    assert len(taken) == 2 * 2


def test_the_bytes_of_a_window_are_constant_and_few() -> None:
    model = model_of("window")
    cache = None
    held = []
    for count in (20, 1, 1, 200, 1, 300):
        _, cache = said(model, ids(1, count), [count], cache)
        memories = [layer.memory for layer in cache.layers]
        held.append(sum(x.untyped_storage().nbytes() for memory in memories for x in memory._buffers.values()))
    assert len(set(held[3:])) == 1
    values = 2 * memories[0].streams["k.near"].shape[1] * memories[0].streams["k.near"].shape[3] * 8
    assert cache.layers[0].nbytes == (MARGIN + 9 + 2) * values


@pytest.mark.parametrize("kind", EVICTING)
def test_what_cannot_evict_is_kept(kind: str) -> None:
    model, tokens = model_of(kind), ids(2, 20)
    expected = logits(model, tokens, use_cache=False)
    # Gradients that reach earlier tokens.
    out = model(tokens, use_cache=True)
    assert layers_of(out.past_key_values) == {GrowingLayer}
    # A cache that holds something already, and one of another kind.
    _, cache = said(model_of(kind, evict=False), tokens, [12, 8])
    found, cache = said(model, ids(2, 5, seed=4), [1, 4], cache)
    assert layers_of(cache) == {GrowingLayer}
    assert_close(found, logits(model, torch.cat((tokens, ids(2, 5, seed=4)), 1), use_cache=False)[:, 20:], EXACT)
    found, cache = said(model, tokens, [19, 1], StaticCache(config=model.config, max_cache_len=32))
    assert EvictingCacheLayer not in layers_of(cache)
    assert_close(found, expected, EXACT)
    # Caches of a caller's that are empty evict: the host's own, and ours.
    for mine in (DynamicCache(config=model.config), DynamicCache(), surgery.new_cache(model)):
        found, cache = said(model, tokens, [19, 1], mine)
        assert cache is mine
        assert layers_of(cache) == {EvictingCacheLayer}
        assert_close(found, expected, EXACT)


@pytest.mark.parametrize("kind", EVICTING)
def test_so_many_tokens_are_taken_back_as_the_margin_holds(kind: str) -> None:
    model, tokens = model_of(kind), ids(2, 200)
    expected = logits(model, tokens, use_cache=False)
    _, cache = said(model, tokens[:, :192], [150, 1, 1, 40])
    cache.crop(-MARGIN)
    found, cache = said(model, tokens[:, 192 - MARGIN :], [1, 1, 5, MARGIN + 1], cache)
    assert_close(found, expected[:, 192 - MARGIN :], EXACT)
    with pytest.raises(attnzoo.UnsupportedError, match=f"crop: expected at most {MARGIN} tokens to be taken back"):
        cache.crop(-150)
    # Nothing has changed.
    more = ids(2, 3, seed=5)
    found, cache = said(model, more, [1, 2], cache)
    assert_close(found, logits(model, torch.cat((tokens, more), 1), use_cache=False)[:, 200:], EXACT)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert_close(said(model, tokens[:, :30], [29, 1], cache)[0], expected[:, :30], EXACT)


@pytest.mark.parametrize("kind", EVICTING)
def test_assisted_decoding_takes_back_what_it_rejects(kind: str) -> None:
    tokens = ids(1, 30)
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    assistant = tiny(layers=1, seed=3)
    found = model_of(kind).generate(tokens, assistant_model=assistant, **options)
    assert found.tolist() == model_of(kind).generate(tokens, **options).tolist()


def test_others_than_the_block_that_filled_it_are_refused() -> None:
    tokens = ids(1, 20)
    _, cache = said(model_of("window"), tokens, [20])
    with pytest.raises(attnzoo.UnsupportedError, match="past_key_values: expected a cache that this model has filled"):
        said(tiny(layers=2), tokens, [20], cache)
    with pytest.raises(attnzoo.UnsupportedError, match="got one whose block read something else"):
        said(model_of("s2"), tokens, [20], cache)
    _, cache = said(model_of("window"), tokens, [20])
    with pytest.raises(attnzoo.UnsupportedError, match="expected no gradients through a cache that evicts"):
        model_of("window")(tokens, past_key_values=cache)


@pytest.mark.parametrize("kind", EVICTING)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_takes_no_room_in_a_cache_that_evicts(kind: str, side: str) -> None:
    """Items of a padded batch are each what they are alone, and hold what they would."""
    tokens = ids(3, 70)
    mask = torch.ones(3, 70, dtype=torch.long)
    for item, count in enumerate((6, 0, 17)):
        mask[item, slice(0, count) if side == "left" else slice(40 - count, 40)] = 0
    cache = None
    found = []
    for first, end in ((0, 40), (40, 41), (41, 42), (42, 70)):
        position = (mask[:, :end].cumsum(1) - 1).clamp(min=0)[:, first:]
        with torch.no_grad():
            out = model_of(kind)(
                tokens[:, first:end], attention_mask=mask[:, :end], position_ids=position, past_key_values=cache
            )
        cache = out.past_key_values
        found.append(out.logits)
    assert layers_of(cache) == {EvictingCacheLayer}
    assert cache.layers[0].memory.lengths.tolist() == [64, 70, 53]
    for item in range(3):
        real = mask[item].bool()
        alone = logits(model_of(kind), tokens[item : item + 1, real], use_cache=False)
        assert_close(torch.cat(found, 1)[item : item + 1, real], alone, EXACT)
    # What came before must come again.
    with torch.no_grad(), pytest.raises(attnzoo.ShapeError, match="attention_mask: expected the padding of earlier"):
        model_of(kind)(ids(3, 1), past_key_values=cache)


def test_whether_to_evict_is_an_option(tmp_path: Any) -> None:
    assert options_of("mha")["evict"] is options_of("s2")["evict"] is True
    for variant, options in (("mha", {}), ("s2", {"vert_stride": 1})):
        with pytest.raises(attnzoo.ConfigError, match="evict: expected False, or a window or shards"):
            surgery.convert(tiny(layers=1), variant, evict=True, **options)
    with pytest.raises(attnzoo.ConfigError, match="evict: expected a bool"):
        surgery.convert(tiny(layers=1), "mha", window=9, sink=1, evict=1)
    _, cache = said(converted("mha", layers=2), ids(1, 9), [8, 1])
    assert layers_of(cache) == {GrowingLayer}
    model = model_of("window", evict=False)
    surgery.save(model, tmp_path / "model")
    again, _ = surgery.load(tmp_path / "model")
    blocks = [module for module in again.modules() if pattern_of(module) is not None]
    assert blocks
    assert not any(pattern_of(block).evict for block in blocks)  # type: ignore[union-attr]
