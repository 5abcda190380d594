"""The oracle of RCMHA, which has no published numbers, against other forms of its formulas."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from attnzoo.oracles.mha import Recipe, mha
from attnzoo.oracles.rcmha import Relative, convolve, encoding, rcmha
from tests.attnzoo.oracles.published import GQA, HOLES, near, projections, random

PLAIN = replace(GQA, rotary_base=None)
BOTH = replace(PLAIN, causal=False)


def layer(recipe: Recipe, relative: Relative, *, width: int = 6, furthest: int = 3) -> dict[str, Tensor]:
    """Random weights with everything that the options use."""
    weights, heads = projections(recipe), {"q": recipe.num_heads, "k": recipe.num_kv_heads, "v": recipe.num_kv_heads}
    for i, name in enumerate(relative.conv_on):
        channels = (heads[name], recipe.head_dim) if relative.conv_share == "per_head" else (recipe.head_dim,)
        channels = (16,) if relative.conv_pos == "pre_proj" else channels
        weights[f"{name}_conv.weight"] = random(*channels, relative.taps, seed=20 + i)
        weights[f"{name}_conv.bias"] = random(*channels, seed=30 + i)
    head = (recipe.num_heads, recipe.head_dim)
    rows = furthest + 1 if recipe.causal else 2 * furthest + 1
    return weights | {
        "content_bias": random(*head, seed=40),
        "position_bias": random(*head, seed=41),
        "position_proj": random(*head, width, seed=42),
        "distance_table": random(recipe.num_heads, rows, recipe.head_dim, seed=43),
    }


def without_convolution(weights: dict[str, Tensor], *, middle: bool = False) -> dict[str, Tensor]:
    """The same with convolutions that pass the token itself."""
    weights = dict(weights)
    for name in list(weights):
        if "_conv" in name:
            weights[name] = torch.zeros_like(weights[name])
        if "_conv.weight" in name:
            weights[name][..., 1 if middle else 0] = 1
    return weights


@pytest.mark.parametrize("recipe", [GQA, PLAIN, BOTH], ids=["rotated", "causal", "both directions"])
@pytest.mark.parametrize("position", ["post_proj", "pre_proj"])
@pytest.mark.parametrize("share", ["per_head", "across_heads"])
def test_with_nothing_of_its_own_it_is_plain_attention(recipe: Recipe, position: Any, share: Any) -> None:
    relative, x = Relative(conv_pos=position, conv_share=share), random(2, 11, 16, seed=9)
    weights = without_convolution(layer(recipe, relative), middle=not recipe.causal)
    plain = mha(x, weights, recipe, key_padding=HOLES)
    zero = weights | {name: 0 * weights[name] for name in ("content_bias", "position_bias", "position_proj")}
    near(rcmha(x, zero, recipe, relative, key_padding=HOLES), plain)
    near(rcmha(x, weights, recipe, replace(relative, scores=None), key_padding=HOLES), plain)
    near(rcmha(x, weights, recipe, Relative(taps=0, scores=None), key_padding=HOLES), plain)
    assert float((rcmha(x, weights, recipe, relative, key_padding=HOLES) - plain).abs().max()) > 0.01


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("taps", [1, 2, 3, 4, 5])
def test_convolution_is_the_library_s(taps: int, causal: bool) -> None:
    x, weight, bias = random(9, 2, 3, seed=1), random(2, 3, taps, seed=2), random(2, 3, seed=3)
    ahead = 0 if causal else (taps - 1) // 2
    padded = functional.pad(x.flatten(1).T, (taps - 1 - ahead, ahead))
    expected = functional.conv1d(padded, weight.flatten(0, 1).flip(-1)[:, None], bias.flatten(), groups=6)
    near(convolve(x, weight, bias, causal), expected.T.unflatten(-1, (2, 3)))
    if not causal and taps % 2:
        same = functional.conv1d(
            x.flatten(1).T, weight.flatten(0, 1).flip(-1)[:, None], bias.flatten(), padding="same", groups=6
        )
        near(expected, same)


def test_convolutions_act_on_what_they_should() -> None:
    x = random(1, 7, 16, seed=9)
    shared = Relative(conv_share="across_heads", scores=None)
    weights = layer(PLAIN, shared)
    repeated = dict(weights)
    for name, heads in (("q", 4), ("k", 2), ("v", 2)):
        for kind in ("weight", "bias"):
            part = weights[f"{name}_conv.{kind}"]
            repeated[f"{name}_conv.{kind}"] = part.expand(heads, *part.shape)
    near(rcmha(x, weights, PLAIN, shared), rcmha(x, repeated, PLAIN, Relative(scores=None)))
    only_v = replace(shared, conv_on=("v",))
    still = without_convolution(weights)
    still |= {f"v_conv.{kind}": weights[f"v_conv.{kind}"] for kind in ("weight", "bias")}
    near(rcmha(x, weights, PLAIN, only_v), rcmha(x, still, PLAIN, shared))
    before = Relative(conv_pos="pre_proj", conv_on=("k",), scores=None)
    weights = layer(PLAIN, before)
    k = convolve(x[0], weights["k_conv.weight"], weights["k_conv.bias"], True) @ weights["k_proj.weight"].T
    q, v = (x[0] @ weights[f"{name}_proj.weight"].T for name in "qv")
    q, k, v = (t.unflatten(-1, (-1, 4)).transpose(0, 1)[None] for t in (q, k, v))
    out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    near(rcmha(x, weights, PLAIN, before), out.transpose(1, 2).flatten(2) @ weights["o_proj.weight"].T)


def relative_shift(x: Tensor, weights: dict[str, Tensor], memory: int) -> Tensor:
    """Transformer-XL's own arrangement: scores with every distance, then each row moved to its keys."""
    length = x.shape[1]
    q, k, v = (x @ weights[f"{name}_proj.weight"].T for name in "qkv")
    q, k, v = (t.unflatten(-1, (-1, 4)).transpose(1, 2) for t in (q, k, v))
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    q = q[:, :, memory:]
    content = (q + weights["content_bias"][:, None]) @ k.transpose(-1, -2)
    r = torch.stack([encoding(d, 6, 10000.0) for d in range(length - 1, -1, -1)])
    by_distance = torch.einsum("bhid,hde,te->bhit", q + weights["position_bias"][:, None], weights["position_proj"], r)
    rows = length - memory
    padded = functional.pad(by_distance, (1, 0)).reshape(len(x), 4, length + 1, rows)
    moved = padded[:, :, 1:].reshape(len(x), 4, rows, length)
    keep = torch.ones(rows, length, dtype=torch.bool).tril(memory)
    p = torch.softmax(((content + moved) / 2).masked_fill(~keep, -torch.inf), -1)
    return (p @ v).transpose(1, 2).flatten(2) @ weights["o_proj.weight"].T


