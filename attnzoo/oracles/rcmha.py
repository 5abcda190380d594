r"""Relative convolutional attention: convolved projections and scores by distance, one query of one head at a time.

Source: Sugiharto et al. 2023, *RCMHA: Relative Convolutional Multi-Head Attention for Natural Language Modelling*
(arXiv:2308.03429); the scores: Dai et al. 2019, *Transformer-XL* (arXiv:1901.02860); the convolutions: So et al. 2021,
*Primer* (arXiv:2109.08668). Without relative scores it is Primer's MDHA, without convolutions RMHA.

Letters: ``i`` a query's place among the real tokens, ``j`` a key's; ``n`` taps; ``H`` query heads, ``G`` key heads,
``D`` head width; ``d_r`` width of a distance's encoding; ``P`` the largest distance that is told apart.

Decided where the sources leave it open:

- Tap r multiplies the token r places back: it is the last dimension of the weights, ``[..., r]``. In both directions it
  multiplies the token at ``t - r + (n - 1) // 2``. Beyond the ends of a sequence lie zeros; padding is taken out first,
  so that what stands on its two sides become neighbours.
- Before the projections the channels are those of the model, ``[C, n]``, separately for q, k and v, and no heads are
  told apart there; after them ``[heads, D, n]``, or ``[D, n]`` shared by the heads.
- Without relative scores there is no bias u either: plain scores.
- With a rotation (a converted model keeps its own), ``q + u`` is rotated as a whole, like k, after the convolution; the
  relative term uses the query before. Any other order would depend on where the sequence begins.
- Distances are differences of ``positions`` where these are given; a convolution goes by places.
- Learned distances: ``R[min(i - j, P)]``, causal; in both directions the table has ``2 P + 1`` rows and the row of a
  distance is ``clip(i - j, -P, P) + P``. It takes the place of ``W_R r``, so that v meets it as well.
- Memory, earlier tokens of the same sequences, is what a cache keeps: the convolution goes on over it, its keys are
  read, and nothing that was computed from it has a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attnzoo.oracles.mha import Recipe, each_sequence, heads, linear, rotate


@dataclass(frozen=True, kw_only=True)
class Relative:
    """What is convolved, and how distances count.

    Attributes:
        taps: Tokens that a convolution sees; 0 convolves nothing.
        conv_on: What is convolved.
        conv_share: Whether each head has its own convolution or all share one.
        conv_pos: Whether the projections are convolved or what is projected.
        scores: "sinusoidal" encodings of distances, a "learned" table, or ``None``.
        base: Base of the encoding's wavelengths.
    """

    taps: int = 3
    conv_on: tuple[Literal["q", "k", "v"], ...] = ("q", "k", "v")
    conv_share: Literal["per_head", "across_heads"] = "per_head"
    conv_pos: Literal["post_proj", "pre_proj"] = "post_proj"
    scores: Literal["sinusoidal", "learned"] | None = "sinusoidal"
    base: float = 10000.0


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
    r"""Each channel by itself: ``x [T, ..]``, ``weight [.., n]``, ``bias [..]`` to ``[T, ..]``.

    .. math:: y_t = \sum_r \omega_r x_{t - r + a} + \beta, \quad a = 0 \text{ or } \lfloor (n - 1) / 2 \rfloor
    """
    taps = weight.shape[-1]
    ahead = 0 if causal else (taps - 1) // 2
    rows = []
    for t in range(len(x)):
        y = torch.zeros_like(x[t]) if bias is None else torch.zeros_like(x[t]) + bias
        for r in range(taps):
            if 0 <= t - r + ahead < len(x):
                y = y + weight[..., r] * x[t - r + ahead]
        rows.append(y)
    return torch.stack(rows) if rows else x


def projected(
    x: Tensor, memory: Tensor, weights: Mapping[str, Tensor], recipe: Recipe, relative: Relative, name: str
) -> Tensor:
    """Queries, keys or values ``[M + T, h, D]`` of ``memory [M, C]`` and ``x [T, C]``, by ``name`` "q", "k" or "v"."""
    count = recipe.num_heads if name == "q" else recipe.num_kv_heads
    convolves = relative.taps > 0 and name in relative.conv_on
    weight = weights.get(f"{name}_conv.weight")
    bias = weights.get(f"{name}_conv.bias")
    seen = [memory.detach(), x]
    if relative.conv_pos == "pre_proj":
        both = torch.cat(seen)
        if convolves and weight is not None:
            both = convolve(both, weight, bias, recipe.causal)
        y = heads(linear(both, weights, f"{name}_proj"), count)
    else:
        before, now = (heads(linear(part, weights, f"{name}_proj"), count) for part in seen)
        y = torch.cat([before.detach(), now])
        if convolves and weight is not None:
            y = convolve(y, weight, bias, recipe.causal)
    return torch.cat([y[: len(memory)].detach(), y[len(memory) :]])


def encoding(distance: int, width: int, base: float) -> Tensor:
    r"""A distance as waves, fp64 ``[d_r]``: first all sines, then all cosines.

    .. math:: r_\delta = [\sin(\delta \omega_f) \| \cos(\delta \omega_f)], \quad \omega_f = base^{-2 f / d_r}
    """
    angles = [distance * base ** (-2.0 * f / width) for f in range(width // 2)]
    return torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles], dtype=torch.float64)


def distance_vector(weights: Mapping[str, Tensor], recipe: Recipe, relative: Relative, h: int, distance: int) -> Tensor:
    """What a query of head h meets at a distance, ``[D]``: ``W_R r`` or a row of the table."""
    if relative.scores == "learned":
        table = weights["distance_table"][h]
        if recipe.causal:
            return table[min(distance, len(table) - 1)]
        furthest = len(table) // 2
        return table[max(-furthest, min(distance, furthest)) + furthest]
    project = weights["position_proj"][h]
    return project @ encoding(distance, project.shape[1], relative.base).to(project.dtype)


def one_sequence(
    x: Tensor, memory: Tensor, places: Tensor, weights: Mapping[str, Tensor], recipe: Recipe, relative: Relative
) -> Tensor:
    """``x [T, C]`` and ``memory [M, C]`` at ``places [M + T]`` to ``[T, H * Dv]``."""
    q, k, v = (projected(x, memory, weights, recipe, relative, name) for name in "qkv")
    scale = 1.0 / math.sqrt(recipe.head_dim) if recipe.scale is None else recipe.scale
    content = q if relative.scores is None else q + weights["content_bias"]
    content = rotate(content, places, recipe)
    k = rotate(k, places, recipe)
    columns = []
    for h in range(recipe.num_heads):
        g = h // (recipe.num_heads // recipe.num_kv_heads)
        rows = [v.new_zeros(0, v.shape[-1])]
        vectors: dict[int, Tensor] = {}
        for i in range(len(memory), len(q)):
            scores = []
            for j in range(i + 1 if recipe.causal else len(k)):
                score = content[i, h] @ k[j, g]
                if relative.scores is not None:
                    distance = int(places[i] - places[j])
                    if distance not in vectors:
                        vectors[distance] = distance_vector(weights, recipe, relative, h, distance)
                    score = score + (q[i, h] + weights["position_bias"][h]) @ vectors[distance]
                scores.append(scale * score)
            rows.append((torch.softmax(torch.stack(scores), 0) @ v[: len(scores), g])[None])
        columns.append(torch.cat(rows))
    return torch.cat(columns, -1)


def rcmha(
    x: Tensor,
    weights: Mapping[str, Tensor],
    recipe: Recipe,
    relative: Relative,
    *,
    memory: Tensor | None = None,
    key_padding: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    r"""Softmax attention with convolved queries, keys and values whose scores also know the distance.

    .. math:: A_{ij} = \sigma ((q_i + u) \cdot k_j + (q_i + v) \cdot W_R r_{i - j})

    Args:
        x: Tokens ``[B, T, C]``.
        weights: ``q_proj``, ``k_proj``, ``v_proj``, ``o_proj``; for what is convolved ``q_conv.weight`` and perhaps
            ``q_conv.bias`` (``k_conv``, ``v_conv``); with relative scores ``content_bias [H, D]`` (u), ``position_bias
            [H, D]`` (v) and ``position_proj [H, D, d_r]`` (W_R) or ``distance_table [H, P + 1, D]``.
        recipe: The shared numbers; ``rotary_base=None`` unless the layer also rotates.
        relative: What is convolved, and how distances count.
        memory: Earlier tokens ``[B, M, C]`` of the same sequences, none of them padding; causal attention alone.
        key_padding: bool ``[B, T]``, true where a token is padding.
        positions: Integers ``[T]`` or ``[B, T]``; by default the place among the real tokens, memory included. Not
            together with memory.

    Raises:
        ValueError: If memory comes with positions or with attention in both directions.
    """
    if memory is not None and (positions is not None or not recipe.causal):
        raise ValueError("memory needs causal attention and the default positions")
    sequences = iter(x.new_zeros(len(x), 0, x.shape[-1]) if memory is None else memory)

    def one(tokens: Tensor, places: Tensor) -> Tensor:
        earlier = next(sequences)
        if len(earlier):
            places = torch.arange(len(earlier) + len(tokens))
        return one_sequence(tokens, earlier, places, weights=weights, recipe=recipe, relative=relative)

    return each_sequence(x, weights, one, key_padding=key_padding, positions=positions)
