r"""What single heads do to what a small decoder says: one run of it for each question, and no shortcut.

Source: activation patching: Vig et al. 2020, *Causal Mediation Analysis for Interpreting Neural NLP*
(arXiv:2004.12265), and with other heads kept: Jin et al. 2024, *Cutting Off the Head Ends the Conflict* (PH3,
arXiv:2402.18154); path patching: Wang et al. 2022, *Interpretability in the Wild* (arXiv:2211.00593), and
Goldowsky-Dill et al. 2023, *Localizing Model Behavior with Path Patching* (arXiv:2304.05969); contributions: Elhage et
al. 2021, *A Mathematical Framework for Transformer Circuits*; attribution: Nanda 2023, *Attribution Patching*;
divergence: He et al. 2024, *Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence*
(arXiv:2412.13949).

A metric takes logits ``[T, V]`` and gives one number. Letters are those of ``decoder.py``; ``L`` layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from attnzoo.oracles.heads.decoder import Decoder, Node
from attnzoo.oracles.heads.edits import DecoderRun, Edit, run

Metric = Callable[[Tensor], Tensor]
"""Logits ``[T, V]`` to one number."""


def nodes(decoder: Decoder) -> list[Node]:
    """All heads, layer by layer."""
    return [(layer, head) for layer in range(decoder.layers) for head in range(decoder.heads)]


def by_node(decoder: Decoder, values: Iterable[Tensor]) -> Tensor:
    """A value for each of :func:`nodes` as ``[L, H, ...]``."""
    stacked = torch.stack(list(values))
    return stacked.reshape(decoder.layers, decoder.heads, *stacked.shape[1:])


def share(x: Tensor, found: DecoderRun, decoder: Decoder, direction: Tensor) -> Tensor:
    r"""The part of rows ``[T, C]`` of the last stream in a direction ``[C]`` behind the last norm, ``[T]``.

    .. math:: \frac{x_t \circ g}{rms(r_t)} \cdot u
    """
    weight = decoder.weights["model.norm.weight"]
    return torch.stack([(x[t] / decoder.rms(found.streams[-1][t]) * weight) @ direction for t in range(x.shape[0])])


def contributions(found: DecoderRun, decoder: Decoder, direction: Tensor) -> Tensor:
    """The :func:`share` of each head's :math:`W_O^h z_{h,t}`, ``[L, H, T]``; biases belong to no head."""
    values = []
    for layer, head in nodes(decoder):
        weight = decoder.weight(layer, "self_attn.o_proj")[:, decoder.columns(head)]
        values.append(share(found.z[layer][:, head] @ weight.T, found, decoder, direction))
    return by_node(decoder, values)


def with_edits(ids: Sequence[int], decoder: Decoder, metric: Metric, edit: Callable[[int, int], Edit]) -> Tensor:
    """The metric with one head edited, for each head, ``[L, H]``."""
    return by_node(decoder, (metric(run(ids, decoder, [edit(*node)]).logits) for node in nodes(decoder)))


def z_of(found: DecoderRun, chosen: Iterable[Node]) -> dict[Node, Tensor]:
    """What some heads put out in a run ``[T, D]``."""
    return {(layer, head): found.z[layer][:, head] for layer, head in chosen}


def patched(
    clean: Sequence[int], corrupt: Sequence[int], decoder: Decoder, senders: Iterable[Node], *, freeze: bool
) -> DecoderRun:
    """The clean run in which some heads put out what they do in the corrupt one.

    Args:
        clean: Tokens.
        corrupt: As many.
        decoder: The model.
        senders: Those heads.
        freeze: Whether all others put out what they do in the clean run; MLPs and norms answer in any case.
    """
    put = z_of(run(clean, decoder), nodes(decoder)) if freeze else {}
    put |= z_of(run(corrupt, decoder), senders)
    return run(clean, decoder, put=put)


