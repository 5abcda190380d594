"""LongHeads: the layer against its oracle, both against the published numbers, the threshold, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attnzoo
from attnzoo.oracles.longheads import Chunks, longheads
from attnzoo_kernels import block_sparse_attention_with_lse, merge_states
from tests.attnzoo.cases import assert_same, build, gradients, recipe_of, tokens

GOLDEN = sorted((Path(__file__).parents[2] / "golden").glob("longheads_*.npz"))

SMALL: dict[str, Any] = {"dim": 32, "num_heads": 4, "chunk_size": 4, "attention_length": 16}

CONFIGS: dict[str, dict[str, Any]] = {
    "as published": {},
    "grouped": {"num_kv_heads": 2},
    "grouped, choosing together": {"num_kv_heads": 2, "group_select": True},
    "mean keys": {"chunk_rep": "mean_key", "num_kv_heads": 1},
    "a later threshold, more slots": {"begin": 28, "attention_length": 20},
    "blocks": {"select": "block", "query_block": 2},
    "blocks of a whole chunk, mean keys, grouped": {
        "select": "block",
        "chunk_rep": "mean_key",
        "num_kv_heads": 2,
        "group_select": True,
    },
    "odd chunks, biases, a scale": {"chunk_size": 3, "attention_length": 12, "bias": True, "scale": 0.7},
    "chunks of one": {"chunk_size": 1, "attention_length": 5},
    "no rotation": {"rotary": None},
    "half rotated": {"rotary": attnzoo.RotaryConfig(dim=4, base=500.0)},
    "neighbours are planes": {"rotary": attnzoo.RotaryConfig(interleaved=True)},
    "published quirks": {"official_quirks": True, "num_kv_heads": 2},
}


def config_of(**options: Any) -> Any:
    return attnzoo.get_config("longheads")(**{**SMALL, **options})


def chunks_of(config: Any, prefilled: int | None = None) -> Chunks:
    return Chunks(
        size=config.chunk_size,
        slots=config.slots,
        begin=config.first,
        select=config.select,
        block_q=config.block_q,
        chunk_rep=config.chunk_rep,
        group_select=config.group_select,
        official_quirks=config.official_quirks,
        prefilled=prefilled,
    )


def oracle(layer: Any, x: Tensor, key_padding: Tensor | None = None, prefilled: int | None = None) -> Any:
    weights = dict(layer.named_parameters())
    chunks = chunks_of(layer.config, prefilled)
    return longheads(x, weights, recipe_of(layer.config), chunks, key_padding=key_padding)


def chosen(plan: Any, item: int, head: int, row: int) -> tuple[int, ...]:
    index = plan.info["chunks"]
    head = head * index.shape[1] // plan.heads
    return tuple(c for c in index[item if index.shape[0] > 1 else 0, head, row].tolist() if c >= 0)


QUICK = (
    "grouped, choosing together",
    "mean keys",
    "blocks",
    "odd chunks, biases, a scale",
    "neighbours are planes",
    "published quirks",
)
"""Each option once, with gradients; the others are slow."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CONFIGS]
)
def test_layer_is_its_oracle(name: str) -> None:
    layer = build(config_of(**CONFIGS[name]), dtype=torch.float64)
    length = 33
    key_padding = torch.zeros(3, length, dtype=torch.bool)
    key_padding[1, :22] = True  # this item stays below the threshold
    key_padding[2, [0, 4, 5, 21, 32]] = True
    x = tokens(layer, 3, length).requires_grad_()
    weight = tokens(layer, 3, length, seed=1)
    expected = oracle(layer, x, key_padding)
    result = layer.attend(x, key_padding=key_padding)
    assert_same(result.out, expected.out)
    for grad, same in zip(
        gradients(layer, x, result.out, weight).values(),
        gradients(layer, x, expected.out, weight).values(),
        strict=True,
    ):
        assert_same(grad, same)


