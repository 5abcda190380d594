"""Attention one row at a time, from the definition: what the tests of the operation believe. Knows torch alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Problem:
    """One call of the operation, its layout given as the blocks to keep ``bool [B|1, h, M, N]``."""

    q: Tensor
    k: Tensor
    v: Tensor
    keep: Tensor
    block_q: int
    block_k: int
    causal: bool = True
    scale: float | None = None
    q_pos: Tensor | None = None
    key_bias: Tensor | None = None
    window: int | Tensor | None = None
    sink: int | Tensor = 0

    @property
    def batch(self) -> int:
        return self.q.shape[0]

    @property
    def heads(self) -> int:
        return self.q.shape[1]

    @property
    def kv_heads(self) -> int:
        return self.k.shape[1]

    @property
    def queries(self) -> int:
        return self.q.shape[2]

    @property
    def keys(self) -> int:
        return self.k.shape[2]

    def change(self, **fields: object) -> Problem:
        return replace(self, **fields)  # type: ignore[arg-type]


class Answer(NamedTuple):
    """The results and, where asked for, the gradients of a call."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor | None = None


def at(x: Tensor, *index: int) -> Tensor:
    """An element of a tensor whose leading dimensions may be 1 for any."""
    return x[tuple(0 if size == 1 else i for i, size in zip(index, x.shape, strict=False))]


def per_head(value: int | Tensor, head: int) -> int:
    return value if isinstance(value, int) else int(value[head])


def position(p: Problem, b: int, h: int, t: int) -> int:
    return t + p.keys - p.queries if p.q_pos is None else int(at(p.q_pos, b, h, t))


def is_absent(p: Problem, b: int, h: int, t: int) -> bool:
    return p.q_pos is not None and position(p, b, h, t) == -1


def layout_head(p: Problem, h: int) -> int:
    rows = p.keep.shape[1]
    if rows == p.heads:
        return h
    return h // (p.heads // p.kv_heads) if rows == p.kv_heads else 0


def bias_of(p: Problem, b: int, h: int) -> Tensor | None:
    """The bias of a head's keys ``[S]``."""
    if p.key_bias is None:
        return None
    of_head = h if p.key_bias.shape[1] == p.heads else h // (p.heads // p.kv_heads)
    return at(p.key_bias, b, of_head)


def rule_allows(p: Problem, h: int, pos: int, s: int) -> bool:
    """Causality, window and sink."""
    distance = pos - s
    if p.causal and distance < 0:
        return False
    if p.window is None or s < per_head(p.sink, h):
        return True
    return abs(distance) < per_head(p.window, h)


def keys_of_row(p: Problem, b: int, h: int, t: int, *, listed: bool = True, biased: bool = True) -> list[int]:
    """The keys that a query reads, in order; ``listed=False`` forgets the layout, ``biased=False`` the key bias."""
    if is_absent(p, b, h, t):
        return []
    pos = position(p, b, h, t)
    bias = bias_of(p, b, h)
    hidden = [False] * p.keys if bias is None or not biased else (bias == -math.inf).tolist()
    blocks = at(p.keep, b, layout_head(p, h), t // p.block_q).tolist()
    return [
        s
        for s in range(p.keys)
        if (not listed or blocks[s // p.block_k]) and rule_allows(p, h, pos, s) and not hidden[s]
    ]


def visible(p: Problem, *, listed: bool = True, biased: bool = True) -> Tensor:
    """The visible set ``bool [B, H, T, S]``."""
    mask = torch.zeros(p.batch, p.heads, p.queries, p.keys, dtype=torch.bool)
    for b, h, t in rows(p):
        mask[b, h, t, keys_of_row(p, b, h, t, listed=listed, biased=biased)] = True
    return mask


def rows(p: Problem) -> list[tuple[int, int, int]]:
    return [(b, h, t) for b in range(p.batch) for h in range(p.heads) for t in range(p.queries)]


def attend(p: Problem, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Output ``[B, H, T, Dv]`` and natural-log lse ``[B, H, T]`` in fp64, differentiable."""
    mask = visible(p) if mask is None else mask
    q, k, v = p.q.double(), p.k.double(), p.v.double()
    scale = 1 / math.sqrt(q.shape[-1]) if p.scale is None else p.scale
    group = p.heads // p.kv_heads
    outs = []
    lses = []
    for b, h, t in rows(p):
        seen = mask[b, h, t].nonzero().flatten()
        if not len(seen):
            outs.append(q.new_zeros(v.shape[-1]))
            lses.append(q.new_full((), -math.inf))
            continue
        scores = k[b, h // group, seen] @ q[b, h, t] * scale
        bias = bias_of(p, b, h)
        if bias is not None:
            scores = scores + bias[seen].double()
        peak = scores.max().detach()
        weights = (scores - peak).exp()
        outs.append(weights @ v[b, h // group, seen] / weights.sum())
        lses.append(weights.sum().log() + peak)
    shape = (p.batch, p.heads, p.queries)
    if not outs:
        return q.new_zeros(*shape, v.shape[-1]), q.new_zeros(shape)
    return torch.stack(outs).view(*shape, -1), torch.stack(lses).view(shape)


def solve(p: Problem, dout: Tensor, dlse: Tensor | None = None, mask: Tensor | None = None) -> Answer:
    """Results and gradients, by differentiating the definition."""
    given = [p.q, p.k, p.v] + ([] if p.key_bias is None else [p.key_bias])
    leaves = [x.detach().double().requires_grad_() for x in given]
    copy = p.change(q=leaves[0], k=leaves[1], v=leaves[2], key_bias=leaves[3] if leaves[3:] else None)
    out, lse = attend(copy, mask)
    pairs = [(out, dout.double())] + ([] if dlse is None else [(lse, dlse.double())])
    pairs = [(result, seed) for result, seed in pairs if result.requires_grad]
    grads: tuple[Tensor | None, ...] = (None,) * len(leaves)
    if pairs:
        results, seeds = zip(*pairs, strict=True)
        grads = torch.autograd.grad(results, leaves, seeds, allow_unused=True)
    full = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]
    return Answer(out.detach(), lse.detach(), *full)
