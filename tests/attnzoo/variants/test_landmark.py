"""Landmark attention: the layer against its oracle, and what the grouped softmax is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attnzoo
from attnzoo.base.steps import AttentionInputs
from attnzoo.oracles.landmark import Landmarks, landmark
from tests.attnzoo.cases import assert_same, build, gradients, recipe_of, tokens

CONFIGS: dict[str, dict[str, Any]] = {
    "soft": {"block_size": 8, "mode": "soft"},
    "soft, grouped, half a gate": {"block_size": 5, "mode": "soft", "num_kv_heads": 2, "gate_mix": 0.5},
    "soft, landmarks without positions, biases": {
        "block_size": 6,
        "mode": "soft",
        "landmark_positions": False,
        "bias": True,
    },
    "soft, blocks of two": {"block_size": 2, "mode": "soft", "num_kv_heads": 1},
    "top 1": {"block_size": 4, "mode": "topk", "top_k": 1},
    "top 2, grouped, half a gate": {
        "block_size": 5,
        "mode": "topk",
        "top_k": 2,
        "num_kv_heads": 2,
        "gate_mix": 0.5,
    },
    "top 3, landmarks without positions": {
        "block_size": 4,
        "mode": "topk",
        "top_k": 3,
        "landmark_positions": False,
        "scale": 0.7,
    },
    "top 2, no rotation, biases": {"block_size": 3, "mode": "topk", "top_k": 2, "rotary": None, "bias": True},
    "top 2, neighbours rotated, half of the head": {
        "block_size": 4,
        "mode": "topk",
        "top_k": 2,
        "num_kv_heads": 1,
        "rotary": attnzoo.RotaryConfig(base=100.0, dim=4, interleaved=True),
    },
    "top 2, blocks of two, negative scale": {"block_size": 2, "mode": "topk", "top_k": 2, "scale": -0.4},
    "more than there are": {"block_size": 8, "mode": "topk", "top_k": 9},
}


def config_of(**options: Any) -> Any:
    return attnzoo.get_config("landmark")(**{"dim": 32, "num_heads": 4, **options})


def layer_of(dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    return build(config_of(**options), dtype=dtype)


def landmarks_of(config: Any, **changes: Any) -> Landmarks:
    return Landmarks(
        **{
            "block": config.block_size,
            "mode": config.mode,
            "top_k": config.top_k,
            "gate_mix": config.gate_mix,
            **changes,
        }
    )


def default_positions(config: Any, key_padding: Tensor) -> Tensor:
    """Where the oracle is told each real token lies, if landmarks take no position."""
    index = (~key_padding).long().cumsum(1) - 1
    return index if config.landmark_positions else (index - (index + 1) // config.block_size).clamp(min=0)


def blocks_of(plan: Any, item: int, head: int, row: int) -> tuple[int, ...]:
    return tuple(int(b) for b in plan.info["blocks"][item, head, row] if b >= 0)


QUICK = (
    "soft",
    "soft, grouped, half a gate",
    "top 2, grouped, half a gate",
    "top 3, landmarks without positions",
    "top 2, neighbours rotated, half of the head",
)
"""Each option once; the others are slow."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CONFIGS]
)
def test_layer_is_its_oracle(name: str) -> None:
    config = config_of(**CONFIGS[name])
    layer = build(config, dtype=torch.float64)
    length = 29
    key_padding = torch.zeros(3, length, dtype=torch.bool)
    key_padding[1, :9] = True
    key_padding[2, [0, 4, 5, 21, 28]] = True
    x = tokens(layer, 3, length).requires_grad_()
    weight = tokens(layer, 3, length, seed=1)
    weights = dict(layer.named_parameters())
    expected = landmark(
        x,
        weights,
        recipe_of(config),
        landmarks_of(config),
        key_padding=key_padding,
        positions=default_positions(config, key_padding),
    )
    result = layer.attend(x, key_padding=key_padding)
    assert_same(result.out, expected.out)
    actual, wanted = (gradients(layer, x, out, weight) for out in (result.out, expected.out))
    for key, grad in actual.items():
        assert_same(grad, wanted[key])
    if "blocks" in result.plan.info:
        assert config.mode == "topk"
        for item, sequence in enumerate(expected.blocks):
            for head, rows in enumerate(sequence):
                for row, blocks in enumerate(rows):
                    assert blocks_of(result.plan, item, head, row) == blocks


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_blocks_and_any_choice_are_the_oracles(data: st.DataObject) -> None:
    groups = data.draw(st.sampled_from([1, 2, 3]))
    heads = groups * data.draw(st.integers(1, 2))
    config = config_of(
        dim=4 * heads,
        num_heads=heads,
        num_kv_heads=groups,
        block_size=data.draw(st.integers(2, 9)),
        top_k=data.draw(st.integers(1, 5)),
        mode=data.draw(st.sampled_from(["soft", "topk"])),
        gate_mix=data.draw(st.sampled_from([0.0, 0.3, 1.0])),
        landmark_positions=data.draw(st.booleans()),
    )
    layer = build(config, dtype=torch.float64)
    length = data.draw(st.integers(1, 40))
    x = tokens(layer, 1, length, seed=data.draw(st.integers(0, 99)))
    places = default_positions(config, torch.zeros(1, length, dtype=torch.bool))
    expected = landmark(x, layer.state_dict(), recipe_of(config), landmarks_of(config), positions=places)
    assert_same(layer(x), expected.out)


