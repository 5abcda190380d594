"""Keys and values in CPU memory: what a cache holds where, and a fetched call is the whole call."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attnzoo
from attnzoo import BlockLayout, Extras, heads
from attnzoo.base.steps import AttentionInputs, Plan
from attnzoo.cache.kv_cache import KVCache, Stream
from attnzoo.selection.offloaded_blocks import fetch_blocks
from attnzoo_kernels.errors import UnsupportedError
from tests.attnzoo.cases import assert_same, build, tokens

SMALL: dict[str, Any] = {"dim": 32, "num_heads": 4, "num_kv_heads": 2, "chunk_size": 4, "attention_length": 16}


def longheads(**options: Any) -> Any:
    return build(attnzoo.get_config("longheads")(**{**SMALL, **options}), dtype=torch.float64)


def call(layer: Any, inputs: AttentionInputs, plan: Plan) -> Tensor:
    """The operation of a plain layer on a memory and a plan."""
    out: Tensor = layer.operate(inputs, plan)
    return out


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_fetched_call_is_the_whole_call(data: st.DataObject) -> None:
    batch, groups, fold = (data.draw(st.integers(1, 3)) for _ in range(3))
    heads = groups * fold
    block_q, block_k = data.draw(st.sampled_from([1, 2, 4])), data.draw(st.sampled_from([1, 3, 4]))
    seq_k = data.draw(st.integers(1, 30))
    seq_q = data.draw(st.integers(1, min(9, seq_k)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    grid = (-(-seq_q // block_q), -(-seq_k // block_k))
    shape = (data.draw(st.sampled_from([1, batch])), data.draw(st.sampled_from([1, groups, heads])), *grid)
    keep = torch.rand(shape, generator=generator) < data.draw(st.sampled_from([0.0, 0.3, 0.9]))
    layout = BlockLayout.from_mask(keep, block_q, block_k, seq_q, seq_k)
    cos, sin = (torch.randn(8, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    origin = torch.randint(0, 8, layout.col.shape, generator=generator).to(torch.int32)
    layout = replace(layout, origin=origin)
    q_pos = None
    if data.draw(st.booleans()):
        q_pos = torch.randint(-1, seq_k, (batch, 1, seq_q), generator=generator).to(torch.int32)
    q = torch.randn(batch, heads, seq_q, 4, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(batch, groups, seq_k, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    inputs, plan = AttentionInputs(q, k, v, q_pos), Plan(layout, Extras(q_pos=q_pos, rope=(cos, sin)), True)
    fetched, moved = fetch_blocks(inputs, plan)
    layer = build(attnzoo.get_config("mha")(dim=4 * heads, num_heads=heads), dtype=torch.float64)
    assert_same(call(layer, fetched, moved), call(layer, inputs, plan))
    listed = keep.any(2).expand(batch, -1, -1)
    listed = listed.unflatten(1, (groups, -1)).any(2) if listed.shape[1] == heads else listed
    assert fetched.k.shape[2] == block_k * max(1, int(listed.sum(-1).max()))


def test_the_order_of_fetched_blocks_is_theirs() -> None:
    k = torch.arange(12.0).view(1, 1, 12, 1)
    keep = torch.tensor([[[[True, False, False, True]]]])
    layout = BlockLayout.from_mask(keep, 1, 3, 1, 12)
    inputs = AttentionInputs(torch.zeros(1, 1, 1, 1), k, k)
    fetched, plan = fetch_blocks(inputs, Plan(layout, Extras(), True))
    assert fetched.k.flatten().tolist() == [0, 1, 2, 9, 10, 11]
    assert plan.extras.q_pos is not None
    assert plan.extras.q_pos.flatten().tolist() == [5]


@pytest.mark.parametrize(
    ("extras", "causal"),
    [
        (Extras(window=3), True),
        (Extras(key_bias=torch.zeros(1, 1, 4)), True),
        (Extras(gate=torch.zeros(1, 1, 1, 2)), True),
        (Extras(), False),
    ],
)
def test_rules_that_count_slots_are_refused(extras: Extras, causal: bool) -> None:
    x = torch.zeros(1, 1, 4, 2)
    with pytest.raises(attnzoo.UnsupportedError, match="offload: expected a causal plan without"):
        fetch_blocks(AttentionInputs(x, x, x), Plan(BlockLayout.dense(4, 4, 4, 4), extras, causal))


@pytest.mark.parametrize(
    "options", [{}, {"select": "block"}, {"group_select": True}, {"chunk_rep": "mean_key"}], ids=str
)
@settings(max_examples=10, deadline=None)
@given(ends=st.sets(st.integers(1, 44), max_size=6), padded=st.booleans())
def test_offloaded_is_resident(options: dict[str, Any], ends: set[int], padded: bool) -> None:
    layer = longheads(**options)
    x = tokens(layer, 3, 45)
    generator = torch.Generator().manual_seed(len(ends))
    padding = torch.rand(3, 45, generator=generator) < 0.3 if padded else None
    caches = [layer.new_cache(3, 45, offload=offload) for offload in (False, True)]
    with torch.no_grad():
        for a, b in pairwise([0, *sorted(ends), 45]):
            part = None if padding is None else padding[:, a:b]
            resident, far = (layer.attend(x[:, a:b], key_padding=part, cache=cache) for cache in caches)
            assert_same(far.out, resident.out)
            assert far.plan.density == resident.plan.density


def test_an_offloaded_cache_is_cropped_reordered_forked_and_grown() -> None:
    layer = longheads()
    x, more = tokens(layer, 2, 30), tokens(layer, 3, 12, seed=1)
    caches = [layer.new_cache(2, 30, offload=offload) for offload in (False, True)]
    outs = []
    with torch.no_grad():
        for cache in caches:
            layer.attend(x, cache=cache)
            cache.crop(26)
            cache.reorder(torch.tensor([1, 0, 1]))
            cache.grow(60)
            twin = copy.deepcopy(cache)
            outs.append(torch.cat([layer.attend(part, cache=twin).out for part in more.split(5, 1)], 1))
            assert cache.lengths.tolist() == [26] * 3
    assert_same(outs[1], outs[0])


def test_what_is_held_where_and_what_a_step_fetches() -> None:
    """Without the far chunks the device holds a key for a chunk and some last tokens, however long the context is."""
    layer = longheads(select="block")
    length, seen = 240, []
    cache = layer.new_cache(1, length, offload=True)
    kept = {name: x.shape[2] for name, x in cache.streams.items()}
    assert cache.offloaded_nbytes == 2 * length * 2 * 8 * 8
    near = (length // 4) * 4 + (3 + 128) * (2 + 4)
    assert cache.nbytes - cache.offloaded_nbytes == near * 8 * 8
    assert kept == {"k": length, "v": length, "chunk_key": length // 4, "key": 131, "query": 131}
    operate = attnzoo.AttentionLayer.operate

    def listening(self: Any, inputs: Any, plan: Any) -> Tensor:
        seen.append(inputs.k.shape[2])
        return operate(self, inputs, plan)

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(attnzoo.AttentionLayer, "operate", listening)
        x = tokens(layer, 1, length)
        layer.attend(x[:, :200], cache=cache)
        seen.clear()
        for t in range(200, length):
            layer.attend(x[:, t : t + 1], cache=cache)
    # Two query heads of a KV head choose one chunk each beside the three that all read.
    assert len(seen) == 40
    assert max(seen) <= 5 * 4


def test_an_offloaded_cache_refuses_gradients() -> None:
    layer = longheads()
    cache = layer.new_cache(1, 30, offload=True)
    with pytest.raises(attnzoo.UnsupportedError, match="cache: expected no gradients where keys and values"):
        layer.attend(tokens(layer, 1, 20), cache=cache)
    assert cache.lengths.tolist() == [0]
    with pytest.raises(TypeError, match="offload: expected a bool"):
        layer.new_cache(1, 30, offload=1)


def test_only_values_of_each_token_lie_in_cpu_memory() -> None:
    for options in ({"ring": 2}, {"every": 2}):
        with pytest.raises(ValueError, match="offloaded: expected False for a ring or a grouped stream"):
            Stream(1, 1, offloaded=True, **options)
    cache = KVCache({"k": Stream(1, 2, offloaded=True), "v": Stream(1, 2)}, batch=1, max_length=4)
    assert cache.offloaded_nbytes == cache.nbytes // 2
    meta = KVCache({"k": Stream(1, 2, offloaded=True), "v": Stream(1, 2)}, batch=1, max_length=4, device="meta")
    assert {x.device.type for x in meta.streams.values()} == {"meta"}


@pytest.mark.parametrize("variant", ["longheads", "landmark"])
def test_a_first_call_without_tokens_gives_none(variant: str) -> None:
    layer = attnzoo.create(attnzoo.get_config(variant).small()).eval()
    cache = layer.new_cache(2, 60, offload=True)
    with torch.no_grad():
        assert layer(torch.zeros(2, 0, layer.config.dim), cache=cache).shape == (2, 0, layer.config.dim)


@torch.no_grad()
def test_reads_from_cpu_memory_are_not_edited() -> None:
    layer = longheads(select="block")
    cache = layer.new_cache(1, 30, offload=True)
    x = torch.randn(1, 20, layer.config.dim, dtype=torch.float64)
    edit = heads.HeadEdit(0, 1, key_bias=heads.KeyBias.knock_out([19], [0]))
    with heads.edited(layer, edit), pytest.raises(UnsupportedError, match="use a cache without offload"):
        layer(x, cache=cache)
    assert cache.lengths.tolist() == [0]
    layer(x, cache=cache)
    assert cache.lengths.tolist() == [20]