def path(
    clean: Sequence[int],
    corrupt: Sequence[int],
    decoder: Decoder,
    senders: Iterable[Node],
    receivers: Iterable[Node],
) -> DecoderRun:
    """The clean run in which some heads read what comes to them from others on no way through a third head.

    The passes: what all heads put out in both runs; what receivers read where senders put out what they do in the
    corrupt run, and all other heads, receivers too, what they do in the clean one; the clean run where they read that.
    """
    direct = patched(clean, corrupt, decoder, senders, freeze=True)
    return run(clean, decoder, reads={(layer, head): direct.streams[layer] for layer, head in receivers})


def gradients(ids: Sequence[int], decoder: Decoder, metric: Metric) -> Tensor:
    """Of the metric by what each head puts out, where all others answer, ``[L, H, T, D]``."""
    embedding = "model.embed_tokens.weight"
    watched = decoder.weights[embedding].detach().clone().requires_grad_()
    found = run(ids, replace(decoder, weights={**decoder.weights, embedding: watched}))
    slopes = torch.autograd.grad(metric(found.logits), found.z)
    return torch.stack([slope.transpose(0, 1) for slope in slopes])


def attribution(clean: Sequence[int], corrupt: Sequence[int], decoder: Decoder, slope: Tensor) -> Tensor:
    r""":math:`\sum_{t,d} \frac{dM}{dz} (z^{clean} - z^{corrupt})` for slopes ``[L, H, T, D]``, ``[L, H]``."""
    kept, other = run(clean, decoder), run(corrupt, decoder)
    values = [
        (slope[layer, head] * (kept.z[layer][:, head] - other.z[layer][:, head])).sum()
        for layer, head in nodes(decoder)
    ]
    return by_node(decoder, values)


def divergence(ids: Sequence[int], without: Sequence[int], decoder: Decoder) -> Tensor:
    """How far z lies from what it is without a context, at the last tokens that both have, ``[L, H, n]``."""
    one, other = run(ids, decoder), run(without, decoder)
    count = min(len(ids), len(without))
    values = [
        torch.stack([torch.linalg.vector_norm(one.z[i][-j, h] - other.z[i][-j, h]) for j in range(count, 0, -1)])
        for i, h in nodes(decoder)
    ]
    return by_node(decoder, values)


def generated(ids: Sequence[int], decoder: Decoder, edits: Sequence[Edit], count: int) -> tuple[list[int], Tensor]:
    """Tokens that are said greedily, one a call, and what each was chosen by, ``[count, V]``."""
    past = run(ids, decoder, edits)
    said: list[int] = []
    rows: list[Tensor] = []
    while True:
        rows.append(past.logits[-1])
        said.append(int(rows[-1].argmax()))
        if len(said) == count:
            return said, torch.stack(rows)
        past = run(said[-1:], decoder, edits, past=past)


def folded(decoder: Decoder, edits: Sequence[Edit]) -> dict[str, Tensor]:
    r"""Weights that scale, offset and zero heads at all rows by themselves.

    .. math:: W_O (s \circ z + v) + b = (W_O diag(s)) z + (b + W_O v)
    """
    weights = dict(decoder.weights)
    for layer, head in nodes(decoder):
        name = f"model.layers.{layer}.self_attn.o_proj"
        weight = weights[f"{name}.weight"].clone()
        before = weight[:, decoder.columns(head)].clone()
        # What the head's edits make of z, one after the other, is a factor and a sum.
        factor = torch.ones(decoder.head_dim, dtype=weight.dtype)
        shift = torch.zeros(decoder.head_dim, dtype=weight.dtype)
        for edit in edits:
            if (edit.layer, edit.head) == (layer, head):
                kept = 0.0 if edit.ablate == "zero" else 1.0
                factor = kept * factor * edit.scale
                shift = kept * shift * edit.scale
                shift = shift if edit.offset is None else shift + edit.offset
        for d in range(decoder.head_dim):
            weight[:, head * decoder.head_dim + d] = before[:, d] * factor[d]
        weights[f"{name}.weight"] = weight
        if bool(shift.any()):
            bias = weights.get(f"{name}.bias", torch.zeros(weight.shape[0], dtype=weight.dtype))
            weights[f"{name}.bias"] = bias + before @ shift
    return weights
