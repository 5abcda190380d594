"""The switches that change scores, one row at a time: auxiliary channels, rotary origins, gates. Knows torch alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.attnzoo_kernels.oracle import Problem, at, bias_of, keys_of_row, layout_head, position, rows

LEAVES = ("q", "k", "v", "key_bias", "q_aux", "k_aux", "gate")
"""What has a gradient, where it is there and a tensor."""


@dataclass(frozen=True, eq=False)
class Switched(Problem):
    """A call with switches; ``origin`` int ``[B|1, h, M, N]`` stands beside ``keep``."""

    q_aux: Tensor | None = None
    k_aux: Tensor | None = None
    gate: Tensor | str | None = None
    gate_mix: float | Tensor = 1.0
    cos: Tensor | None = None
    sin: Tensor | None = None
    origin: Tensor | None = None


def turned(p: Switched, x: Tensor, entry: int) -> Tensor:
    """``R(-entry) x`` for one query, the first half of the rotated columns going with the second."""
    if p.cos is None or p.sin is None:
        return x
    cos, sin = p.cos[entry], p.sin[entry]
    half = len(cos)
    first, second, rest = x[:half], x[half : 2 * half], x[2 * half :]
    return torch.cat([first * cos + second * sin, second * cos - first * sin, rest])


def query_for(p: Switched, b: int, h: int, t: int, block: int) -> Tensor:
    if p.origin is None:
        return p.q[b, h, t]
    return turned(p, p.q[b, h, t], int(at(p.origin, b, layout_head(p, h), t // p.block_q)[block]))


def scale_of(p: Switched) -> float:
    return 1 / math.sqrt(p.q.shape[-1]) if p.scale is None else p.scale


def full_score(p: Switched, b: int, h: int, t: int, s: int) -> Tensor:
    group = h // (p.heads // p.kv_heads)
    product = query_for(p, b, h, t, s // p.block_k) @ p.k[b, group, s]
    if p.q_aux is not None and p.k_aux is not None:
        product = product + p.q_aux[b, h, t] @ at(p.k_aux, b, group, s)
    score = scale_of(p) * product
    bias = bias_of(p, b, h)
    return score if bias is None else score + bias[s]


def gate_score(p: Switched, b: int, h: int, t: int, block: int, seen: list[int]) -> Tensor | None:
    """The gate of a block, ``None`` where it is hidden or missing."""
    if isinstance(p.gate, Tensor):
        return scale_of(p) * (query_for(p, b, h, t, block) @ p.gate[b, h // (p.heads // p.kv_heads), block])
    landmark = (block + 1) * p.block_k - 1
    return full_score(p, b, h, t, landmark) if landmark in seen else None


def logits(p: Switched, b: int, h: int, t: int, seen: list[int]) -> tuple[list[int], list[Tensor]]:
    """The keys that count for a row and their logits."""
    if p.gate is None:
        return seen, [full_score(p, b, h, t, s) for s in seen]
    mix = float(p.gate_mix[h]) if isinstance(p.gate_mix, Tensor) else p.gate_mix
    keys: list[int] = []
    values: list[Tensor] = []
    for block in sorted({s // p.block_k for s in seen}):
        ordinary = [s for s in seen if s // p.block_k == block]
        if p.gate == "last":
            ordinary = [s for s in ordinary if s % p.block_k != p.block_k - 1]
        if not ordinary:
            continue
        scores = [full_score(p, b, h, t, s) for s in ordinary]
        if block != position(p, b, h, t) // p.block_k:
            gate = gate_score(p, b, h, t, block, seen)
            if gate is None:
                continue
            inner = torch.stack(scores).logsumexp(0)
            scores = [score - inner + mix * gate + (1 - mix) * inner for score in scores]
        keys += ordinary
        values += scores
    return keys, values


def attend(p: Switched) -> tuple[Tensor, Tensor]:
    """Output and lse, differentiable; empty rows hang on nothing."""
    group = p.heads // p.kv_heads
    outs, lses = [], []
    for b, h, t in rows(p):
        keys, values = logits(p, b, h, t, keys_of_row(p, b, h, t))
        if not keys:
            outs.append(p.q.new_zeros(p.v.shape[-1]))
            lses.append(p.q.new_full((), -math.inf))
            continue
        scores = torch.stack(values)
        outs.append(scores.softmax(0) @ p.v[b, h // group, keys])
        lses.append(scores.logsumexp(0))
    shape = (p.batch, p.heads, p.queries)
    return torch.stack(outs).view(*shape, -1), torch.stack(lses).view(shape)


def leaves_of(p: Switched) -> dict[str, Tensor]:
    return {
        name: getattr(p, name).detach().clone().requires_grad_()
        for name in LEAVES
        if isinstance(getattr(p, name), Tensor)
    }


def gradients(
    results: tuple[Tensor, Tensor], leaves: dict[str, Tensor], seeds: tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    pairs = [(result, seed) for result, seed in zip(results, seeds, strict=True) if result.requires_grad]
    if not pairs:
        return {name: torch.zeros_like(x) for name, x in leaves.items()}
    ends, starts = zip(*pairs, strict=True)
    found = torch.autograd.grad(ends, list(leaves.values()), starts, allow_unused=True)
    return {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(leaves.items(), found, strict=True)}
