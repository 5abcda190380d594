"""S2 attention: the layer against its oracle, both against the published masks, coverage, and what it refuses."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attnzoo
from attnzoo.base.shared_layouts import dense_layout
from attnzoo.oracles.mha import Recipe
from attnzoo.oracles.s2 import S2Pattern, block_mask, reads, s2
from tests.attnzoo.cases import assert_same, build, gradients, recipe_of, tokens

GOLDEN = sorted((Path(__file__).parents[2] / "golden").glob("s2_mask_*.npz"))
CAUSAL = [path for path in GOLDEN if "bidirectional" not in path.stem]
# A chunk is a slice of the sequence, without what came before; a layer always has its whole past.
WHOLE = [path for path in CAUSAL if "chunk" not in path.stem]

CONFIGS: dict[str, dict[str, Any]] = {
    "a shard for each head": {"block_size": 4, "local_blocks": 2, "vert_stride": 4},
    "one local block, offset": {"block_size": 4, "local_blocks": 1, "vert_stride": 5, "head_offset": 3},
    "grouped, last head dense": {
        "block_size": 4,
        "local_blocks": 1,
        "vert_stride": 3,
        "num_kv_heads": 2,
        "num_dense_heads": 1,
    },
    "grouped, spread evenly": {"block_size": 4, "local_blocks": 1, "vert_stride": 4, "num_kv_heads": 2},
    "grouped, three heads spread evenly beside a dense one": {
        "dim": 64,
        "num_heads": 8,
        "num_kv_heads": 4,
        "block_size": 4,
        "local_blocks": 1,
        "vert_stride": 7,
        "num_dense_heads": 1,
    },
    "grouped, own step, sink": {
        "block_size": 8,
        "local_blocks": 1,
        "vert_stride": 4,
        "num_kv_heads": 2,
        "step": 3,
        "sink_blocks": 1,
    },
    "published step": {"block_size": 4, "local_blocks": 1, "vert_stride": 8, "num_kv_heads": 2, "step": "dkernel"},
    "step of zero": {"block_size": 4, "local_blocks": 2, "vert_stride": 3, "step": 0},
    "the same for all heads": {"block_size": 4, "local_blocks": 2, "vert_stride": 4, "homogeneous": True},
    "blocks of one": {"block_size": 1, "local_blocks": 3, "vert_stride": 4},
    "odd blocks, biases": {"block_size": 7, "local_blocks": 1, "vert_stride": 4, "bias": True},
    "both directions": {"block_size": 4, "local_blocks": 2, "vert_stride": 3, "causal": False, "num_kv_heads": 2},
    "both directions, further back, last head dense, sink": {
        "block_size": 4,
        "local_blocks": (3, 1),
        "vert_stride": 4,
        "causal": False,
        "num_dense_heads": 1,
        "sink_blocks": 1,
    },
    "stride longer than the sequence": {"block_size": 4, "local_blocks": 1, "vert_stride": 100},
}


def config_of(**options: Any) -> Any:
    return attnzoo.get_config("s2")(**{"dim": 32, "num_heads": 4, **options})


def layer_of(config: Any, dtype: torch.dtype = torch.float64) -> Any:
    return build(config, dtype=dtype)


def pattern_of(config: Any) -> S2Pattern:
    return S2Pattern(
        block_size=config.block_size,
        local_blocks=config.local_blocks,
        vert_stride=config.vert_stride,
        head_offset=config.head_offset,
        step=config.step,
        num_dense_heads=config.num_dense_heads,
        sink_blocks=config.sink_blocks,
        homogeneous=config.homogeneous,
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_layer_is_its_oracle(name: str) -> None:
    config = config_of(**CONFIGS[name])
    layer = layer_of(config)
    length = 45
    key_padding = torch.zeros(3, length, dtype=torch.bool)
    key_padding[1, :9] = True
    key_padding[2, [0, 4, 5, 21, 44]] = True
    x = tokens(layer, 3, length).requires_grad_()
    weight = tokens(layer, 3, length, seed=1)
    weights = dict(layer.named_parameters())
    expected = s2(x, weights, recipe_of(config), pattern_of(config), key_padding=key_padding)
    out = layer.attend(x, key_padding=key_padding).out
    assert_same(out, expected)
    for grad, same in zip(
        gradients(layer, x, out, weight).values(), gradients(layer, x, expected, weight).values(), strict=True
    ):
        assert_same(grad, same)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_layer_reads_what_the_formula_says(data: st.DataObject) -> None:
    groups = data.draw(st.sampled_from([1, 2, 3, 4, 6]))
    heads = groups * data.draw(st.integers(1, 2))
    config = config_of(
        dim=2 * heads,
        num_heads=heads,
        num_kv_heads=groups,
        block_size=data.draw(st.integers(1, 5)),
        local_blocks=data.draw(st.integers(1, 4)),
        vert_stride=data.draw(st.integers(1, 9)),
        head_offset=data.draw(st.integers(0, 9)),
        step=data.draw(st.none() | st.sampled_from(["dkernel", 1, 2, 5])),
        num_dense_heads=data.draw(st.integers(0, groups)),
        sink_blocks=data.draw(st.integers(0, 2)),
        rotary=None,
    )
    length = data.draw(st.integers(1, 40))
    layer = layer_of(config, torch.float32)
    plan = layer.attend(tokens(layer, 1, length)).plan
    pattern, recipe, size = pattern_of(config), recipe_of(config), config.block_size
    visible = sum(
        reads(pattern, n, t // size, s // size, recipe)
        for n in range(groups)
        for t in range(length)
        for s in range(t + 1)
    )
    assert plan.density == pytest.approx(visible / (groups * length * (length + 1) / 2))
    assert torch.equal(layout_mask(plan, groups), block_mask(pattern, recipe, *2 * [range(-(-length // size))]))


def layout_mask(plan: Any, groups: int) -> Tensor:
    """What a layout keeps of the causal grid, bool ``[G, M, N]``."""
    mask = plan.layout.to_mask()[0]
    mask = mask.tril(mask.shape[2] - mask.shape[1])
    return mask.expand(groups, -1, -1) if mask.shape[0] == 1 else mask[:: mask.shape[0] // groups]


def golden(path: Path) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """A published mask: its settings, the same under our names, and the file."""
    file = np.load(path, allow_pickle=False)
    config = json.loads(str(file["config"]))
    given = config["arguments"]
    local = given["local_blocks"]
    pattern = {
        "block_size": given["block_size"],
        "local_blocks": local if isinstance(local, int) else tuple(local),
        "vert_stride": given["vert_stride"],
        "head_offset": given.get("head_sliding_offset", 0),
        "step": given.get("head_sliding_step", "dkernel"),
        "num_dense_heads": given.get("num_dense_heads", 0),
        "homogeneous": given.get("homo_head", False),
    }
    return given, pattern, file


def golden_recipe(given: dict[str, Any]) -> Recipe:
    groups = given.get("num_kv_heads", given["num_heads"])
    return Recipe(num_heads=given["num_heads"], num_kv_heads=groups, head_dim=2, causal=given.get("causal", True))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_oracle_is_the_published_mask(path: Path) -> None:
    given, options, file = golden(path)
    recipe, size = golden_recipe(given), given["block_size"]
    first = given.get("q_start_position", given.get("past_len", 0))
    last = given["seqlen"] + given.get("q_start_position", 0)
    keys_first = given.get("kv_start_position", 0)
    keys_last = keys_first + given.get("kv_seqlen", given["seqlen"])
    blocks = range(first // size, -(-last // size)), range(keys_first // size, -(-keys_last // size))
    mask = block_mask(S2Pattern(**options), recipe, *blocks)
    published = torch.from_numpy(file["block_mask"]).bool()
    published = published if published.shape[0] == 1 else published[:: recipe.num_heads // recipe.num_kv_heads]
    if path.stem == "s2_mask_official_bug_past100_w64":
        # The published blocks begin one too late where the past ends inside a block.
        assert mask.shape[1] == published.shape[1] + 1
        mask = mask[:, 1:]
    assert torch.equal(mask, published.expand_as(mask))


@pytest.mark.parametrize("path", WHOLE, ids=lambda path: path.stem)
def test_layer_reads_the_published_mask(path: Path) -> None:
    given, options, file = golden(path)
    heads, groups = given["num_heads"], given.get("num_kv_heads", given["num_heads"])
    layer = layer_of(config_of(dim=2 * heads, num_heads=heads, num_kv_heads=groups, **options), torch.float32)
    x = tokens(layer, 1, given["seqlen"])
    past = given.get("past_len", 0)
    cache = layer.new_cache(1, given["seqlen"])
    with torch.no_grad():
        if past:
            layer.attend(x[:, :past], cache=cache)
        plan = layer.attend(x[:, past:], cache=cache).plan
    published = torch.from_numpy(file["block_mask"]).bool()
    mask = layout_mask(plan, groups)
    if path.stem == "s2_mask_official_bug_past100_w64":
        assert mask.shape[1] == published.shape[1] + 1
        mask = mask[:, 1:]
    published = published if published.shape[0] == 1 else published[:: heads // groups]
    assert torch.equal(mask, published.expand_as(mask))


@pytest.mark.parametrize("path", [p for p in CAUSAL if "element" in p.stem or "past" in p.stem], ids=lambda p: p.stem)
def test_formula_reads_the_published_tokens(path: Path) -> None:
    given, options, file = golden(path)
    packed, shape = file["element_mask_packed"], file["element_mask_shape"]
    published = torch.from_numpy(np.unpackbits(packed, axis=-1)[..., : shape[-1]]).bool()
    recipe, size = golden_recipe(given), given["block_size"]
    past = given.get("past_len", given.get("q_start_position", 0))
    pattern = S2Pattern(**options)
    tokens_read = torch.tensor(
        [
            [
                [s <= t and reads(pattern, n, t // size, s // size, recipe) for s in range(shape[2])]
                for t in range(past, past + shape[1])
            ]
            for n in range(recipe.num_kv_heads)
        ]
    )
    # One file records an error of the source: causality counted from the slice's start.
    assert torch.equal(tokens_read, published) is (path.stem != "s2_mask_official_bug_chunk_element_q192")


@pytest.mark.parametrize("limit", [{"vert_stride": 1}, {"local_blocks": 10}, {"num_dense_heads": 4}])
def test_a_pattern_that_reads_everything_is_plain_attention(limit: dict[str, int]) -> None:
    config = config_of(block_size=8, **{"local_blocks": 1, "vert_stride": 4, **limit})
    layer = layer_of(config)
    plain = build(attnzoo.get_config("mha")(dim=32, num_heads=4), dtype=torch.float64)
    x = tokens(layer, 2, 75)
    assert_same(layer(x), plain(x))
    assert layer.attend(x).plan.density == 1
    assert layer_of(replace(config, vert_stride=4, local_blocks=1, num_dense_heads=0)).attend(x).plan.density < 1


@settings(max_examples=50, deadline=None)
@given(
    groups=st.integers(1, 8),
    stride=st.integers(1, 12),
    offset=st.integers(0, 12),
    step=st.sampled_from([None, "dkernel", 0, 1, 2, 5]),
    homogeneous=st.booleans(),
)
def test_coverage_is_the_share_of_far_blocks_that_somebody_reads(
    groups: int, stride: int, offset: int, step: Any, homogeneous: bool
) -> None:
    config = config_of(
        dim=4 * groups,
        num_heads=2 * groups,
        num_kv_heads=groups,
        local_blocks=1,
        vert_stride=stride,
        head_offset=offset,
        step=step,
        homogeneous=homogeneous,
    )
    mask = block_mask(pattern_of(config), recipe_of(config), range(2 * stride, 2 * stride + 1), range(stride))
    assert config.coverage == pytest.approx(float(mask.any(0).float().mean()))


def test_a_pattern_that_leaves_blocks_unread_is_warned_about() -> None:
    with pytest.warns(UserWarning, match=r"(?i)block"):
        attnzoo.create("s2", dim=32, num_heads=4, num_kv_heads=2, vert_stride=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attnzoo.create("s2", dim=64, num_heads=8, vert_stride=8)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_pattern_survives_json(name: str) -> None:
    config = config_of(**CONFIGS[name])
    assert attnzoo.AttentionConfig.from_json(config.to_json()) == config


def test_a_block_once_dropped_is_never_read_again() -> None:
    config = config_of(block_size=2, local_blocks=2, vert_stride=5, num_dense_heads=1, sink_blocks=1)
    layer = layer_of(config, torch.float32)
    mask = layout_mask(layer.attend(tokens(layer, 1, 60)).plan, 4)
    for block in range(mask.shape[2]):
        later = mask[:, block:, block].int()
        assert (later.diff(dim=1) <= 0).all()


def test_blocks_that_nobody_reads_get_no_gradient() -> None:
    config = config_of(block_size=8, local_blocks=1, vert_stride=100, head_offset=1, rotary=None)
    layer = layer_of(config)
    x = tokens(layer, 1, 64).requires_grad_()
    (grad,) = torch.autograd.grad(layer(x)[:, 40:].square().sum(), x)
    assert (grad[:, :40] == 0).all()
    assert (grad[:, 40:] != 0).all()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_size", 0),
        ("block_size", 16.0),
        ("block_size", True),
        ("local_blocks", 0),
        ("local_blocks", -1),
        ("vert_stride", 0),
        ("vert_stride", 2.5),
        ("head_offset", -1),
        ("head_offset", 0.5),
        ("step", -1),
        ("step", "even"),
        ("step", 1.5),
        ("num_dense_heads", 5),
        ("num_dense_heads", -1),
        ("sink_blocks", -1),
        ("sink_blocks", 1.0),
        ("homogeneous", 1),
    ],
)
def test_a_bad_option_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field}: expected"):
        attnzoo.create("s2", dim=32, num_heads=4, **{field: value})


def test_a_call_in_which_nothing_is_far_has_the_layout_of_all_blocks() -> None:
    layer = attnzoo.create("s2", dim=16, num_heads=4, block_size=4, local_blocks=3, vert_stride=4)
    x = torch.randn(1, 13, 16)
    with torch.no_grad():
        for count, shares in ((12, True), (13, False)):
            plan = layer.attend(x[:, :count]).plan
            assert (plan.layout is dense_layout(4, count, count, x)) is shares