def heads_of(layer: Any, length: int, *, batch: int = 1, seed: int = 0) -> list[Tensor]:
    config, generator = layer.config, torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, count, length, config.head_width, generator=generator, dtype=torch.float64)
        for count in (config.num_heads, config.kv_heads, config.kv_heads)
    ]


def operated(layer: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    inputs = AttentionInputs(q, k, v)
    out: Tensor = layer.operate(inputs, layer.plan_for(inputs, offset=k.shape[2] - q.shape[2]))
    return out


def over_ordinary(layer: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plain softmax attention of the last rows over the tokens that are no landmarks."""
    size, repeats = layer.config.block_size, layer.config.num_heads // layer.config.kv_heads
    slot = torch.arange(k.shape[2])
    row = slot[-q.shape[2] :, None]
    seen = (slot <= row) & (slot % size != size - 1)
    k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
    return torch.softmax(scores, -1) @ v


def test_landmarks_that_say_their_blocks_sum_give_plain_attention() -> None:
    """A query at a time, as a batch: each item's landmarks have the log-sum-exp of their blocks as logits."""
    layer = layer_of(block_size=6, num_kv_heads=4, mode="soft", rotary=None)
    q, k, v = heads_of(layer, 45)
    at = 43
    q, k, v = q[:, :, at:].transpose(0, 2).transpose(1, 2).flip(2), k[..., : at + 1, :], v[..., : at + 1, :]
    q = q.reshape(2, 4, 1, -1)
    k, v = k.expand(2, -1, -1, -1).clone(), v.expand(2, -1, -1, -1)
    scale = q.shape[-1] ** -0.5
    for block in range(at // 6):
        inner = torch.logsumexp(scale * (k[:, :, 6 * block : 6 * block + 5] * q).sum(-1), -1)  # [B, H]
        k[:, :, 6 * block + 5] = q[:, :, 0] * (inner / (scale * q[:, :, 0].square().sum(-1))).unsqueeze(-1)
    expected = over_ordinary(layer, q, k, v)
    assert_same(operated(layer, q, k, v), expected)
    k[:, :, 5] *= 2
    assert not torch.allclose(operated(layer, q, k, v), expected, atol=1e-4)


@pytest.mark.parametrize("mode", ["soft", "topk"])
def test_without_gates_ordinary_tokens_are_attended_plainly(mode: str) -> None:
    layer = layer_of(block_size=6, num_kv_heads=2, mode=mode, top_k=9, gate_mix=0.0, rotary=None)
    q, k, v = heads_of(layer, 45, batch=2)
    ordinary = torch.arange(45) > 0
    assert_same(operated(layer, q, k, v)[:, :, ordinary], over_ordinary(layer, q, k, v)[:, :, ordinary])
    layer.gate_mix = 0.25
    assert not torch.allclose(operated(layer, q, k, v), over_ordinary(layer, q, k, v), atol=1e-3)


def test_one_unfinished_block_is_plain_attention() -> None:
    layer = layer_of(block_size=51, num_kv_heads=2)
    plain = build(attnzoo.get_config("mha")(dim=32, num_heads=4, num_kv_heads=2), dtype=torch.float64)
    x = tokens(layer, 2, 50)
    assert_same(layer(x), plain(x))
    assert layer.attend(x).plan.density == 1


def test_a_choice_of_everything_is_soft() -> None:
    soft, chosen = layer_of(block_size=6, mode="soft"), layer_of(block_size=6, mode="topk", top_k=8)
    x = tokens(soft, 2, 54)
    assert_same(chosen(x), soft(x))
    fewer = layer_of(block_size=6, mode="topk", top_k=7)
    assert torch.equal(fewer(x)[:, :48], soft(x)[:, :48]) or torch.allclose(fewer(x)[:, :48], soft(x)[:, :48])
    assert not torch.allclose(fewer(x)[:, 48:], soft(x)[:, 48:], atol=1e-6)


@pytest.mark.parametrize("mode", ["soft", "topk"])
def test_without_positions_earlier_blocks_may_change_places(mode: str) -> None:
    layer = layer_of(block_size=5, mode=mode, top_k=2, rotary=None)
    x = tokens(layer, 1, 33)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    moved = torch.cat([x[:, :30].view(1, 6, 5, -1)[:, order].flatten(1, 2), x[:, 30:]], 1)
    assert_same(layer(moved)[:, 30:], layer(x)[:, 30:])


@pytest.mark.parametrize("mode", ["soft", "topk"])
def test_landmarks_have_no_weight_and_queries_pass_by_their_own(mode: str) -> None:
    layer = layer_of(block_size=5, mode=mode, top_k=2)
    q, k, v = (x.requires_grad_() for x in heads_of(layer, 33))
    out = operated(layer, q, k, v)
    dk, dv = torch.autograd.grad(out.square().sum(), (k, v), retain_graph=True)
    landmark_slots = torch.arange(33) % 5 == 4
    assert (dv[:, :, landmark_slots] == 0).all()
    assert (dv[:, :, ~landmark_slots] != 0).all()
    assert (dk[:, :, landmark_slots] != 0).any()
    (of_block,) = torch.autograd.grad(out[:, :, 10:15].square().sum(), k)
    assert (of_block[:, :, 14] == 0).all()
    assert (of_block[:, :, 9] != 0).any()


def test_a_block_whose_landmark_scores_nothing_is_gone() -> None:
    layer = layer_of(block_size=5, mode="soft", rotary=None, num_kv_heads=4)
    q, k, v = heads_of(layer, 23)
    q[..., 0] = q[..., 0].abs() + 1
    k[:, :, 9] = 0.0
    k[:, :, 9, 0] = -1e6
    without = [torch.cat([x[:, :, :5], x[:, :, 10:]], 2) for x in (k, v)]
    assert_same(operated(layer, q[:, :, 20:], k, v), operated(layer, q[:, :, 20:], *without))


def test_equal_landmarks_are_taken_from_the_front() -> None:
    layer = layer_of(block_size=4, mode="topk", top_k=2, rotary=None)
    x = tokens(layer, 1, 4).repeat(1, 8, 1)
    blocks = layer.attend(x).plan.info["blocks"][0]
    assert (blocks[:, 12:] == torch.tensor([0, 1])).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_landmarks_of_one_embedding_are_told_apart_by_nothing_but_their_order(dtype: torch.dtype) -> None:
    """As in a first layer: where older ones are scored they are all equal, and rounding must not choose among them."""
    layer = layer_of(dtype, block_size=5, top_k=3, num_kv_heads=2)
    x = tokens(layer, 1, 150)
    x[:, 4::5] = tokens(layer, 1, 1, seed=9)
    result = layer.attend(x)
    cache = layer.new_cache(1, 150)
    older = 0
    for t in range(150):
        with torch.no_grad():
            step = layer.attend(x[:, t : t + 1], cache=cache)
        assert_same(step.out, result.out[:, t : t + 1])
        if "blocks" not in step.plan.info:
            continue
        blocks = result.plan.info["blocks"][0, :, t]
        assert torch.equal(step.plan.info["blocks"][0, :, 0], blocks)
        for row in blocks.tolist():
            packed = [block for block in row if block < t // 5 - 3]
            assert packed == list(range(len(packed)))
            older += len(packed)
    assert older > 200


@pytest.mark.parametrize("size", [51, 64])
def test_gradients_are_those_of_the_definition(size: int) -> None:
    for mode in ("soft", "topk"):
        layer = layer_of(block_size=size, mode=mode, top_k=1, num_kv_heads=2, gate_mix=0.8)
        x = tokens(layer, 1, 4 * size + 9).requires_grad_()
        weight = tokens(layer, 1, x.shape[1], seed=1)
        found = []
        for impl in ("blocked", "reference"):
            layer.impl = impl
            found.append(gradients(layer, x, layer(x), weight))
        for name, grad in found[0].items():
            assert_same(grad, found[1][name])


def test_training_is_soft_and_evaluation_retrieves_unless_told_otherwise() -> None:
    layer = layer_of(block_size=5, top_k=2)
    x = tokens(layer, 1, 60)
    retrieved = layer(x)
    layer.train()
    soft = layer(x)
    assert not torch.allclose(soft, retrieved, atol=1e-6)
    layer.mode = "topk"
    assert torch.equal(layer(x), retrieved)
    layer.eval().mode = "soft"
    assert torch.equal(layer(x), soft)
    layer.mode = "hard"
    with pytest.raises(ValueError, match="mode: expected one of soft, topk or None, got 'hard'"):
        layer(x)
    layer.mode, layer.gate_mix = None, 1.5
    with pytest.raises(ValueError, match=r"gate_mix: expected a number from 0 to 1, got 1\.5"):
        layer(x)


def test_a_cache_serves_both_modes_in_turn() -> None:
    layer = layer_of(block_size=5, top_k=2, num_kv_heads=2)
    x = tokens(layer, 2, 60)
    cache = layer.new_cache(2, 60)
    expected: dict[str, Tensor] = {}
    with torch.no_grad():
        for mode in ("soft", "topk"):
            layer.mode = mode
            expected[mode] = layer(x)
        for first in range(0, 60, 6):
            layer.mode = ("soft", "topk")[first // 6 % 2]
            out = layer.attend(x[:, first : first + 6], cache=cache).out
            assert_same(out, expected[layer.mode][:, first : first + 6])


@pytest.mark.parametrize("size", [51, 64])
def test_published_block_sizes_decode_as_they_prefill(size: int) -> None:
    layer = layer_of(block_size=size, top_k=2, num_kv_heads=2)
    length = 7 * size + 11
    x = tokens(layer, 1, length)
    cache = layer.new_cache(1, length)
    with torch.no_grad():
        expected = layer(x)
        assert_same(layer.attend(x[:, : 5 * size - 3], cache=cache).out, expected[:, : 5 * size - 3])
        for t in range(5 * size - 3, 5 * size + 3):
            assert_same(layer.attend(x[:, t : t + 1], cache=cache).out, expected[:, t : t + 1])
        assert_same(layer.attend(x[:, 5 * size + 3 :], cache=cache).out, expected[:, 5 * size + 3 :])


def test_hundreds_of_blocks() -> None:
    """The published code stops at 62 landmarks; here the choice is found again by a sum over 400 of them."""
    layer = layer_of(dim=16, num_heads=2, block_size=4, top_k=3, rotary=None)
    x = tokens(layer, 1, 1601)
    result = layer.attend(x)
    q, k = (getattr(layer, f"{role}_proj")(x).unflatten(-1, (2, 8)).transpose(1, 2) for role in "qk")
    scores = q[:, :, -1:] @ k[:, :, 3::4].transpose(-1, -2)
    best = scores.topk(3).indices.sort().values
    assert scores.shape[-1] == 400
    assert torch.equal(result.plan.info["blocks"][:, :, -1:], best)
    cache = layer.new_cache(1, 1601)
    with torch.no_grad():
        layer.attend(x[:, :1600], cache=cache)
        assert_same(layer.attend(x[:, 1600:], cache=cache).out, result.out[:, 1600:])
    assert result.plan.density < 0.03


def test_choosing_in_parts_is_choosing_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnzoo.variants.landmark import retrieval

    layer = layer_of(block_size=4, top_k=2, num_kv_heads=2)
    x = tokens(layer, 2, 77)
    key_padding = torch.rand(2, 77, generator=torch.Generator().manual_seed(0)) < 0.3
    expected = layer.attend(x, key_padding=key_padding)
    monkeypatch.setattr(retrieval, "_SCORES_AT_ONCE", 1000)
    again = layer.attend(x, key_padding=key_padding)
    assert torch.equal(again.plan.info["blocks"], expected.plan.info["blocks"])
    assert torch.equal(again.out, expected.out)


@pytest.mark.parametrize("landmark_positions", [True, False])
def test_irregular_blocks_are_their_oracle(landmark_positions: bool) -> None:
    layer = layer_of(mode="soft", num_kv_heads=2, landmark_positions=landmark_positions)
    generator = torch.Generator().manual_seed(0)
    is_landmark = torch.rand(3, 40, generator=generator) < 0.2
    is_landmark[0, :2] = is_landmark[1, -1] = True
    key_padding = torch.rand(3, 40, generator=generator) < 0.25
    x = torch.where(key_padding.unsqueeze(-1), torch.nan, tokens(layer, 3, 40)).requires_grad_()
    real = ~key_padding
    index = real.long().cumsum(1) - 1
    places = index if landmark_positions else (index - (is_landmark & real).long().cumsum(1)).clamp(min=0)
    out = layer.attend(x, key_padding=key_padding, is_landmark=is_landmark).out
    for item in range(3):
        alone = x[item : item + 1, real[item]]
        expected = landmark(
            alone,
            layer.state_dict(),
            recipe_of(layer.config),
            landmarks_of(layer.config),
            is_landmark=is_landmark[item : item + 1, real[item]],
            positions=places[item, real[item]],
        ).out
        assert_same(out[item : item + 1, real[item]], expected)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    assert grad.isfinite().all()
    assert (grad[key_padding] == 0).all()


def test_a_mask_of_every_wth_token_is_the_stride() -> None:
    layer = layer_of(mode="soft", block_size=7)
    x = tokens(layer, 2, 50)
    every = (torch.arange(50) % 7 == 6).expand(2, -1)
    assert_same(layer.attend(x, is_landmark=every).out, layer(x))
    with attnzoo.record(layer) as rec:
        layer.attend(x, is_landmark=every)
    assert len(rec.plans[""]) == 1
    assert layer.attend(x[:, :0], is_landmark=every[:, :0]).out.shape == (2, 0, 32)


def test_irregular_blocks_are_refused_where_they_have_no_meaning() -> None:
    layer = layer_of(mode="soft")
    x = tokens(layer, 2, 20)
    every = torch.ones(2, 20, dtype=torch.bool)
    with pytest.raises(attnzoo.UnsupportedError, match="cache: expected None beside is_landmark"):
        layer.attend(x, cache=layer.new_cache(2, 20), is_landmark=every)
    with pytest.raises(attnzoo.UnsupportedError, match="context: expected None beside is_landmark"):
        layer.attend(x, context=x, is_landmark=every)
    with pytest.raises(TypeError, match=r"is_landmark: expected a bool Tensor, got torch\.int64"):
        layer.attend(x, is_landmark=every.long())
    with pytest.raises(ValueError, match=r"is_landmark: expected \[2, 20\]"):
        layer.attend(x, is_landmark=every[:, 1:])
    layer.mode = None
    with pytest.raises(attnzoo.UnsupportedError, match="is_landmark: expected mode 'soft'"):
        layer.attend(x, is_landmark=every)
    with pytest.raises(attnzoo.UnsupportedError, match="context"):
        layer.attend(x, context=x)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_survives_json(name: str) -> None:
    config = config_of(**CONFIGS[name])
    assert attnzoo.AttentionConfig.from_json(config.to_json()) == config
    assert replace(config, official_quirks=True) != config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_size", 1),
        ("block_size", 16.0),
        ("block_size", True),
        ("top_k", 0),
        ("top_k", 2.5),
        ("mode", "hard"),
        ("mode", 1),
        ("gate_mix", -0.1),
        ("gate_mix", 1.01),
        ("gate_mix", True),
        ("gate_mix", "all"),
        ("landmark_positions", 1),
        ("official_quirks", "yes"),
        ("causal", False),
    ],
)
def test_a_bad_option_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field}: expected"):
        attnzoo.create("landmark", dim=32, num_heads=4, **{field: value})
