r"""The parts of a small decoder, each head by itself.

Source: Touvron et al. 2023, *LLaMA* (arXiv:2302.13971); grouped heads: Ainslie et al. 2023, *GQA* (arXiv:2305.13245);
rotation: Su et al. 2021, *RoFormer*, equation 34 (arXiv:2104.09864), of planes made of a head's halves.

Letters: ``T`` tokens of a call, ``S`` tokens so far, ``C`` model width, ``H`` query heads, ``G`` KV heads, ``D`` head
width, ``V`` words; ``t`` a query's place in the sequence, ``s`` a key's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Node = tuple[int, int]
"""A layer and a query head of it."""


def sees_all(_head: int, _t: int, _s: int) -> bool:
    """Every earlier key is seen."""
    return True


@dataclass(frozen=True, eq=False, kw_only=True)
class Decoder:
    """A decoder: weights by the names of transformers' Llama, and the numbers that they do not say.

    Attributes:
        weights: The state dict; unembedding is by the embedding where there is no ``lm_head.weight``.
        layers: How many.
        heads: Query heads H.
        kv_heads: KV heads G; query head h reads KV head ``h // (H // G)``.
        head_dim: Width D.
        eps: What norms add to the mean of squares.
        base: Of the rotation's wavelengths.
        sees: Whether a query head at place t may read place s, causality aside.
    """

    weights: Mapping[str, Tensor]
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float = 1e-6
    base: float = 10000.0
    sees: Callable[[int, int, int], bool] = sees_all

    def weight(self, layer: int, name: str) -> Tensor:
        """A weight of a layer."""
        return self.weights[f"model.layers.{layer}.{name}.weight"]

    def bias(self, layer: int, name: str) -> Tensor | None:
        """A bias of a layer, where there is one."""
        return self.weights.get(f"model.layers.{layer}.{name}.bias")

    def norm(self, x: Tensor, name: str) -> Tensor:
        r""":math:`g \circ x / \sqrt{mean(x^2) + \epsilon}`, row by row."""
        weight = self.weights[f"model.{name}.weight"]
        return torch.stack([weight * (row / self.rms(row)) for row in x])

    def rms(self, row: Tensor) -> Tensor:
        """What a norm divides one row by."""
        return torch.sqrt((row * row).mean() + self.eps)

    def group(self) -> int:
        """Query heads of a KV head."""
        return self.heads // self.kv_heads

    def columns(self, head: int) -> slice:
        """Where a head stands among all heads' values."""
        return slice(head * self.head_dim, (head + 1) * self.head_dim)


def projected(x: Tensor, decoder: Decoder, layer: int, name: str, head: int) -> Tensor:
    """One head's queries, keys or values of rows ``[T, C]``, ``[T, D]``."""
    rows = decoder.columns(head)
    y = x @ decoder.weight(layer, f"self_attn.{name}")[rows].T
    bias = decoder.bias(layer, f"self_attn.{name}")
    return y if bias is None else y + bias[rows]


def turned(x: Tensor, first: int, decoder: Decoder) -> Tensor:
    """Turn the plane of values f and f + D/2 of rows ``[T, D]`` by ``t * base ** (-2 f / D)``."""
    half = decoder.head_dim // 2
    places = torch.arange(first, first + x.shape[0], dtype=torch.float64)
    columns = list(x.unbind(1))
    for f in range(half):
        angle = places * decoder.base ** (-2.0 * f / decoder.head_dim)
        cos = angle.cos().to(x.dtype)
        sin = angle.sin().to(x.dtype)
        columns[f] = x[:, f] * cos - x[:, f + half] * sin
        columns[f + half] = x[:, f + half] * cos + x[:, f] * sin
    return torch.stack(columns, 1)


def output(z: Tensor, decoder: Decoder, layer: int) -> Tensor:
    r""":math:`\sum_h W_O^h z_h + b` of ``[T, H, D]``, ``[T, C]``."""
    weight = decoder.weight(layer, "self_attn.o_proj")
    y = torch.zeros(z.shape[0], weight.shape[0], dtype=z.dtype)
    for head in range(decoder.heads):
        y = y + z[:, head] @ weight[:, decoder.columns(head)].T
    bias = decoder.bias(layer, "self_attn.o_proj")
    return y if bias is None else y + bias


def mlp(x: Tensor, decoder: Decoder, layer: int) -> Tensor:
    r""":math:`W_{down} (silu(W_{gate} x) \circ W_{up} x)`."""
    gate = x @ decoder.weight(layer, "mlp.gate_proj").T
    up = x @ decoder.weight(layer, "mlp.up_proj").T
    return (gate * torch.sigmoid(gate) * up) @ decoder.weight(layer, "mlp.down_proj").T


def unembedded(x: Tensor, decoder: Decoder) -> Tensor:
    """The last norm and the words' scores of rows ``[T, C]``, ``[T, V]``."""
    words = decoder.weights.get("lm_head.weight", decoder.weights["model.embed_tokens.weight"])
    return decoder.norm(x, "norm") @ words.T
