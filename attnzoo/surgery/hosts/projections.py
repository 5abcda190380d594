"""The weights of an attention block by role, whatever the host calls them.

Letters: C model width, H query heads, G KV heads, D head width, Dv value width, r latent width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from attnzoo.base.rope import RotaryConfig
from attnzoo.surgery.hosts.weights import is_conv1d, type_name
from attnzoo_kernels.errors import ConversionError


@dataclass(frozen=True, eq=False, kw_only=True)
class Projections:
    """Weights as in ``nn.Linear``, rows ordered by head.

    Attributes:
        q: ``[H * D, C]``.
        k: ``[G * D, C]``.
        v: ``[G * Dv, C]``.
        o: ``[C, H * Dv]``.
        q_bias: ``[H * D]`` or ``None``.
        k_bias: ``[G * D]`` or ``None``.
        v_bias: ``[G * Dv]`` or ``None``.
        o_bias: ``[C]`` or ``None``.
        num_heads: H.
        num_kv_heads: G.
        head_dim: D.
        rotary: How queries and keys are rotated after projection; ``None`` if they are not.
        scale: The factor on scores.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary: RotaryConfig | None
    scale: float

    @classmethod
    def of_linears(cls, linears: Iterable[Any], *, head_dim: int, rotary: RotaryConfig | None, scale: float) -> Self:
        """Those of four modules with plain weights, by reference: of queries, keys, values and outputs."""
        q, k, v, o = linears
        return cls(
            q=q.weight,
            k=k.weight,
            v=v.weight,
            o=o.weight,
            q_bias=q.bias,
            k_bias=k.bias,
            v_bias=v.bias,
            o_bias=o.bias,
            num_heads=q.out_features // head_dim,
            num_kv_heads=k.out_features // head_dim,
            head_dim=head_dim,
            rotary=rotary,
            scale=scale,
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class LatentProjections:
    """Weights of the latent form: keys and values of all heads are expanded from r cached values.

    Attributes:
        q: ``[H * D, C]``.
        down: ``[r, C]``.
        up: ``[G * (D + Dv), r]``, keys first.
        o: ``[C, H * Dv]``.
        q_bias: ``[H * D]`` or ``None``.
        down_bias: ``[r]`` or ``None``.
        o_bias: ``[C]`` or ``None``.
        num_heads: H.
        num_kv_heads: G.
        head_dim: D.
        rotary: How queries and keys are rotated.
        scale: The factor on scores.
    """

    q: Tensor
    down: Tensor
    up: Tensor
    o: Tensor
    q_bias: Tensor | None = None
    down_bias: Tensor | None = None
    o_bias: Tensor | None = None
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary: RotaryConfig | None
    scale: float

    @classmethod
    def beside(cls, p: Projections, down: Tensor, up: Tensor, down_bias: Tensor | None) -> Self:
        """Latent keys and values beside the queries, the output and the geometry of other projections."""
        return cls(
            q=p.q,
            down=down,
            up=up,
            o=p.o,
            q_bias=p.q_bias,
            down_bias=down_bias,
            o_bias=p.o_bias,
            num_heads=p.num_heads,
            num_kv_heads=p.num_kv_heads,
            head_dim=p.head_dim,
            rotary=p.rotary,
            scale=p.scale,
        )


def with_kv_heads(projections: Projections, count: int) -> Projections:
    """The same projections with zeros for ``count`` KV heads: to be loaded into."""
    p = projections
    rows = {role: count * weight.shape[0] // p.num_kv_heads for role, weight in (("k", p.k), ("v", p.v))}
    return replace(
        p,
        k=p.k.new_zeros(rows["k"], p.k.shape[1]),
        v=p.v.new_zeros(rows["v"], p.v.shape[1]),
        k_bias=None if p.k_bias is None else p.k_bias.new_zeros(rows["k"]),
        v_bias=None if p.v_bias is None else p.v_bias.new_zeros(rows["v"]),
        num_kv_heads=count,
    )


def latent_like(projections: Projections, rank: int) -> LatentProjections:
    """Weights of the sizes that a latent of a block with these projections would have, zero: to be loaded into."""
    p = projections
    constant = any(bias is not None for bias in (p.q_bias, p.k_bias, p.v_bias))
    return LatentProjections.beside(
        p,
        down=p.k.new_zeros(rank, p.k.shape[1]),
        up=p.k.new_zeros(p.k.shape[0] + p.v.shape[0], rank),
        down_bias=p.k.new_zeros(rank) if constant else None,
    )


def size_of(module: nn.Module, name: str, which: Literal["in_features", "out_features"]) -> int:
    """A size of a child that projects, whatever else it is.

    Raises:
        ConversionError: If it does not say it.
    """
    child = getattr(module, name)
    size = getattr(child, which, None)
    if not isinstance(size, int):
        raise ConversionError(f"{name}: expected an nn.Linear, got {type_name(child)}, which has no {which}")
    return size


def as_linear(child: Any, name: str) -> nn.Linear:
    """A module that projects and must be an ``nn.Linear``.

    Raises:
        ConversionError: If it is none, by its name.
    """
    if not isinstance(child, nn.Linear):
        raise ConversionError(f"{name}: expected an nn.Linear, got {type_name(child)}")
    return child


def product_weights(child: Any, name: str) -> tuple[Tensor, Tensor | None]:
    """The weight ``[out, in]`` and the bias of a plain product: an ``nn.Linear``, or the transposed one of GPT-2.

    Raises:
        ConversionError: If it is neither, by its name.
    """
    if is_conv1d(child):
        return child.weight.T, child.bias
    linear = as_linear(child, name)
    return linear.weight, linear.bias


def new_linear(weight: Tensor, bias: Tensor | None, like: Any) -> nn.Linear:
    """A linear layer with weights of its own, as :func:`set_weights` gives them."""
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    set_weights(linear, weight, bias, like=like)
    return linear


def set_weights(product: Any, weight: Tensor, bias: Tensor | None, like: Any) -> None:
    """Gives a plain product weights of its own, in the dtype, on the device and as trainable as ``like``.

    Args:
        product: An ``nn.Linear``, or the transposed product of GPT-2.
        weight: ``[out, in]``.
        bias: ``[out]``, or ``None``.
        like: Another such product.

    Raises:
        ConversionError: If there is a bias where the layer has none, or none where it has one.
    """
    if (bias is None) != (product.bias is None):
        raise ConversionError(
            "bias: expected the host's class to have one where the new weights have one, and none where not"
        )
    trainable = like.weight.requires_grad
    stored = weight.T if is_conv1d(product) else weight
    own = stored.detach().to(like.weight).clone(memory_format=torch.contiguous_format)
    product.weight = nn.Parameter(own, requires_grad=trainable)
    if bias is not None:
        product.bias = nn.Parameter(bias.detach().to(like.weight).clone(), requires_grad=trainable)
    if is_conv1d(product):
        product.nx, product.nf = own.shape
    else:
        product.in_features = weight.shape[1]
        product.out_features = weight.shape[0]