@pytest.mark.parametrize("name", CONFIGS)
def test_layer_chooses_what_its_oracle_chooses(name: str) -> None:
    config = config_of(**CONFIGS[name])
    layer = build(config, dtype=torch.float64)
    x = tokens(layer, 1, 50)
    expected, plan = oracle(layer, x), layer.attend(x).plan
    for head in range(config.num_heads):
        for t in range(50):
            assert chosen(plan, 0, head, t // config.block_q) == expected.chunks[0][head][t]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_split_of_any_batch_is_the_oracle(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 5))
    slots = data.draw(st.integers(4, 5))
    select = data.draw(st.sampled_from(["token", "block"]))
    groups = data.draw(st.sampled_from([1, 2, 4]))
    config = config_of(
        chunk_size=size,
        attention_length=size * slots,
        begin=size * (slots + data.draw(st.integers(0, 2))),
        select=select,
        query_block=data.draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0])),
        chunk_rep=data.draw(st.sampled_from(["attention", "mean_key"])),
        num_kv_heads=groups,
        group_select=data.draw(st.booleans()),
    )
    layer = build(config, dtype=torch.float64)
    length = data.draw(st.integers(1, 36))
    batch = data.draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    share = data.draw(st.sampled_from([0.0, 0.2, 0.6]))
    key_padding = torch.rand(batch, length, generator=generator) < share if share else None
    x = tokens(layer, batch, length, seed=1)
    ends = sorted(data.draw(st.sets(st.integers(1, length), max_size=5)) | {length})
    cache = layer.new_cache(batch, length)
    with torch.no_grad():
        expected = oracle(layer, x, key_padding).out
        outs = [
            layer.attend(x[:, a:b], key_padding=None if key_padding is None else key_padding[:, a:b], cache=cache).out
            for a, b in pairwise([0, *ends])
        ]
    assert_same(torch.cat(outs, 1), expected)


def golden(path: Path, *, quirks: bool) -> tuple[dict[str, Any], Any, Any, Tensor]:
    """A published problem: its settings, the file, a layer with its weights, and the input ``[1, T, C]``."""
    file = np.load(path, allow_pickle=False)
    given = json.loads(str(file["config"]))
    config = config_of(
        dim=file["x"].shape[1],
        num_heads=given["num_heads"],
        chunk_size=given["window_size"],
        attention_length=given["atten_length"],
        begin=given["begin_selective_length"],
        official_quirks=quirks,
    )
    layer = attnzoo.create(config, dtype=torch.float64)
    layer.load_state_dict({name[2:]: torch.from_numpy(file[name]).double() for name in file if name.startswith("w.")})
    return given, file, layer, torch.from_numpy(file["x"]).double()[None]


def near(actual: Tensor, published: Any) -> None:
    assert float((actual.detach() - torch.from_numpy(published)).abs().max()) <= 1e-10


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_quirks_are_the_published_prefill(path: Path) -> None:
    given, file, layer, x = golden(path, quirks=True)
    result = layer.attend(x)
    near(result.out[0], file["out_prefill"])
    selected = torch.from_numpy(file["selected_prefill"]).long()
    chunks = result.plan.info["chunks"][0, :, given["begin_selective_length"] :]
    assert torch.equal(chunks[..., : selected.shape[2]], selected)
    assert (chunks[..., selected.shape[2] :] == -1).all()


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_quirks_are_the_published_decoding(path: Path) -> None:
    given, file, layer, x = golden(path, quirks=True)
    first = given["decode_prefill_length"]
    cache = layer.new_cache(1, x.shape[1])
    with torch.no_grad():
        layer.attend(x[:, :first], cache=cache)
        steps = [layer.attend(x[:, t : t + 1], cache=cache) for t in range(first, x.shape[1])]
    near(torch.cat([step.out[0] for step in steps]), file["out_decode"])
    selected = torch.from_numpy(file["selected_decode"]).long()
    chunks = torch.stack([step.plan.info["chunks"][0, :, 0] for step in steps], 1)
    assert torch.equal(chunks[..., : selected.shape[2]], selected)
    # The source drops the last, unfinished chunk's.
    keys = file["chunk_keys"]
    near(cache.groups("chunk_key")[0, :, : keys.shape[1]], keys)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_the_corrected_rule_is_the_published_one_where_it_is_right(path: Path) -> None:
    given, file, layer, x = golden(path, quirks=False)
    first, begin = given["decode_prefill_length"], given["begin_selective_length"]
    out = layer(x)[0]
    near(out[:begin], file["out_prefill"][:begin])
    right = file["decode_quirk"] == 0
    near(out[first:][torch.from_numpy(right)], file["out_decode"][right])
    wrong = (out[begin:] - torch.from_numpy(file["out_prefill"][begin:])).abs().amax(-1)
    assert (wrong > 1e-6).all()


def test_below_the_threshold_it_is_plain_attention_and_beyond_it_is_not() -> None:
    layer = build(config_of(begin=24), dtype=torch.float64)
    plain = build(attnzoo.get_config("mha")(dim=32, num_heads=4), dtype=torch.float64)
    x = tokens(layer, 2, 40)
    out, expected = layer(x), plain(x)
    assert torch.equal(layer(x[:, :24]), plain(x[:, :24]))
    assert_same(out[:, :24], expected[:, :24])
    assert ((out - expected)[:, 24:].abs().amax(-1) > 1e-4).all()
    cache = layer.new_cache(2, 40)
    with torch.no_grad():
        steps = torch.cat([layer.attend(x[:, t : t + 1], cache=cache).out for t in range(24)], 1)
    assert_same(steps, expected[:, :24])