@pytest.mark.parametrize("memory", [0, 1, 5])
def test_scores_are_those_of_transformer_xl(memory: int) -> None:
    x, relative = random(2, 11, 16, seed=9), Relative(taps=0)
    weights = layer(PLAIN, relative)
    ours = rcmha(x[:, memory:], weights, PLAIN, relative, memory=x[:, :memory])
    near(ours, relative_shift(x, weights, memory))


@pytest.mark.parametrize("position", ["post_proj", "pre_proj"])
@pytest.mark.parametrize("scores", ["sinusoidal", "learned", None])
@pytest.mark.parametrize("recipe", [GQA, PLAIN], ids=["rotated", "plain"])
def test_memory_goes_on_where_the_earlier_segment_ended(position: Any, scores: Any, recipe: Recipe) -> None:
    relative, x = Relative(conv_pos=position, scores=scores), random(2, 10, 16, seed=9)
    weights = {name: w.requires_grad_() for name, w in layer(recipe, relative).items()}
    whole = rcmha(x, weights, recipe, relative)
    for cut in (1, 2, 7, 9):
        earlier = x[:, :cut].clone().requires_grad_()
        rest = rcmha(x[:, cut:], weights, recipe, relative, memory=earlier)
        near(rest, whole[:, cut:])
        assert torch.autograd.grad(rest.sum(), earlier, allow_unused=True) == (None,)
    near(rcmha(x[:, :6], weights, recipe, relative), whole[:, :6])
    with pytest.raises(ValueError, match="memory needs causal attention"):
        rcmha(x, weights, replace(recipe, causal=False), relative, memory=x)


