"""Low-rank grouped attention: both forms against the oracle, the cache they need, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnzoo
from attnzoo.oracles.lowrank_gqa import lowrank_gqa
from tests.attnzoo.cases import assert_same, build, gradients, recipe_of, tokens

CONFIGS: dict[str, dict[str, Any]] = {
    "plain, as many key heads as the default": {},
    "plain, one key head": {"num_kv_heads": 1, "bias": True},
    "plain, as many key heads as heads": {"num_kv_heads": 4},
    "latent": {"latent_dim": 12},
    "latent, grouped, biases": {"latent_dim": 7, "num_kv_heads": 2, "bias": True},
    "latent, all heads": {"latent_dim": 5, "num_kv_heads": 4},
    "latent, neighbours, part of the head": {
        "latent_dim": 16,
        "rotary": attnzoo.RotaryConfig(base=100.0, dim=4, interleaved=True),
    },
    "latent, no positions, own scale": {"latent_dim": 16, "rotary": None, "scale": 0.7},
    "latent, both directions": {"latent_dim": 12, "causal": False},
    "latent as wide as what it makes": {"latent_dim": 64, "num_kv_heads": 4},
}


def config_of(**options: Any) -> Any:
    return attnzoo.get_config("lowrank_gqa")(**{"dim": 32, "num_heads": 4, **options})


@pytest.mark.parametrize("name", CONFIGS)
def test_layer_is_its_oracle(name: str) -> None:
    config = config_of(**CONFIGS[name])
    layer = build(config, dtype=torch.float64)
    key_padding = torch.zeros(3, 23, dtype=torch.bool)
    key_padding[1, :9] = True
    key_padding[2, [0, 4, 5, 21, 22]] = True
    x = tokens(layer, 3, 23).requires_grad_()
    weight = tokens(layer, 3, 23, seed=1)
    expected = lowrank_gqa(x, dict(layer.named_parameters()), recipe_of(config), key_padding=key_padding)
    out = layer.attend(x, key_padding=key_padding).out
    assert_same(out, expected)
    for grad, same in zip(
        gradients(layer, x, out, weight).values(), gradients(layer, x, expected, weight).values(), strict=True
    ):
        assert_same(grad, same)


@pytest.mark.parametrize("latent_dim", [None, 12])
def test_given_positions_turn_the_keys(latent_dim: int | None) -> None:
    config = config_of(latent_dim=latent_dim)
    layer = build(config, dtype=torch.float64)
    x = tokens(layer, 2, 15)
    positions = torch.stack([torch.arange(15).flip(0), 100 * torch.arange(15)])
    expected = lowrank_gqa(x, layer.state_dict(), recipe_of(config), positions=positions)
    assert_same(layer.attend(x, positions=positions).out, expected)
    cache = layer.new_cache(2, 15)
    parts = [layer.attend(x[:, [t]], positions=positions[:, [t]], cache=cache).out for t in range(15)]
    assert_same(torch.cat(parts, 1), expected)


def test_the_default_has_half_as_many_key_heads() -> None:
    assert [config_of(num_heads=heads, dim=8 * heads).kv_heads for heads in (1, 2, 4, 6, 8)] == [1, 1, 2, 3, 4]


def test_the_latent_is_all_that_is_remembered() -> None:
    plain, latent = (build(config_of(num_kv_heads=4, latent_dim=width)) for width in (None, 12))
    caches = [layer.new_cache(2, 10) for layer in (plain, latent)]
    held = [sum(stream.shape[1] * stream.shape[3] for stream in cache.streams.values()) for cache in caches]
    # Beside the latent, the token's position: the keys are turned when they are read.
    assert held[0] == 4 * 16
    assert held[1] in (12, 13)
    assert latent.state_dict()["kv_down.weight"].shape == (12, 32)
    assert latent.state_dict()["kv_up.weight"].shape == (4 * 16, 12)
    assert "k_proj.weight" not in latent.state_dict()


def test_a_full_latent_is_plain_attention() -> None:
    """With kv_up the identity and kv_down the two projections, the latent form is the plain one."""
    plain, latent = (build(config_of(num_kv_heads=2, latent_dim=width), dtype=torch.float64) for width in (None, 32))
    weights = plain.state_dict()
    latent.load_state_dict(
        {
            "q_proj.weight": weights["q_proj.weight"],
            "o_proj.weight": weights["o_proj.weight"],
            "kv_down.weight": torch.cat([weights["k_proj.weight"], weights["v_proj.weight"]]),
            "kv_up.weight": torch.eye(32, dtype=torch.float64),
        },
        strict=True,
    )
    x = tokens(plain, 2, 70)
    assert_same(latent(x), plain(x))


@pytest.mark.parametrize(
    ("field", "value"),
    [("latent_dim", 0), ("latent_dim", 4.0), ("latent_dim", True), ("num_kv_heads", 3), ("latent_dim", "all")],
)
def test_a_bad_option_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field}: expected"):
        config_of(**{field: value})