@pytest.mark.parametrize("select", ["token", "block"])
def test_decoding_crosses_the_threshold_and_every_edge(select: Any) -> None:
    """A prompt of any length, below the threshold, at it, at a chunk's first and last token, and beyond."""
    layer = build(config_of(select=select, num_kv_heads=2), dtype=torch.float64)
    x = tokens(layer, 1, 30)
    with torch.no_grad():
        expected = layer(x)
        for prompt in (1, 3, 4, 11, 15, 16, 17, 19, 20, 23):
            cache = layer.new_cache(1, 30)
            outs = [layer.attend(x[:, :prompt], cache=cache).out]
            outs += [layer.attend(x[:, t : t + 1], cache=cache).out for t in range(prompt, 30)]
            assert_same(torch.cat(outs, 1), expected)


def test_items_on_both_sides_of_the_threshold_share_a_call() -> None:
    layer = build(config_of(num_kv_heads=2), dtype=torch.float64)
    rows = [tokens(layer, 1, length, seed=length) for length in (14, 33, 18, 4)]
    x = torch.full((4, 33, 32), torch.nan, dtype=torch.float64)
    key_padding = torch.ones(4, 33, dtype=torch.bool)
    for item, row in enumerate(rows):
        x[item, 33 - row.shape[1] :] = row[0]
        key_padding[item, 33 - row.shape[1] :] = False
    new = tokens(layer, 4, 8, seed=99)
    cache = layer.new_cache(4, 41)
    with torch.no_grad():
        layer.attend(x, key_padding=key_padding, cache=cache)
        outs = torch.cat([layer.attend(new[:, t : t + 1], cache=cache).out for t in range(8)], 1)
        for item, row in enumerate(rows):
            alone = layer(torch.cat([row, new[item : item + 1]], 1))
            assert_same(outs[item : item + 1], alone[:, row.shape[1] :])


@pytest.mark.parametrize("select", ["token", "block"])
def test_the_keys_read_by_a_step_are_bounded(select: Any) -> None:
    config = config_of(select=select)
    layer = build(config)
    x = tokens(layer, 1, 200)
    cache = layer.new_cache(1, 200)
    with torch.no_grad():
        layer.attend(x[:, :100], cache=cache)
        for t in range(100, 200):
            plan = layer.attend(x[:, t : t + 1], cache=cache).plan
            assert int(plan.layout.kv_rows().max()) <= config.attention_length
            read = plan.density * (t + 1)
            assert read == pytest.approx(config.attention_length - config.chunk_size + t % config.chunk_size + 1)


def test_equal_scores_choose_the_earliest_chunks() -> None:
    layer = build(config_of(), dtype=torch.float64)
    with torch.no_grad():
        layer.q_proj.weight.zero_()
    plan = layer.attend(tokens(layer, 1, 40)).plan
    assert all(chosen(plan, 0, h, 39) == (0, 1, 8, 9) for h in range(4))


def test_the_chunk_that_matches_is_read_however_far_it_is() -> None:
    """A token far back that only the right query asks for: with the chunk chosen, its value comes through."""
    config = config_of(dim=8, num_heads=1, chunk_size=4, rotary=None, scale=8.0, chunk_rep="mean_key")
    layer = attnzoo.create(config, dtype=torch.float64)
    with torch.no_grad():
        for projection in (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj):
            projection.weight.copy_(torch.eye(8))
    for needle in (5, 9, 22, 39):
        x = torch.zeros(1, 64, 8, dtype=torch.float64)
        x[0, :, 0] = 1
        x[0, needle], x[0, 63] = torch.eye(8, dtype=torch.float64)[[1, 1]]
        assert needle // 4 in chosen(layer.attend(x).plan, 0, 0, 63)
        assert float(layer(x).detach()[0, 63, 1]) > 0.9