@pytest.mark.parametrize("position", ["post_proj", "pre_proj"])
def test_memory_gives_no_gradient_to_the_weights_that_made_it(position: Any) -> None:
    # The token itself is 0: what it reads, its convolutions included, was all computed before.
    relative = Relative(conv_pos=position)
    weights = {name: w.requires_grad_() for name, w in layer(PLAIN, relative).items()}
    out = rcmha(torch.zeros(1, 1, 16).double(), weights, PLAIN, relative, memory=random(1, 5, 16, seed=9))
    if position == "post_proj":
        grads = torch.autograd.grad(out.sum(), [weights[f"{name}_proj.weight"] for name in "qkv"])
        assert not any(bool(grad.any()) for grad in grads)
    (grad,) = torch.autograd.grad(
        rcmha(torch.zeros(1, 1, 16).double(), weights, PLAIN, relative, memory=random(1, 5, 16, seed=9)).sum(),
        weights["v_conv.weight"],
    )
    assert float(grad[..., 1:].abs().min()) > 0
    assert not bool(grad[..., 0].any())


def test_encoding_has_the_sines_first_and_the_fastest_waves_first() -> None:
    values = [math.sin(3), math.sin(0.3), math.cos(3), math.cos(0.3)]
    near(encoding(3, 4, 100.0), torch.tensor(values, dtype=torch.float64))


@pytest.mark.parametrize("recipe", [GQA, PLAIN, BOTH], ids=["rotated", "causal", "both directions"])
@pytest.mark.parametrize("scores", ["sinusoidal", "learned"])
def test_only_distances_count(recipe: Recipe, scores: Any) -> None:
    relative, x = Relative(scores=scores), random(2, 11, 16, seed=9)
    weights = layer(recipe, relative)
    here = rcmha(x, weights, recipe, relative)
    near(rcmha(x, weights, recipe, relative, positions=torch.arange(11) + 1000), here)
    assert float((rcmha(x, weights, recipe, relative, positions=2 * torch.arange(11)) - here).abs().max()) > 1e-3


@pytest.mark.parametrize("recipe", [PLAIN, BOTH], ids=["causal", "both directions"])
def test_a_table_of_the_encodings_is_the_encodings_and_is_clipped(recipe: Recipe) -> None:
    x, waves, table = random(1, 8, 16, seed=9), Relative(), Relative(scores="learned")
    weights = layer(recipe, waves)

    def rows(furthest: int) -> Tensor:
        first = 0 if recipe.causal else -furthest
        r = torch.stack([encoding(d, 6, 10000.0) for d in range(first, furthest + 1)])
        return torch.einsum("hde,te->htd", weights["position_proj"], r)

    long, short = weights | {"distance_table": rows(20)}, weights | {"distance_table": rows(2)}
    near(rcmha(x, long, recipe, table), rcmha(x, weights, recipe, waves))
    clipped = long["distance_table"].clone()
    first = 0 if recipe.causal else -20
    for row in range(clipped.shape[1]):
        distance = max(-2, min(row + first, 2))
        clipped[:, row] = long["distance_table"][:, distance - first]
    near(rcmha(x, short, recipe, table), rcmha(x, weights | {"distance_table": clipped}, recipe, table))
    assert float((rcmha(x, short, recipe, table) - rcmha(x, long, recipe, table)).abs().max()) > 1e-3


def test_in_both_directions_a_reversed_sequence_gives_the_reversed_result() -> None:
    x, relative = random(1, 9, 16, seed=9), Relative()
    weights = layer(BOTH, relative)
    mirrored = {name: w.flip(-1) if name.endswith("conv.weight") else w for name, w in weights.items()}
    # Sines change their sign with the distance, cosines do not.
    sign = torch.tensor([-1.0] * 3 + [1.0] * 3, dtype=torch.float64)
    mirrored["position_proj"] = weights["position_proj"] * sign
    near(rcmha(x.flip(1), mirrored, BOTH, relative), rcmha(x, weights, BOTH, relative).flip(1))


def test_gradients_reach_every_weight_in_use() -> None:
    x, relative = random(1, 6, 16, seed=9), Relative()
    weights = {name: w.requires_grad_() for name, w in layer(PLAIN, relative).items()}
    out = rcmha(x, weights, PLAIN, relative)
    names = [name for name in weights if name != "distance_table"]
    grads = torch.autograd.grad((out * random(1, 6, 16, seed=5)).sum(), [weights[name] for name in names])
    for name, grad in zip(names, grads, strict=True):
        # What all keys share moves all scores of a row alike, which a softmax does not see.
        largest = float(grad.abs().max())
        assert largest < 1e-12 if name == "k_conv.bias" else largest > 1e-6, name
