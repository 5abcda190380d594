"""torch's own multi-head attention, wherever it stands: in encoder and decoder layers, alone, reading other tokens.

Recognised by its exact class: a subclass, or one whose weights are parametrized, computes something else. What takes
its place is :class:`attnzoo.MultiheadAttention` round the very same weights; it is found again as one of this family.

Letters: B batch, T query tokens, C model width, H heads, D head width.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.nn.functional import linear

from attnzoo.surgery.hosts.block import AttentionBlock, Family, Need
from attnzoo.surgery.hosts.projections import Projections
from attnzoo.torch_mha.module import MultiheadAttention
from attnzoo.torch_mha.packed import WEIGHTS
from attnzoo_kernels.errors import ConversionError

HOST = "torch"

_NO_INTERFACE = "it has no cache and no attention interface, by which rows would be read from one"
_WIDTHS = "torch's module has one key head for each query head, and no other projections"


def describe(module: nn.Module) -> AttentionBlock:
    """A module of this family."""
    host: Any = module
    heads = int(host.num_heads)
    width = int(host.embed_dim)
    return AttentionBlock(
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        value_dim=width // heads,
        width=width,
        cached_values=_nothing,
        project=partial(_project, host),
        output=partial(_output, host),
        projections={},
        weights=partial(_weights, host),
        rotary=_no_rotary,
        rope_type=None,
        planes=None,
        scale=float((width // heads) ** -0.5),
        causal=False,
        window=None,
        reply="pair",
        reasons={Need.READING: (_NO_INTERFACE,), Need.WEIGHTS: (_WIDTHS,), Need.REPLACING: _reasons(host)},
        dropout=float(host.dropout),
        # torch's own module hands its output projection's weights to a function.
        output_path="out_proj" if isinstance(host, MultiheadAttention) else None,
    )


def _nothing() -> int:
    return 0


def _no_rotary() -> None:
    return None


def _reasons(host: Any) -> tuple[str, ...]:
    """Why nothing can be put round a module's weights."""
    odd = [name for name in WEIGHTS if getattr(host, name) is not None and host._parameters.get(name) is None]
    if odd:
        return (f"its {odd[0]} is computed from other tensors; make it a parameter first",)
    if isinstance(host, MultiheadAttention) and next(host.layer.parameters(), None) is not None:
        return (f"it is a replacement by {host.variant!r} already, whose weights would be lost; undo that first",)
    return ()


def _project(host: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of ``x [B, T, C]``, heads apart."""
    packed = _packed(host)
    heads = linear(x, packed, host.in_proj_bias).unflatten(-1, (3, host.num_heads, -1))  # [B, T, 3, H, D]
    q, k, v = heads.transpose(1, 3).unbind(2)
    return q, k, v


def _output(host: Any, y: Tensor) -> Tensor:
    out: Tensor = host.out_proj(y)
    return out


def _packed(host: Any) -> Tensor:
    """The weight of all three projections.

    Raises:
        ConversionError: If keys or values have a width of their own, so that there are three.
    """
    if host.in_proj_weight is None:
        raise ConversionError("in_proj_weight: expected one for queries, keys and values, got three (kdim, vdim)")
    packed: Tensor = host.in_proj_weight
    return packed


def _weights(host: Any) -> Projections:
    """The weights of a module, by reference."""
    q, k, v = _packed(host).chunk(3)
    bias = host.in_proj_bias
    q_bias, k_bias, v_bias = (None, None, None) if bias is None else bias.chunk(3)
    return Projections(
        q=q,
        k=k,
        v=v,
        o=host.out_proj.weight,
        q_bias=q_bias,
        k_bias=k_bias,
        v_bias=v_bias,
        o_bias=host.out_proj.bias,
        num_heads=int(host.num_heads),
        num_kv_heads=int(host.num_heads),
        head_dim=int(host.embed_dim) // int(host.num_heads),
        rotary=None,
        scale=float((host.embed_dim // host.num_heads) ** -0.5),
    )


def with_weights(module: nn.Module, projections: Projections) -> NoReturn:
    """Refuses: there are no other weights that such a module could have.

    Raises:
        ConversionError: Always.
    """
    raise ConversionError(f"weights: {_WIDTHS}")


def _is_torchs(module: nn.Module) -> bool:
    """Whether a module is of exactly torch's class, or of the one that takes its place."""
    return type(module) in (nn.MultiheadAttention, MultiheadAttention)


FAMILY = Family(
    name=HOST,
    classes=("MultiheadAttention",),
    block=describe,
    with_weights=with_weights,
    recognise=_is_torchs,
)
