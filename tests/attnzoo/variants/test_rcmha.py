"""RCMHA: the layer against its definition and its oracle, distances at any offset, memory, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import conv1d, pad

import attnzoo
from attnzoo.oracles.rcmha import Relative, rcmha
from tests.attnzoo.cases import assert_same, build, gradients, recipe_of, tokens

CONFIGS: dict[str, dict[str, Any]] = {
    "as published": {},
    "grouped, kernels for all heads": {"num_kv_heads": 2, "conv_share": "across_heads", "conv_size": 4},
    "before the projections": {"conv_pos": "pre_proj", "num_kv_heads": 1},
    "queries alone": {"conv_on": ("q",), "conv_bias": False},
    "keys and values, wide kernel": {"conv_on": ("v", "k"), "conv_size": 7},
    "kernel of one": {"conv_size": 1},
    "few channels, own scale": {"rel_dim": 2, "scale": 0.4},
    "many channels": {"rel_dim": 20},
    "odd heads": {"head_dim": 5, "num_kv_heads": 2},
    "rmha": {"conv_on": ()},
    "mdha": {"rel": None},
    "rotary beside": {"rotary": attnzoo.RotaryConfig(base=100.0), "num_kv_heads": 2},
    "biases": {"bias": True},
    "both directions": {"causal": False},
    "both directions, wide kernel, before the projections": {
        "causal": False,
        "conv_size": 5,
        "conv_pos": "pre_proj",
        "bias": True,
    },
    "learned": {"rel": "learned", "max_distance": 7, "num_kv_heads": 2},
    "learned, neighbours told apart": {"rel": "learned", "max_distance": 1},
    "learned, farther than the sequence": {"rel": "learned", "max_distance": 200},
    "learned, rotary beside": {"rel": "learned", "max_distance": 5, "rotary": attnzoo.RotaryConfig()},
    "learned, both directions": {"rel": "learned", "max_distance": 6, "causal": False},
    "learned, neighbours, both directions": {"rel": "learned", "max_distance": 1, "causal": False},
    "learned, farther, both directions": {"rel": "learned", "max_distance": 99, "causal": False},
}


def config_of(**options: Any) -> Any:
    return attnzoo.get_config("rcmha")(**{"dim": 32, "num_heads": 4, **options})


def layer_of(dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A layer none of whose parameters is as it starts: u and v start at zero."""
    layer = build(config_of(**options), dtype=dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name in ("rel_u", "rel_v", "rel_table"):
            if hasattr(layer, name):
                value = getattr(layer, name)
                value.copy_(torch.randn(value.shape, generator=generator, dtype=torch.float64))
    return layer


def convolved(x: Tensor, conv: Any, causal: bool) -> Tensor:
    """torch's convolution of heads ``[B, h, T, D]``, or of tokens ``[B, T, C]``."""
    if conv is None:
        return x
    if x.dim() == 3:
        return convolved(x.unsqueeze(1), conv, causal).squeeze(1)
    _, heads, _, width = x.shape
    # A convolution in torch correlates: its last number meets the newest value.
    weight = conv.weight.expand(heads, -1, -1).flatten(0, 1).flip(-1).unsqueeze(1)
    bias = None if conv.bias is None else conv.bias.expand(heads, -1).flatten()
    reach = conv.weight.shape[-1] - 1
    signal = x.transpose(2, 3).flatten(1, 2)  # [B, h * D, T]
    signal = pad(signal, (reach, 0) if causal else (reach // 2, reach // 2))
    out = conv1d(signal, weight, bias, groups=heads * width)
    return out.unflatten(1, (heads, width)).transpose(2, 3)


def definition(layer: Any, x: Tensor) -> Tensor:
    """The formula with every distance written out, for sequences without padding."""
    config, length = layer.config, x.shape[1]
    conv = {name: layer.conv[name] if name in config.conv_on else None for name in ("q", "k", "v")}
    made = {}
    for name in ("q", "k", "v"):
        projection, source = getattr(layer, f"{name}_proj"), x
        if config.conv_pos == "pre_proj":
            source = convolved(x, conv[name], config.causal)
        heads = projection(source).unflatten(-1, (-1, config.head_width)).transpose(1, 2)
        made[name] = heads if config.conv_pos == "pre_proj" else convolved(heads, conv[name], config.causal)
    q, k, v = made["q"], made["k"], made["v"]
    group = config.num_heads // config.kv_heads
    distance = torch.arange(length)[:, None] - torch.arange(length)
    content = q if config.rel is None else q + layer.rel_u[:, None]
    if config.rotary is not None:
        half = config.head_width // 2
        angles = torch.arange(length)[:, None] * config.rotary.base ** (-torch.arange(half).double() / half)
        turn = torch.polar(torch.ones_like(angles), angles)
        content, k = (
            torch.cat([y.real, y.imag], -1)
            for y in (torch.complex(z[..., :half], z[..., half:]) * turn for z in (content, k))
        )
    scores = content @ k.repeat_interleave(group, 1).transpose(-1, -2)
    if config.rel == "sinusoidal":
        vectors = torch.einsum("ijr,hdr->hijd", sinusoids(distance, config.rel_width), layer.rel_proj)
        scores = scores + torch.einsum("bhid,hijd->bhij", q + layer.rel_v[:, None], vectors)
    if config.rel == "learned":
        reach = config.max_distance
        index = distance.clamp(0, reach) if config.causal else distance.clamp(-reach, reach) + reach
        scores = scores + torch.einsum("bhid,hijd->bhij", q + layer.rel_v[:, None], layer.rel_table[:, index])
    scores = scores * (config.head_width**-0.5 if config.scale is None else config.scale)
    if config.causal:
        scores = scores.masked_fill(distance < 0, -math.inf)
    out: Tensor = layer.o_proj((scores.softmax(-1) @ v.repeat_interleave(group, 1)).transpose(1, 2).flatten(2))
    return out


def sinusoids(distance: Tensor, width: int) -> Tensor:
    """``[sin | cos]`` of distances, fp64."""
    angles = distance.double()[..., None] * 10000.0 ** (-torch.arange(0, width, 2).double() / width)
    return torch.cat([angles.sin(), angles.cos()], -1)


def limit_of(dtype: torch.dtype, offset: int) -> float:
    return 1e-6 if dtype == torch.float32 else 1e-12 + 1e-16 * offset


ORACLE_NAMES = {
    "rel_u": "content_bias",
    "rel_v": "position_bias",
    "rel_proj": "position_proj",
    "rel_table": "distance_table",
}


def oracle(layer: Any, x: Tensor, **options: Any) -> Tensor:
    """The oracle's answer, with a layer's parameters under its names; one kernel for all has no heads there."""
    config, weights = layer.config, {}
    headless = config.conv_pos == "pre_proj" or config.conv_share == "across_heads"
    for name, value in layer.named_parameters():
        if name.startswith("conv."):
            _, which, kind = name.split(".")
            weights[f"{which}_conv.{kind}"] = value.squeeze(0) if headless else value
        else:
            weights[ORACLE_NAMES.get(name, name)] = value
    relative = Relative(
        taps=config.conv_size,
        conv_on=config.conv_on,
        conv_share=config.conv_share,
        conv_pos=config.conv_pos,
        scores=config.rel,
    )
    return rcmha(x, weights, recipe_of(config), relative, **options)


@pytest.mark.parametrize("name", CONFIGS)
def test_layer_is_its_oracle(name: str) -> None:
    layer = layer_of(**CONFIGS[name])
    key_padding = torch.zeros(2, 15, dtype=torch.bool)
    key_padding[1, [0, 4, 5, 9, 14]] = True
    x = tokens(layer, 2, 15).requires_grad_()
    weight = tokens(layer, 2, 15, seed=1)
    expected, out = oracle(layer, x, key_padding=key_padding), layer.attend(x, key_padding=key_padding).out
    assert_same(out, expected)
    same = gradients(layer, x, expected, weight)
    for key, grad in gradients(layer, x, out, weight).items():
        assert_same(grad, same[key])


@pytest.mark.parametrize("name", ["as published", "before the projections", "rmha", "rotary beside"])
def test_given_positions_and_memory_are_the_oracles(name: str) -> None:
    layer = layer_of(**CONFIGS[name])
    x = tokens(layer, 2, 20)
    positions = torch.randint(0, 50, (2, 20), generator=torch.Generator().manual_seed(0))
    assert_same(layer.attend(x, positions=positions).out, oracle(layer, x, positions=positions))
    new = tokens(layer, 2, 5, seed=1).requires_grad_()
    weight = tokens(layer, 2, 5, seed=2)
    cache = layer.new_cache(2, 25)
    layer(x, cache=cache)
    out, expected = layer(new, cache=cache), oracle(layer, new, memory=x)
    assert_same(out, expected)
    same = gradients(layer, new, expected, weight)
    for key, grad in gradients(layer, new, out, weight).items():
        assert_same(grad, same[key])


@pytest.mark.parametrize("name", CONFIGS)
def test_layer_is_its_definition(name: str) -> None:
    layer = layer_of(**CONFIGS[name])
    x = tokens(layer, 2, 45).requires_grad_()
    weight = tokens(layer, 2, 45, seed=1)
    expected = definition(layer, x)
    grads = gradients(layer, x, expected, weight)
    for impl in ("blocked", "reference"):
        layer.impl = impl
        out = layer(x)
        assert_same(out, expected)
        for key, grad in gradients(layer, x, out, weight).items():
            assert_same(grad, grads[key])


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_restarts_positions_and_convolutions(name: str) -> None:
    layer = layer_of(**CONFIGS[name])
    generator = torch.Generator().manual_seed(0)
    key_padding = torch.rand(3, 45, generator=generator) < 0.4
    key_padding[2, :20] = True
    x = torch.where(key_padding.unsqueeze(-1), math.nan, tokens(layer, 3, 45))
    out = layer.attend(x, key_padding=key_padding).out
    assert (out[key_padding] == 0).all()
    for item in range(3):
        real = ~key_padding[item]
        assert_same(out[item, real], definition(layer, x[item : item + 1, real])[0])


@pytest.mark.parametrize("name", [name for name in CONFIGS if CONFIGS[name].get("causal", True)])
def test_segments_with_a_memory_are_the_whole_sequence(name: str) -> None:
    layer = layer_of(**CONFIGS[name])
    x = tokens(layer, 2, 45)
    expected = definition(layer, x)
    for ends in ([20, 40, 45], [1, 2, 3, 23, 24, 45], list(range(1, 46))):
        cache = layer.new_cache(2, 45)
        parts = [layer(x[:, a:b], cache=cache) for a, b in pairwise([0, *ends])]
        assert_same(torch.cat(parts, 1), expected)


@st.composite
def options_of(draw: Any) -> dict[str, Any]:
    groups, causal = draw(st.sampled_from([1, 2, 3])), draw(st.booleans())
    heads, width = groups * draw(st.integers(1, 2)), draw(st.sampled_from([2, 3, 4]))
    before = draw(st.booleans())
    return {
        "dim": draw(st.integers(3, 9)),
        "num_heads": heads,
        "num_kv_heads": groups,
        "head_dim": width,
        "bias": draw(st.booleans()),
        "causal": causal,
        "rotary": attnzoo.RotaryConfig() if width != 3 and draw(st.booleans()) else None,
        "conv_size": draw(st.integers(1, 5)) if causal else draw(st.sampled_from([1, 3, 5])),
        "conv_on": draw(st.lists(st.sampled_from(["q", "k", "v"]), unique=True)),
        "conv_share": "per_head" if before else draw(st.sampled_from(["per_head", "across_heads"])),
        "conv_pos": "pre_proj" if before else "post_proj",
        "conv_bias": draw(st.booleans()),
        "rel": draw(st.sampled_from(["sinusoidal", "learned", None])),
        "rel_dim": draw(st.none() | st.sampled_from([2, 6])),
        "max_distance": draw(st.integers(1, 30)),
    }


@settings(max_examples=40, deadline=None)
@given(options=options_of(), ends=st.sets(st.integers(1, 24), max_size=5), seed=st.none() | st.integers(0, 99))
def test_any_setting_padding_and_split_is_the_definition(
    options: dict[str, Any], ends: set[int], seed: int | None
) -> None:
    layer = layer_of(**options)
    x, key_padding = tokens(layer, 2, 25), torch.zeros(2, 25, dtype=torch.bool)
    if seed is not None:
        key_padding = torch.rand(2, 25, generator=torch.Generator().manual_seed(seed)) < 0.4
    cut = pairwise([0, *sorted(ends), 25]) if options["causal"] else [(0, 25)]
    cache = layer.new_cache(2, 25) if options["causal"] else None
    shown = torch.where(key_padding.unsqueeze(-1), math.nan, x)
    with torch.no_grad():
        parts = [
            layer.attend(shown[:, a:b], key_padding=None if seed is None else key_padding[:, a:b], cache=cache).out
            for a, b in cut
        ]
        for item in range(2):
            real = ~key_padding[item]
            assert_same(torch.cat(parts, 1)[item, real], definition(layer, x[item : item + 1, real])[0])


def test_earlier_segments_are_remembered_without_gradient() -> None:
    layer = layer_of()
    x = tokens(layer, 2, 40)
    first, second = x[:, :25].clone().requires_grad_(), x[:, 25:].clone().requires_grad_()
    cache = layer.new_cache(2, 40)
    layer(first, cache=cache)
    out = layer(second, cache=cache)
    assert_same(out, definition(layer, x)[:, 25:])
    assert torch.autograd.grad(out.square().sum(), (first, second), allow_unused=True, retain_graph=True)[0] is None
    frozen = torch.cat([x[:, :25], second], 1)
    (grad,) = torch.autograd.grad(out.square().sum(), second)
    (same,) = torch.autograd.grad(definition(layer, frozen)[:, 25:].square().sum(), second)
    assert_same(grad, same)


def test_ragged_memory_keeps_each_items_last_tokens() -> None:
    layer = layer_of(conv_size=5)
    rows = [tokens(layer, 1, length + 6, seed=length) for length in (30, 2, 11)]
    key_padding = torch.arange(30) < 30 - torch.tensor([[30], [2], [11]])
    x = torch.zeros(3, 30, 32, dtype=torch.float64)
    x[~key_padding] = torch.cat([row[0, :-6] for row in rows])
    cache = layer.new_cache(3, 40)
    with torch.no_grad():
        layer.attend(x, key_padding=key_padding, cache=cache)
        new = torch.cat([row[:, -6:] for row in rows])
        out = torch.cat([layer(new[:, :1], cache=cache), layer(new[:, 1:4], cache=cache)], 1)
        cache.crop(12)
    for item, row in enumerate(rows):
        assert_same(out[item : item + 1], definition(layer, row)[:, -6:-2])
    with torch.no_grad():
        again = layer(new[:, 1:], cache=cache)
    assert_same(again[1:2], definition(layer, torch.cat([rows[1][:, :-2], new[1:2, 1:]], 1))[:, -5:])
    assert_same(again[2:], definition(layer, torch.cat([rows[2][:, :12], new[2:, 1:]], 1))[:, 12:])


def test_a_crop_beyond_the_margin_is_refused_and_changes_nothing() -> None:
    layer = layer_of()
    x = tokens(layer, 1, 300)
    cache = layer.new_cache(1, 310)
    with torch.no_grad():
        layer(x, cache=cache)
        with pytest.raises(ValueError, match="length: expected at most 128 tokens to be cropped"):
            cache.crop(100)
        cache.crop(200)
        assert_same(layer(x[:, 200:], cache=cache), layer(x)[:, 200:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [1000, 131_072, 1_000_000])
def test_a_layer_does_not_notice_an_offset(offset: int, dtype: torch.dtype) -> None:
    layer = layer_of(dtype)
    x = tokens(layer, 2, 60)
    places = torch.arange(60)
    out = layer(x)
    moved = layer.attend(x, positions=places + offset).out
    largest = max(1.0, float(out.detach().abs().max()))
    assert float((moved - out).detach().abs().max()) <= 100 * limit_of(dtype, 0) * largest
    assert not torch.allclose(layer.attend(x, positions=places * 2 + offset).out, out, atol=1e-2)


def test_given_positions_may_be_any_and_come_late() -> None:
    """The distance is that of positions, whatever their order; a cache that had none until then knows slots."""
    layer = layer_of(conv_on=())
    generator = torch.Generator().manual_seed(0)
    x = tokens(layer, 2, 30)
    places = torch.cat([torch.arange(12).expand(2, -1), torch.randint(0, 90, (2, 18), generator=generator)], 1)
    cache = layer.new_cache(2, 30)
    parts = [layer(x[:, :12], cache=cache), layer.attend(x[:, 12:], positions=places[:, 12:], cache=cache).out]
    q, k, v = (p(x).unflatten(-1, (4, 8)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    vectors = sinusoids(places[:, :, None] - places[:, None], 8)
    distance = torch.einsum("bhid,hdr,bijr->bhij", q + layer.rel_v[:, None], layer.rel_proj, vectors)
    scores = ((q + layer.rel_u[:, None]) @ k.transpose(-1, -2) + distance) * 8**-0.5
    hidden = torch.ones(30, 30, dtype=torch.bool).triu(1)
    expected = layer.o_proj((scores.masked_fill(hidden, -math.inf).softmax(-1) @ v).transpose(1, 2).flatten(2))
    assert_same(torch.cat(parts, 1), expected)


def test_one_table_serves_all_heads_items_and_lengths() -> None:
    layer = layer_of(torch.float32)
    x = tokens(layer, 3, 50)
    key_padding = torch.arange(50) < torch.tensor([[0], [20], [49]])
    cache = layer.new_cache(3, 70)
    with torch.no_grad():
        plans = [layer.attend(x, key_padding=key_padding, cache=cache).plan, layer.attend(x[:, :1], cache=cache).plan]
    for plan, slots in zip(plans, (50, 51), strict=True):
        _, k_aux = plan.extras.aux
        assert k_aux.shape == (1, 1, slots, 8)
        assert not k_aux.requires_grad
    assert set(cache.streams) == {"k", "v", "conv_q", "conv_k", "conv_v"}
    again = layer.attend(x[:, :1], cache=cache).plan.extras.aux[1]
    assert again.untyped_storage().data_ptr() == plans[1].extras.aux[1].untyped_storage().data_ptr()


@pytest.mark.parametrize("rotary", [None, attnzoo.RotaryConfig()])
def test_delta_kernels_and_no_distances_are_the_host(rotary: Any) -> None:
    """What a conversion starts from: the very numbers of plain attention, with every new part in place."""
    host = build(attnzoo.get_config("mha")(dim=32, num_heads=4, num_kv_heads=2, rotary=rotary), dtype=torch.float32)
    layer = attnzoo.create(config_of(num_kv_heads=2, rotary=rotary, conv_init="delta", rel_init="zero"))
    missing, unexpected = layer.load_state_dict(host.state_dict(), strict=False)
    assert not unexpected
    assert {name.split(".")[0] for name in missing} == {"conv", "rel_u", "rel_v", "rel_proj"}
    x = tokens(layer, 2, 129).requires_grad_()
    assert torch.equal(layer(x), host(x))
    layer(x).square().sum().backward()
    for name in ("conv.q.weight", "conv.k.weight", "conv.v.weight", "rel_u", "rel_proj"):
        assert layer.get_parameter(name).grad.abs().max() > 0, name


def test_a_learned_table_can_be_alibi() -> None:
    """A table of falling numbers in one channel that v alone reads, and queries that say nothing."""
    layer = layer_of(rel="learned", max_distance=60, conv_on=())
    slopes = 2.0 ** -torch.arange(1, 5).double()
    with torch.no_grad():
        layer.q_proj.weight.zero_()
        layer.rel_v.zero_()
        layer.rel_v[:, 0] = 1.0
        layer.rel_table.zero_()
        layer.rel_table[:, :, 0] = -slopes[:, None] * torch.arange(61) * 8**0.5
    x = tokens(layer, 2, 50)
    k, v = (p(x).unflatten(-1, (4, 8)).transpose(1, 2) for p in (layer.k_proj, layer.v_proj))
    distance = torch.arange(50)[:, None] - torch.arange(50)
    scores = (layer.rel_u[:, None] @ k.transpose(-1, -2)) * 8**-0.5 - slopes[:, None, None] * distance
    expected = scores.masked_fill(distance < 0, -math.inf).softmax(-1) @ v
    assert_same(layer(x), layer.o_proj(expected.transpose(1, 2).flatten(2)))


def test_a_table_longer_than_the_sequence_is_not_clipped() -> None:
    long, longer = (layer_of(rel="learned", max_distance=reach) for reach in (44, 300))
    with torch.no_grad():
        longer.load_state_dict({**longer.state_dict(), **long.state_dict(), "rel_table": longer.rel_table})
        longer.rel_table[:, :45] = long.rel_table
    x = tokens(long, 2, 45)
    assert_same(longer(x), long(x))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("conv_size", 0),
        ("conv_size", 3.0),
        ("conv_size", True),
        ("conv_on", "q"),
        ("conv_on", ("q", "o")),
        ("conv_on", None),
        ("conv_share", "all"),
        ("conv_pos", "before"),
        ("conv_bias", 1),
        ("conv_init", "zero"),
        ("rel", "rotary"),
        ("rel", True),
        ("rel_dim", 3),
        ("rel_dim", 0),
        ("rel_dim", 4.0),
        ("rel_init", "delta"),
        ("max_distance", 0),
        ("max_distance", 2.5),
    ],
)
def test_a_bad_option_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field}: expected .*got "):
        attnzoo.create("rcmha", dim=32, num_heads=4, **{field: value})


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"causal": False, "conv_size": 4}, r"^conv_size: expected an odd int where the layer is not causal, got 4"),
        ({"conv_pos": "pre_proj", "conv_share": "across_heads"}, r"^conv_share: expected 'per_head'"),
    ],
)
def test_options_that_do_not_fit_each_other_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        attnzoo.create("rcmha", dim=32, num_heads=4, **options)


def test_what_makes_no_sense_is_refused_by_name() -> None:
    layer = layer_of(rel="learned")
    x = tokens(layer, 2, 5)
    cache = layer.new_cache(2, 9)
    with pytest.raises(attnzoo.UnsupportedError, match="positions: learned"):
        layer.attend(x, positions=torch.arange(5), cache=cache)
    assert cache.length == 0
    with pytest.raises(attnzoo.UnsupportedError, match="context: rcmha"):
        layer.attend(x, context=x)
    with pytest.raises(attnzoo.UnsupportedError, match="cache: expected a causal layer"):
        layer_of(causal=False).new_cache(1, 5)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_setting_survives_json(name: str) -> None:
    config = config_of(**CONFIGS[name])
    assert attnzoo.AttentionConfig.from_json(config.to_json()) == config
    assert replace(config, conv_on=list(config.conv_on)) == config
