r"""A small decoder whose heads are edited while it runs, one head of one sequence and one row at a time.

Source: scales and offsets: Yin et al. 2024, *LoFiT* (arXiv:2406.01563); edges that are knocked out: Geva et al. 2023,
*Dissecting Recall of Factual Associations in Auto-Regressive Language Models* (arXiv:2304.14767); calibration of sinks:
Yu et al. 2024, *Unveiling and Harnessing Hidden Attention Sinks* (arXiv:2406.15765).

A head's row goes through these steps, and out of the layer comes :math:`\sum_h W_O^h z_{h,t} + b`:

1. scores :math:`\sigma q_t \cdot k_s`, and on them the biases of all edits;
2. softmax over the keys that the row sees;
3. calibration of the row's weights by each edit in turn;
4. :math:`z_{h,t} = \sum_s p_s v_s`;
5. for each edit in turn: what is put in its place, then its scale, then its offset.

Letters are those of ``decoder.py``.

What the formulas leave open, and how it is read here:
- a row that sees no key has weights and z of 0;
- "uniform" takes the mean of the values that the row sees without edits;
- calibration moves nothing where all that a row sees is calibrated;
- rows of an edit are rows of queries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from attnzoo.oracles.heads.decoder import Decoder, Node, mlp, output, projected, turned, unembedded

Bias = Callable[[int, int], float]
"""What is added to the score of a query's place (first) and a key's (second)."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Edit:
    """What one edit does with one query head of one sequence.

    Attributes:
        layer: Its layer.
        head: The query head.
        scale: Factor on z, a number or ``[D]``.
        offset: Added to z ``[D]``.
        ablate: What is put in the place of z: zeros, ``value``, or the mean of the values that are seen.
        value: For "value": ``[D]``, or ``[S, D]`` by place.
        key_bias: Added to scores.
        sinks: Places whose weights are calibrated.
        beta: The factor on them.
        where: Rows: all, those of calls of more than one token, those of calls of one, a call's last, or a bool for
            each place.
    """

    layer: int
    head: int
    scale: float | Tensor = 1.0
    offset: Tensor | None = None
    ablate: Literal["zero", "value", "uniform"] | None = None
    value: Tensor | None = None
    key_bias: Bias | None = None
    sinks: frozenset[int] = frozenset()
    beta: float = 1.0
    where: Literal["all", "prefill", "decode", "last"] | Sequence[bool] = "all"

    def is_at(self, t: int, first: int, count: int) -> bool:
        """Whether it edits the row at place t, in a call of ``count`` tokens from place ``first`` on."""
        if not isinstance(self.where, str):
            return bool(self.where[t])
        return {"all": True, "prefill": count > 1, "decode": count == 1, "last": t == first + count - 1}[self.where]


@dataclass(eq=False)
class DecoderRun:
    """What a call computed, by layers where it is a list.

    Attributes:
        embedded: Embeddings ``[T, C]``.
        tokens: Tokens so far S.
        streams: What enters each layer ``[T, C]``, and in the end what leaves the last one.
        q: Rotated queries ``[T, H, D]``.
        k: Rotated keys of all tokens so far, for each query head ``[S, H, D]``.
        v: Values likewise.
        lse: Logarithm of the sum over a row's scores ``[T, H]``.
        pattern: Weights that rows are read with ``[T, H, S]``.
        z: What the output's projection takes ``[T, H, D]``.
        attention: What attention adds to the stream ``[T, C]``.
        mlp: What the MLP adds to it ``[T, C]``.
        logits: ``[T, V]``.
    """

    embedded: Tensor
    tokens: int
    streams: list[Tensor] = field(default_factory=list)
    q: list[Tensor] = field(default_factory=list)
    k: list[Tensor] = field(default_factory=list)
    v: list[Tensor] = field(default_factory=list)
    lse: list[Tensor] = field(default_factory=list)
    pattern: list[Tensor] = field(default_factory=list)
    z: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)
    mlp: list[Tensor] = field(default_factory=list)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


def of_kv_head(edit: Edit, decoder: Decoder) -> list[Edit]:
    """An edit whose head is a KV head, as edits of the query heads that read it."""
    group = decoder.group()
    return [replace(edit, head=edit.head * group + i) for i in range(group)]


def calibrated(weight: Tensor, seen: Sequence[int], edit: Edit) -> Tensor:
    r"""Weights of the keys that a row sees, some of them times :math:`\beta`, and the others the larger for it.

    .. math:: p'_s = \beta p_s \; (s \in \mathcal{S}), \quad
              p'_s = p_s + (1 - \beta) \sum_{i \in \mathcal{S}} p_i \frac{p_s}{\sum_{i \notin \mathcal{S}} p_i}
    """
    inside = [i for i, s in enumerate(seen) if s in edit.sinks]
    outside = [i for i, s in enumerate(seen) if s not in edit.sinks]
    if not inside or not outside:
        return weight
    moved = (1 - edit.beta) * weight[inside].sum()
    rest = weight[outside].sum()
    row = list(weight.unbind())
    for i in inside:
        row[i] = edit.beta * row[i]
    for i in outside:
        row[i] = row[i] + moved * row[i] / rest
    return torch.stack(row)