def test_a_chunks_key_is_its_own_affair() -> None:
    layer = build(config_of(num_kv_heads=2), dtype=torch.float64)
    x = tokens(layer, 1, 40)
    changed = torch.cat([tokens(layer, 1, 12, seed=1), x[:, 12:16], tokens(layer, 1, 24, seed=2)], 1)
    keys = []
    for text in (x, changed):
        cache = layer.new_cache(1, 40)
        with torch.no_grad():
            layer.attend(text, cache=cache)
        keys.append(cache.groups("chunk_key"))
    assert_same(keys[0][:, :, 3], keys[1][:, :, 3])
    assert ((keys[0] - keys[1]).abs().amax((0, 1, 3)) > 1e-3).tolist() == [True] * 3 + [False] + [True] * 6


def test_no_position_beyond_the_attention_length_is_used() -> None:
    config = config_of(begin=24)
    layer = build(config, dtype=torch.float64)
    layout = layer.attend(tokens(layer, 1, 60)).plan.layout
    for row in range(24, 60):
        for head in range(4):
            begin = int(layout.start[0, head, row])
            places = slice(begin, begin + int(layout.count[0, head, row]))
            order = layout.col[places].argsort()
            assert layout.origin is not None
            assert layout.origin[places][order].tolist() == [0, 4, 8, 12]
            assert int(layout.col[places][order][-1]) == row // 4


def test_a_longer_query_chooses_the_same() -> None:
    layer = build(config_of(num_kv_heads=2), dtype=torch.float64)
    x = tokens(layer, 1, 40)
    step = layer.begin(x, None, None, None, None)
    heads = layer.project(step)
    inputs = layer.remember(step, heads)
    plan = layer.plan(step, heads, inputs)
    assert inputs.candidates is not None
    candidates = replace(inputs.candidates, queries=7 * inputs.candidates.queries)
    longer = layer.plan(step, heads, replace(inputs, candidates=candidates))
    assert torch.equal(plan.info["chunks"], longer.info["chunks"])


def test_slots_apart_and_merged_are_one_call() -> None:
    """Each chosen chunk by a call of its own, at its slot's origin, merged by the log-sum-exp."""
    layer = build(config_of(), dtype=torch.float64)
    x = tokens(layer, 1, 40)
    step = layer.begin(x, None, None, None, None)
    inputs = layer.remember(step, layer.project(step))
    plan = layer.plan(step, layer.project(step), inputs)
    chunks, outs, lses = plan.info["chunks"][..., 24:, :], [], []
    q = inputs.q[:, :, 24:]
    for slot in range(4):
        index = chunks[..., slot : slot + 1]
        layout = attnzoo.BlockLayout.from_indices(index, 1, 4, 16, 40, torch.full_like(index, 4 * slot))
        out, lse = block_sparse_attention_with_lse(q, inputs.k, inputs.v, layout, extras=plan.extras)
        outs.append(out)
        lses.append(lse)
    merged, _ = merge_states(torch.stack(outs), torch.stack(lses))
    assert_same(merged, layer.operate(inputs, plan)[:, :, 24:])


def test_a_longer_context_does_not_change_what_the_first_rows_choose() -> None:
    layer = build(config_of(num_kv_heads=2))
    x = tokens(layer, 1, 80)
    long, short = (layer.attend(x[:, :length]).plan.info["chunks"] for length in (80, 41))
    assert torch.equal(long[:, :, :41], short)


def test_positions_turn_queries_and_keys_and_choose_nothing() -> None:
    layer = build(config_of(), dtype=torch.float64)
    x = tokens(layer, 1, 40)
    plain, stretched = layer.attend(x), layer.attend(x, positions=3 * torch.arange(40))
    assert torch.equal(plain.plan.info["chunks"], stretched.plan.info["chunks"])
    assert not torch.allclose(plain.out, stretched.out, atol=1e-4)
    cache = layer.new_cache(1, 40)
    with torch.no_grad():
        outs = [layer.attend(x[:, t : t + 1], positions=torch.tensor([3 * t]), cache=cache).out for t in range(40)]
    assert_same(torch.cat(outs, 1), stretched.out)


def test_a_factor_on_the_rotation_counts_once_on_each_side() -> None:
    """The attention factor of YaRN multiplies scores by its square, at every slot."""
    scaling = attnzoo.RotaryScaling(kind="yarn", factor=4.0, original_max_position_embeddings=64)
    layer = build(config_of(rotary=attnzoo.RotaryConfig(scaling=scaling)), dtype=torch.float64)
    plain = build(
        attnzoo.get_config("mha")(dim=32, num_heads=4, rotary=attnzoo.RotaryConfig(scaling=scaling)),
        dtype=torch.float64,
    )
    x = tokens(layer, 1, 16)
    cache = layer.new_cache(1, 40)
    with torch.no_grad():
        assert_same(layer.attend(x, cache=cache).out, plain(x))
        # All four chunks lie side by side already, so that the slots are where they are.
        more = tokens(layer, 1, 1, seed=1)
        everything = layer.attend(more, cache=cache)
        again = build(config_of(rotary=attnzoo.RotaryConfig(scaling=scaling), begin=20), dtype=torch.float64)
        assert_same(again(torch.cat([x, more], 1))[:, 16:], plain(torch.cat([x, more], 1))[:, 16:])
        assert everything.out.isfinite().all()


