"""Plain attention: the layer against its oracle, its window and sink, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import attnzoo
from attnzoo.oracles.mha import mha
from tests.attnzoo.cases import assert_same, build, gradients, recipe_of, tokens

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"num_kv_heads": 2},
    "one key head, biases": {"num_kv_heads": 1, "bias": True},
    "six heads over three, wide": {"num_heads": 6, "num_kv_heads": 3, "head_dim": 10},
    "no positions": {"rotary": None},
    "neighbours, part of the head": {"rotary": attnzoo.RotaryConfig(base=100.0, dim=4, interleaved=True)},
    "halves, part of the head": {"rotary": attnzoo.RotaryConfig(dim=2)},
    "own scale": {"scale": 0.7},
    "no scale at all": {"scale": 0.0},
    "window": {"window": 5, "block_size": 4},
    "window of one": {"window": 1},
    "window and sink": {"window": 6, "sink": 3, "block_size": 8, "num_kv_heads": 2},
    "blocks wider than the sequence": {"window": 7, "sink": 1, "block_size": 256},
    "blocks of one": {"window": 3, "sink": 2, "block_size": 1},
    "both directions": {"causal": False},
    "both directions, window and sink": {"causal": False, "window": 4, "sink": 2, "block_size": 4},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_layer_is_its_oracle(name: str) -> None:
    options = CONFIGS[name]
    config = attnzoo.get_config("mha")(**{"dim": 32, "num_heads": 4, **options})
    layer = build(config, dtype=torch.float64)
    key_padding = torch.zeros(3, 23, dtype=torch.bool)
    key_padding[1, :9] = True
    key_padding[2, [0, 4, 5, 21, 22]] = True
    x = tokens(layer, 3, 23).requires_grad_()
    weight = tokens(layer, 3, 23, seed=1)
    expected = mha(
        x,
        dict(layer.named_parameters()),
        recipe_of(config),
        window=config.window,
        sink=config.sink,
        key_padding=key_padding,
    )
    out = layer.attend(x, key_padding=key_padding).out
    assert_same(out, expected)
    for grad, same in zip(
        gradients(layer, x, out, weight).values(), gradients(layer, x, expected, weight).values(), strict=True
    ):
        assert_same(grad, same)


def test_given_positions_turn_and_do_not_hide() -> None:
    config = attnzoo.get_config("mha")(dim=32, num_heads=4, window=5)
    layer = build(config, dtype=torch.float64)
    x = tokens(layer, 2, 15)
    positions = torch.stack([torch.arange(15).flip(0), 1000 * torch.arange(15)])
    expected = mha(x, layer.state_dict(), recipe_of(config), window=5, positions=positions)
    assert_same(layer.attend(x, positions=positions).out, expected)


def test_a_window_sees_itself_and_what_is_just_before() -> None:
    layer = build(attnzoo.get_config("mha")(dim=32, num_heads=4, window=4, sink=2, rotary=None), dtype=torch.float64)
    x = tokens(layer, 1, 12)
    before = layer(x)
    for changed in range(12):
        y = x.clone()
        y[0, changed] += 1
        moved = (layer(y) != before).any(-1)[0]
        expected = [t for t in range(changed, 12) if t - changed < 4 or changed < 2]
        assert moved.nonzero().flatten().tolist() == expected


def test_a_window_as_long_as_the_sequence_is_none() -> None:
    layer = build(attnzoo.get_config("mha")(dim=32, num_heads=4, window=33))
    plain = build(attnzoo.get_config("mha")(dim=32, num_heads=4))
    x = tokens(layer, 2, 33)
    assert_same(layer(x), plain(x))
    assert layer.attend(x).plan.density == 1


def test_a_context_is_read_instead_of_the_tokens() -> None:
    layer = build(attnzoo.get_config("mha")(dim=32, num_heads=4, num_kv_heads=2), dtype=torch.float64)
    x, context = tokens(layer, 2, 9), tokens(layer, 2, 21, seed=1)
    key_padding = torch.zeros(2, 21, dtype=torch.bool)
    key_padding[1, 13:] = True
    key_padding[0, [0, 7]] = True
    context[key_padding] = torch.nan
    q, k, v = (
        projection(source.nan_to_num()).unflatten(-1, (-1, 8)).transpose(1, 2)
        for projection, source in ((layer.q_proj, x), (layer.k_proj, context), (layer.v_proj, context))
    )
    out = scaled_dot_product_attention(q, k, v, attn_mask=~key_padding[:, None, None], enable_gqa=True)
    expected = layer.o_proj(out.transpose(1, 2).flatten(2))
    read = layer.attend(x, context=context, key_padding=key_padding).out
    assert_same(read, expected)
    for grads in zip(
        *(torch.autograd.grad(y.square().sum(), layer.parameters()) for y in (read, expected)), strict=True
    ):
        assert_same(*grads)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("window", 0),
        ("window", 2.0),
        ("window", True),
        ("sink", -1),
        ("sink", 1.0),
        ("sink", None),
        ("block_size", 0),
        ("block_size", 16.0),
        ("block_size", True),
    ],
)
def test_a_bad_option_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field}: expected"):
        attnzoo.create("mha", dim=32, num_heads=4, **{"window": 8, field: value})