def edited_row(z: Tensor, t: int, mean: Tensor, edits: Sequence[Edit]) -> Tensor:
    """One head's z ``[D]`` at place t behind its edits; ``mean`` is what "uniform" puts there."""
    for edit in edits:
        if edit.ablate == "zero":
            z = torch.zeros_like(z)
        elif edit.ablate == "uniform":
            z = mean
        elif edit.ablate == "value" and edit.value is not None:
            z = edit.value if edit.value.dim() == 1 else edit.value[t]
        z = z * edit.scale
        z = z if edit.offset is None else z + edit.offset
    return z


def one_row(
    q: Tensor, k: Tensor, v: Tensor, t: int, seen: Sequence[int], edits: Sequence[Edit]
) -> tuple[Tensor, Tensor, Tensor]:
    """One head's row: z ``[D]``, its weights ``[S]`` and their lse.

    Args:
        q: The query ``[D]``.
        k: Keys of all tokens so far ``[S, D]``.
        v: Values ``[S, D]``.
        t: Its place.
        seen: The places that it sees without edits.
        edits: Those of this row.
    """
    scores: dict[int, Tensor] = {}
    for s in seen:
        bias = sum(edit.key_bias(t, s) for edit in edits if edit.key_bias is not None)
        if bias != -math.inf:
            scores[s] = q.shape[0] ** -0.5 * (q @ k[s]) + bias
    z = torch.zeros_like(v[0])
    row = k.new_zeros(k.shape[0])
    lse = k.new_tensor(-math.inf)
    if scores:
        kept = list(scores)
        lse = torch.logsumexp(torch.stack(list(scores.values())), 0)
        weight = torch.stack([torch.exp(score - lse) for score in scores.values()])
        for edit in edits:
            weight = calibrated(weight, kept, edit)
        z = weight @ torch.stack([v[s] for s in kept])
        row = row.index_put((torch.tensor(kept),), weight)
    mean = torch.stack([v[s] for s in seen]).mean(0) if seen else torch.zeros_like(z)
    return edited_row(z, t, mean, edits), row, lse


def run(
    ids: Sequence[int],
    decoder: Decoder,
    edits: Sequence[Edit] = (),
    *,
    past: DecoderRun | None = None,
    put: Mapping[Node, Tensor] | None = None,
    reads: Mapping[Node, Tensor] | None = None,
) -> DecoderRun:
    """One call on one sequence without padding.

    Args:
        ids: Its tokens T.
        decoder: The model.
        edits: What is done to its heads, in their order.
        past: The call before, where these tokens go on.
        put: z ``[T, D]`` that heads have whatever they compute, behind all edits.
        reads: Streams ``[T, C]`` that heads make their queries, keys and values of, in the place of the layer's own.
    """
    first = 0 if past is None else past.tokens
    x = torch.stack([decoder.weights["model.embed_tokens.weight"][i] for i in ids])
    found = DecoderRun(x, first + len(ids), streams=[x])
    for layer in range(decoder.layers):
        parts: list[list[Tensor]] = []
        for head in range(decoder.heads):
            node = (layer, head)
            normed = decoder.norm((reads or {}).get(node, x), f"layers.{layer}.input_layernorm")
            kv_head = head // decoder.group()
            q = turned(projected(normed, decoder, layer, "q_proj", head), first, decoder)
            k = turned(projected(normed, decoder, layer, "k_proj", kv_head), first, decoder)
            v = projected(normed, decoder, layer, "v_proj", kv_head)
            if past is not None:
                k = torch.cat([past.k[layer][:, head], k])
                v = torch.cat([past.v[layer][:, head], v])
            rows = []
            for i, t in enumerate(range(first, first + len(ids))):
                seen = [s for s in range(t + 1) if decoder.sees(head, t, s)]
                mine = [e for e in edits if (e.layer, e.head) == node and e.is_at(t, first, len(ids))]
                rows.append(one_row(q[i], k, v, t, seen, mine))
            z = torch.stack([row[0] for row in rows])
            z = (put or {}).get(node, z)
            parts.append([q, k, v, z, *(torch.stack([row[i] for row in rows]) for i in (1, 2))])
        for name, values in zip(("q", "k", "v", "z", "pattern", "lse"), zip(*parts, strict=True), strict=True):
            getattr(found, name).append(torch.stack(values, 1))
        found.attention.append(output(found.z[layer], decoder, layer))
        x = x + found.attention[layer]
        found.mlp.append(mlp(decoder.norm(x, f"layers.{layer}.post_attention_layernorm"), decoder, layer))
        x = x + found.mlp[layer]
        found.streams.append(x)
    found.logits = unembedded(x, decoder)
    return found
