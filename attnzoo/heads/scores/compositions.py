r"""How much of what one head writes another one reads, by their weights alone.

With :math:`W_{OV} = W_O W_V` of a head a, and :math:`W_{QK}` of a head b of a later layer, the score of b's queries is

.. math:: \frac{\lVert W_{QK}^T W_{OV} \rVert_F}{\lVert W_{QK} \rVert_F \lVert W_{OV} \rVert_F},

with :math:`W_{QK}` for its keys, and with b's own :math:`W_{OV}` for its values.

Source: Elhage et al. 2021, *A Mathematical Framework for Transformer Circuits*, section "Two-layer attention only
transformers"; between heads of larger models: Merullo et al. 2024, *Talking Heads* (arXiv:2406.09519), whose components
of a head are not taken apart here. Departures: queries and keys that are rotated make another product at each distance,
so that there is a score at distance 0 and a mean over 0 to 64; norms' weights are in what is read.

Letters: C model width, D head width, Dv value width, n and m heads on either side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from attnzoo.base.rope import apply_rotary, rotation_tables
from attnzoo.heads.decoder import DecoderParts, decoder_parts, weights_at
from attnzoo.reporting.choices import check_choice
from attnzoo.surgery.hosts.families.known import block_of
from attnzoo_kernels.errors import ConfigError, UnsupportedError

KINDS = ("qk", "k", "v")
OFFSETS = 65
"""Distances that a mean is over."""

Head = tuple[int, int]

_NORMS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm")
"""What some blocks normalise queries and keys by."""


@dataclass(frozen=True, eq=False)
class Composition:
    """How much of what heads a write heads b read.

    Attributes:
        at_zero: For a query and a key at the same place, fp64 ``[n, m]`` on the CPU.
        mean: Over distances from 0 to 64; the same where nothing is rotated, and for values.
        kind: "qk", by queries; "k", by keys; "v", by values.
    """

    at_zero: Tensor
    mean: Tensor
    kind: str


def composition(
    model: Any, a: Head | Sequence[Head], b: Head | Sequence[Head], kind: Literal["qk", "k", "v"] = "qk"
) -> Composition:
    """How much of what heads a write heads b read.

    Args:
        model: A decoder of a known family whose weights are plain.
        a: One (layer, head), or n of them.
        b: One, or m, each of a layer behind those of a.
        kind: What of b reads: "qk", its queries; "k", its keys; "v", its values.

    Raises:
        ConfigError: If there is no such head, or b is not behind a.
        UnsupportedError: If the model is no decoder whose layers add to a stream, a weight is none, or queries or keys
            are normalised, which no product of weights stands for.
    """
    check_choice("kind", kind, KINDS)
    parts = decoder_parts(model)
    writers, readers = _heads("a", a), _heads("b", b)
    if max(layer for layer, _ in writers) >= min(layer for layer, _ in readers):
        raise ConfigError(f"b: expected heads of layers behind those of a, got {readers} behind {writers}")
    for layer in {layer for layer, _ in readers} if kind != "v" else ():
        _check_products(model, parts, layer)
    with torch.no_grad():
        sending = [_Circuit.of(model, parts, head, "a") for head in writers]
        reading = [_Circuit.of(model, parts, head, "b") for head in readers]
        rows = [[_score(one, other, kind) for other in reading] for one in sending]
    table = torch.stack([torch.stack(row) for row in rows])  # [n, m, offsets]
    return Composition(table[..., 0], table.mean(-1), kind)


@dataclass(frozen=True, eq=False)
class _Circuit:
    """A head's weights behind the norm that it reads through, in fp64.

    Attributes:
        q: At each distance, ``[offsets, D, C]``; one where nothing is rotated.
        k: ``[D, C]``.
        v: ``[Dv, C]``.
        o: ``[C, Dv]``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor

    @classmethod
    def of(cls, model: Any, parts: DecoderParts, head: Head, name: str) -> _Circuit:
        number, index = head
        if not 0 <= number < len(parts.layers):
            raise ConfigError(f"{name}: expected layers below {len(parts.layers)}, got {head}")
        layer = parts.layers[number]
        p = weights_at(model, layer.block)
        if not 0 <= index < p.num_heads:
            raise ConfigError(f"{name}: expected heads below {p.num_heads}, got {head}")
        width = p.o.shape[1] // p.num_heads
        group = index // (p.num_heads // p.num_kv_heads)

        def rows(weight: Tensor, number: int, size: int) -> Tensor:
            own = weight[number * size : (number + 1) * size].double().cpu()
            return own if layer.reads is None else _read(layer.reads, own)

        o = p.o[:, index * width : (index + 1) * width].double().cpu()  # [C, Dv]
        if layer.output is not None:
            o = _read(layer.output, o.T).T
        q = rows(p.q, index, p.head_dim)[None]
        planes = block_of(model.get_submodule(layer.block)).planes
        if p.rotary is not None:
            cos, sin = rotation_tables(p.rotary, p.head_dim, OFFSETS, torch.float64, q.device)
            # Columns of the weight as heads at one position after the other.
            turned = apply_rotary(q.mT.unsqueeze(2).expand(-1, -1, OFFSETS, -1), cos, sin, planes == "neighbours")
            q = turned[0].permute(1, 2, 0)  # [offsets, D, C]
        return cls(q, rows(p.k, group, p.head_dim), rows(p.v, group, width), o)


