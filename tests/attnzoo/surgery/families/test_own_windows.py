"""Laws for hosts with sliding windows of their own, which stay in force under every conversion."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import attnzoo
from attnzoo import surgery
from attnzoo.surgery.hosts.calls import cache_name
from attnzoo.surgery.sites import find
from tests.attnzoo.surgery.families.laws import OPTIONS, convert, made
from tests.attnzoo.surgery.hosts.masks import for_host, groups_of, padding_mask, s2_mask
from tests.attnzoo.surgery.tiny import assert_close, assert_untouched, ids, logits, snapshot

EXACT = 1e-10
TOKENS = 22


def own_mask(window: int | None, tokens: int, other: int | None = None) -> Tensor:
    """Additive ``[1, 1, T, T]``: what a block reads within its own window and another."""
    t = torch.arange(tokens).unsqueeze(1)
    distance = t - t.T
    seen = (distance >= 0) & (distance < min(window or tokens, other or tokens))
    return torch.zeros(tokens, tokens, dtype=torch.float64).masked_fill(~seen, float("-inf"))[None, None]


def _is_layer(layer: int, site: surgery.Site) -> bool:
    return site.layer == layer


HYBRID = ("Gemma 3", "Qwen2 with windows")


@pytest.mark.parametrize("name", HYBRID)
@pytest.mark.parametrize("window", [4, 9])
def test_a_window_is_read_within_the_blocks_own(name: str, window: int) -> None:
    model = made(name)
    tokens = ids(2, TOKENS)
    own = {site.layer: site.window for site in find(model)}
    assert sorted(own.values(), key=str) == [6, None]
    kinds = model.config.layer_types
    masks = {kinds[layer]: own_mask(size, TOKENS, window) for layer, size in own.items()}
    expected = logits(model, tokens, attention_mask=masks)
    convert(model, "window", name, window=window)
    assert_close(logits(model, tokens), expected, EXACT)


@pytest.mark.parametrize(
    "name",
    [
        "Gemma 3",
        *(
            pytest.param(x, marks=pytest.mark.slow)
            for x in ("Qwen2 with windows", "Mistral with a window", "Phi-3 with a window")
        ),
    ],
)
@pytest.mark.parametrize("cell", ["mha", "s2", "moh", "replaced", "nothing"])
@pytest.mark.parametrize("padding", [pytest.param([0, 0], marks=pytest.mark.slow), [0, 5]], ids=["whole", "padded"])
def test_sliding_caches_beside_what_is_converted_say_what_no_cache_does(
    name: str, cell: str, padding: list[int]
) -> None:
    model = made(name)
    layers = len(find(model))
    tokens = ids(2, TOKENS)
    mask = padding_mask(padding, TOKENS)
    expected = logits(model, tokens, attention_mask=mask)
    for changed in range(layers if cell != "nothing" else 1):
        model = made(name)
        # One block is converted, the other is left alone and called through the same functions.
        convert(model, "mha" if cell == "nothing" else cell, name, where=partial(_is_layer, changed))
        whole = logits(model, tokens, attention_mask=mask)
        if cell != "s2":
            assert_close(whole[mask.bool()], expected[mask.bool()], EXACT)
        cache = DynamicCache(config=model.config)
        key = cache_name(type(model).forward)
        said = []
        # A prefill longer than the window, single tokens, and a chunk.
        for first, last in ((0, 9), (9, 10), (10, 11), (11, 16), (16, 17), (17, TOKENS)):
            given = {key: cache, "attention_mask": mask[:, :last]}
            said.append(logits(model, tokens[:, first:last], **given))
        assert_close(torch.cat(said, 1)[mask.bool()], whole[mask.bool()], EXACT)


def test_shards_are_read_within_the_blocks_own_window() -> None:
    model = made("Mistral with a window")
    shards = s2_mask(TOKENS, groups_of(4, 2), block=4, local=2, stride=2)
    own = own_mask(6, TOKENS)[0, 0] == 0
    assert bool((shards & ~own).any())
    expected = logits(model, ids(2, TOKENS), attention_mask=for_host(shards & own, [0, 0], torch.float64))
    convert(model, "s2", "Mistral with a window")
    assert_close(logits(model, ids(2, TOKENS)), expected, EXACT)


def test_a_sink_that_the_own_window_leaves_behind_is_refused() -> None:
    model = made("Gemma 3")
    before = snapshot(model)
    with pytest.raises(attnzoo.ConfigError, match=r"sink: expected 0 at .* own sliding window of 6"):
        surgery.convert(model, "mha", window=4, sink=1)
    with pytest.raises(attnzoo.ConfigError, match=r"evict: expected False for 's2'"):
        surgery.convert(model, "s2", evict=True, **OPTIONS["s2"])
    assert_untouched(model, before)
    surgery.convert(model, "mha", window=4, sink=1, where=lambda site: site.window is None)
