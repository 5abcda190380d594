"""A decoder, its loss and its sampling as loops over the formulas: torch alone, one text at a time, nothing of ours.

Letters: T tokens, C model width, H query heads, G KV heads, D head width, V words.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    return x / math.sqrt(float((x * x).sum()) / len(x) + 1e-6) * gain


def rotated(x: Tensor, position: int) -> Tensor:
    """Plane i is (x_i, x_(i + D/2)), turned by position / 10000^(2i/D)."""
    half = len(x) // 2
    out = x.clone()
    for i in range(half):
        angle = position / 10_000 ** (i / half)
        cosine = math.cos(angle)
        sine = math.sin(angle)
        out[i] = x[i] * cosine - x[i + half] * sine
        out[i + half] = x[i] * sine + x[i + half] * cosine
    return out


def attention(x: Sequence[Tensor], w: Mapping[str, Tensor], heads: int, groups: int) -> list[Tensor]:
    """Dense causal attention of rows, rotated by their index."""
    width = w["q_proj.weight"].shape[0] // heads
    q = [(w["q_proj.weight"] @ row).view(heads, width) for row in x]
    k = [(w["k_proj.weight"] @ row).view(groups, width) for row in x]
    v = [(w["v_proj.weight"] @ row).view(groups, width) for row in x]
    out = []
    for t in range(len(x)):
        joined = []
        for head in range(heads):
            group = head // (heads // groups)
            query = rotated(q[t][head], t)
            scores = [float(query @ rotated(k[s][group], s)) / math.sqrt(width) for s in range(t + 1)]
            weights = [math.exp(score - max(scores)) for score in scores]
            joined.append(sum(a / sum(weights) * v[s][group] for s, a in enumerate(weights)))
        out.append(w["o_proj.weight"] @ torch.cat(joined))
    return out


def logits(ids: Sequence[int], w: Mapping[str, Tensor], layers: int, heads: int, groups: int) -> Tensor:
    """``[T, V]`` of a decoder with the weights ``w``."""
    x = [w["embedding.weight"][token] for token in ids]
    for layer in range(layers):
        own = {name.removeprefix(f"blocks.{layer}."): value for name, value in w.items()}
        weights = {name.removeprefix("attention."): value for name, value in own.items()}
        read = attention([rms_norm(row, own["attention_norm.weight"]) for row in x], weights, heads, groups)
        x = [row + more for row, more in zip(x, read, strict=True)]
        for t, row in enumerate(x):
            y = rms_norm(row, own["mlp_norm.weight"])
            gate = own["mlp.gate.weight"] @ y
            x[t] = row + own["mlp.down.weight"] @ (gate / (1 + torch.exp(-gate)) * (own["mlp.up.weight"] @ y))
    return torch.stack([w["embedding.weight"] @ rms_norm(row, w["norm.weight"]) for row in x])


def cross_entropy(scores: Tensor, ids: Tensor, padding: Tensor) -> float:
    """Mean of -log p of every token that another real one comes before; scores ``[B, T, V]``."""
    losses = []
    for item in range(len(ids)):
        real = [t for t in range(ids.shape[1]) if not padding[item, t]]
        for before, t in itertools.pairwise(real):
            row = [math.exp(score) for score in scores[item, before].tolist()]
            losses.append(-math.log(row[int(ids[item, t])] / sum(row)))
    return sum(losses) / len(losses)


def probabilities(scores: Sequence[float], temperature: float, top_k: int | None, top_p: float | None) -> list[float]:
    """Of each token: exp(score / temperature) over their sum, among those that may be drawn."""
    order = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    kept = order if top_k is None else order[:top_k]
    if top_p is not None:
        weights = {token: math.exp((scores[token] - scores[order[0]]) / temperature) for token in kept}
        whole = sum(weights.values())
        reached = 0.0
        likely = []
        for token in kept:
            if reached >= top_p:
                break
            likely.append(token)
            reached += weights[token] / whole
        kept = likely
    weights = {token: math.exp((scores[token] - scores[order[0]]) / temperature) for token in kept}
    return [weights.get(token, 0.0) / sum(weights.values()) for token in range(len(scores))]