def test_no_gradient_goes_through_a_choice() -> None:
    layer = build(config_of(), dtype=torch.float64)
    x = tokens(layer, 1, 40)
    inputs = layer.remember(step := layer.begin(x, None, None, None, None), layer.project(step))
    assert inputs.q.requires_grad
    assert inputs.candidates is not None
    assert not inputs.candidates.keys.requires_grad
    assert not inputs.candidates.queries.requires_grad


def test_a_gradient_reaches_chosen_chunks_alone() -> None:
    layer = build(config_of(num_heads=1, dim=8), dtype=torch.float64)
    x = tokens(layer, 1, 40).requires_grad_()
    result = layer.attend(x)
    (grad,) = torch.autograd.grad(result.out[:, 39].square().sum(), x)
    read = set(chosen(result.plan, 0, 0, 39))
    assert len(read) == 4
    for chunk in range(10):
        touched = bool((grad[0, 4 * chunk : 4 * chunk + 4] != 0).any())
        assert touched is (chunk in read)


def test_the_cache_holds_a_key_for_a_chunk_and_the_last_tokens() -> None:
    layer = attnzoo.create("longheads", dim=64, num_heads=4, num_kv_heads=2, chunk_size=16, attention_length=64)
    cache = layer.new_cache(1, 4096)
    assert cache.bytes_per_token == 4 * (2 * 2 * 16 + 4 * 16 // 16)
    assert {name: x.shape[2] for name, x in cache.streams.items()} == {
        "k": 4096,
        "v": 4096,
        "chunk_key": 256,
        "key": 15 + 128,
        "query": 15 + 128,
    }


def test_queries_that_something_else_has_rotated_are_refused_where_they_would_choose() -> None:
    layer = build(config_of())
    q = torch.randn(1, 4, 20, 8)
    inputs = attnzoo.base.layer.AttentionInputs(q, q, q)
    with pytest.raises(attnzoo.UnsupportedError, match="plan_for: longheads chooses by queries"):
        layer.plan_for(inputs, offset=0)
    short = attnzoo.base.layer.AttentionInputs(*3 * [q[:, :, :16]])
    assert layer.plan_for(short, offset=0).density == 1


def test_another_sequence_is_refused() -> None:
    layer = build(config_of())
    with pytest.raises(attnzoo.UnsupportedError, match="context: longheads chooses chunks of its own sequence"):
        layer.attend(tokens(layer, 1, 5), context=tokens(layer, 1, 5))


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"chunk_size": 0}, "chunk_size"),
        ({"chunk_size": 4.0}, "chunk_size"),
        ({"attention_length": 18}, "attention_length"),
        ({"attention_length": 12}, "attention_length"),
        ({"attention_length": True}, "attention_length"),
        ({"begin": 12}, "begin"),
        ({"begin": 18}, "begin"),
        ({"begin": 0}, "begin"),
        ({"select": "chunk"}, "select"),
        ({"query_block": 3, "select": "block"}, "query_block"),
        ({"query_block": 0}, "query_block"),
        ({"chunk_rep": "mean"}, "chunk_rep"),
        ({"group_select": 1}, "group_select"),
        ({"official_quirks": None}, "official_quirks"),
        ({"official_quirks": True, "select": "block"}, "select"),
        ({"causal": False}, "causal"),
    ],
)
def test_a_bad_option_is_refused_by_name(options: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: expected .*got "):
        config_of(**options)


@pytest.mark.slow
@pytest.mark.parametrize("select", ["token", "block"])
def test_compiled_calls_with_a_cache_and_padding_are_eager_ones(select: Any) -> None:
    layer = build(config_of(select=select, num_kv_heads=2))
    x = tokens(layer, 2, 40)
    key_padding = torch.arange(30) < torch.tensor([[0], [13]])
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        outs = []
        for call in (layer, compiled):
            cache = layer.new_cache(2, 40)
            parts = [call(x[:, :30], key_padding=key_padding, cache=cache)]
            parts += [call(part, cache=cache) for part in x[:, 30:].split(5, 1)]
            outs.append(torch.cat(parts, 1))
    assert_same(outs[1], outs[0])
