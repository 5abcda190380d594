r"""Multi-head attention with grouped keys, a window and a sink, one query of one head at a time.

Source: Vaswani et al. 2017, *Attention Is All You Need*, equation 1 (arXiv:1706.03762); grouped heads: Ainslie et al.
2023, *GQA* (arXiv:2305.13245); rotation: Su et al. 2021, *RoFormer*, equation 34 (arXiv:2104.09864); window and sink:
Xiao et al. 2023, *Efficient Streaming Language Models with Attention Sinks* (arXiv:2309.17453).

Letters: ``T`` tokens of one sequence without its padding, ``C`` model width, ``H`` query heads, ``G`` key heads, ``D``
head width, ``Dv`` value width; ``t`` a query's place among the real tokens, ``s`` a key's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Sees = Callable[[int, int, int], bool]
"""Whether the queries of a key head (first) at place t (second) may read place s (third), causality aside."""

Project = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""Tokens ``[T, C]`` to queries ``[T, H, D]``, keys ``[T, G, D]`` and values ``[T, G, Dv]``, not rotated."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The numbers every variant shares.

    Attributes:
        num_heads: Query heads.
        num_kv_heads: Key heads; query head h reads key head ``h // (num_heads // num_kv_heads)``.
        head_dim: Width of a query and of a key.
        scale: The factor on scores; ``None`` means ``head_dim ** -0.5``.
        causal: Whether a token reads only itself and earlier ones.
        rotary_base: Base of the rotation's wavelengths; ``None`` rotates nothing.
        rotary_dim: How many leading values of a head turn; ``None`` means all.
        interleaved: Whether neighbours form a plane, instead of the two halves.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float | None = None
    causal: bool = True
    rotary_base: float | None = 10000.0
    rotary_dim: int | None = None
    interleaved: bool = False


def linear(x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    """``x W^T + b`` with the weights called ``name.weight`` and, if there is one, ``name.bias``."""
    y = x @ weights[f"{name}.weight"].T
    bias = weights.get(f"{name}.bias")
    return y if bias is None else y + bias


def heads(x: Tensor, count: int) -> Tensor:
    """``[T, count * D]`` cut into ``[T, count, D]``."""
    return x.reshape(x.shape[0], count, x.shape[1] // count)


def rotate(x: Tensor, places: Tensor, recipe: Recipe) -> Tensor:
    """Turn the planes of every head by ``place * base ** (-2 f / width)``; ``x`` is ``[T, h, D]``."""
    if recipe.rotary_base is None:
        return x
    width = recipe.head_dim if recipe.rotary_dim is None else recipe.rotary_dim
    columns = list(x.unbind(-1))
    for f in range(width // 2):
        angle = places.double() * recipe.rotary_base ** (-2.0 * f / width)
        cos = angle.cos().to(x.dtype)[:, None]
        sin = angle.sin().to(x.dtype)[:, None]
        first, second = (2 * f, 2 * f + 1) if recipe.interleaved else (f, f + width // 2)
        a = x[..., first]
        b = x[..., second]
        columns[first] = a * cos - b * sin
        columns[second] = b * cos + a * sin
    return torch.stack(columns, -1)


def one_sequence(x: Tensor, places: Tensor, project: Project, recipe: Recipe, sees: Sees) -> Tensor:
    """Attention over the real tokens of one sequence, ``[T, C]`` to ``[T, H * Dv]``."""
    q, k, v = project(x)
    q = rotate(q, places, recipe)
    k = rotate(k, places, recipe)
    scale = 1.0 / math.sqrt(recipe.head_dim) if recipe.scale is None else recipe.scale
    tokens = range(x.shape[0])
    columns = []
    for h in range(recipe.num_heads):
        g = h // (recipe.num_heads // recipe.num_kv_heads)
        rows = []
        for t in tokens:
            seen = [s for s in tokens if (s <= t or not recipe.causal) and sees(g, t, s)]
            if not seen:
                rows.append(v.new_zeros(v.shape[-1]))
                continue
            weight = torch.softmax(scale * (k[seen, g] @ q[t, h]), 0)
            rows.append(weight @ v[seen, g])
        columns.append(torch.stack(rows) if rows else v.new_zeros(0, v.shape[-1]))
    return torch.cat(columns, -1)


def each_sequence(
    x: Tensor,
    weights: Mapping[str, Tensor],
    one: Callable[[Tensor, Tensor], Tensor],
    *,
    key_padding: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """A whole layer, ``[B, T, C]`` to ``[B, T, C]``: each sequence without its padding, alone, then ``o_proj``.

    Args:
        x: Tokens ``[B, T, C]``.
        weights: The layer's state dict; ``o_proj`` is used here.
        one: Real tokens ``[T, C]`` of one sequence and their positions ``[T]`` to ``[T, H * Dv]``. Called in the order
            of the batch, also for a sequence without a real token.
        key_padding: bool ``[B, T]``, true where a token is padding: it is read by nobody and comes out as 0.
        positions: ``[T]`` or ``[B, T]``; by default the place among the real tokens.
    """
    batch, length, _ = x.shape
    out = []
    for b in range(batch):
        real = [t for t in range(length) if key_padding is None or not bool(key_padding[b, t])]
        places = torch.arange(len(real)) if positions is None else positions.expand(batch, length)[b, real]
        rows: list[Tensor] = [x.new_zeros(x.shape[2])] * length
        y = linear(one(x[b, real], places), weights, "o_proj")
        for row, t in zip(y, real, strict=True):
            rows[t] = row
        out.append(torch.stack(rows))
    return torch.stack(out)


def attention(
    x: Tensor,
    weights: Mapping[str, Tensor],
    recipe: Recipe,
    *,
    project: Project,
    sees: Sees,
    key_padding: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """A whole layer of softmax attention over what each query sees.

    Args:
        x: Tokens ``[B, T, C]``.
        weights: The layer's state dict; ``o_proj`` is used here.
        recipe: The shared numbers.
        project: How queries, keys and values are made.
        sees: Which places are read.
        key_padding: bool ``[B, T]``, true where a token is padding.
        positions: ``[T]`` or ``[B, T]``, what the rotation uses.
    """

    def one(tokens: Tensor, places: Tensor) -> Tensor:
        return one_sequence(tokens, places, project, recipe, sees)

    return each_sequence(x, weights, one, key_padding=key_padding, positions=positions)


def separate(weights: Mapping[str, Tensor], recipe: Recipe) -> Project:
    """Queries, keys and values from ``q_proj``, ``k_proj`` and ``v_proj``."""

    def project(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (linear(x, weights, name) for name in ("q_proj", "k_proj", "v_proj"))
        return heads(q, recipe.num_heads), heads(k, recipe.num_kv_heads), heads(v, recipe.num_kv_heads)

    return project


def mha(
    x: Tensor,
    weights: Mapping[str, Tensor],
    recipe: Recipe,
    *,
    window: int | None = None,
    sink: int = 0,
    key_padding: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    r"""Softmax attention over everything, or over a window and a sink.

    .. math:: o_t = \sum_{s \in S(t)} softmax_s(\sigma q_t \cdot k_s) v_s,
              \quad S(t) = \{ s : 0 \le t - s < window \text{ or } s < sink, s \le t \}

    Args:
        x: Tokens ``[B, T, C]``.
        weights: ``q_proj``, ``k_proj``, ``v_proj``, ``o_proj``.
        recipe: The shared numbers. Not causal, the window reaches as far ahead as back.
        window: Tokens seen, the own one included; ``None`` sees all.
        sink: First tokens of the sequence that stay visible beside the window.
        key_padding: bool ``[B, T]``, true where a token is padding.
        positions: ``[T]`` or ``[B, T]``, for the rotation alone: window and causality go by place.
    """

    def sees(_: int, t: int, s: int) -> bool:
        return window is None or abs(t - s) < window or s < sink

    project = separate(weights, recipe)
    return attention(x, weights, recipe, project=project, sees=sees, key_padding=key_padding, positions=positions)