def _check_products(model: Any, parts: DecoderParts, number: int) -> None:
    """Raises where scores are no products with weights.

    Raises:
        UnsupportedError: If queries or keys are normalised.
    """
    if number < len(parts.layers):
        block = parts.layers[number].block
        norms = [name for name in _NORMS if name in model.get_submodule(block)._modules]
        if norms:
            raise UnsupportedError(f"kind: expected 'v' at {block}, whose {norms[0]} no product of weights stands for")


def _read(norm: Any, weight: Tensor) -> Tensor:
    """A weight ``[n, C]`` behind a norm, in fp64."""
    found: Tensor = norm.less_mean(weight * norm.gain.double().cpu())
    return found


def _score(one: _Circuit, other: _Circuit, kind: str) -> Tensor:
    """At each distance how much of what one head writes the other one reads, ``[65]``."""
    # Norms of products of narrow matrices, by what is D wide: |X Y|^2 is the trace of X^T X times Y Y^T.
    sent = one.v @ one.v.mT  # [Dv, Dv]
    whole = _trace(one.o.mT @ one.o, sent)
    if kind == "v":
        through = other.v @ one.o  # [Dv, Dv]
        written = other.o.mT @ other.o
        found = _trace(written, through @ sent @ through.mT) / _trace(written, other.v @ other.v.mT) / whole
        return found.sqrt().expand(OFFSETS)
    keys = other.k @ other.k.mT  # [D, D]
    queries = other.q @ other.q.mT  # [offsets, D, D]
    products = _trace(keys, queries)  # [offsets]
    if kind == "qk":
        through = other.q @ one.o  # [offsets, D, Dv]
        found = _trace(keys, through @ sent @ through.mT)
    else:
        through = other.k @ one.o
        found = _trace(queries, through @ sent @ through.mT)
    return (found / products / whole).sqrt().expand(OFFSETS)


def _trace(x: Tensor, y: Tensor) -> Tensor:
    """The trace of a product of symmetric matrices."""
    return (x * y).sum((-2, -1))


def _heads(name: str, given: Any) -> list[Head]:
    """One head or several.

    Raises:
        ConfigError: If it is neither.
    """
    pairs = [given] if isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], int) else given
    try:
        found = [(int(layer), int(head)) for layer, head in pairs]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name}: expected (layer, head), or several, got {given!r}") from error
    if not found:
        raise ConfigError(f"{name}: expected at least one (layer, head), got none")
    return found
