"""Block gates: softmax within each block, and a softmax over blocks whose logits are mixed with a gate.

With scores s and a block's log-sum-exp λ over its visible ordinary keys, a key's logit is ``s - λ + c``. The block that
holds the query's own position has c = λ; any other has ``c = mix * gate + (1 - mix) * λ``, and vanishes where its gate
is hidden or it has no visible ordinary key.

Letters: R rows of a chunk, n key blocks of each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo_kernels.runtime.workspace import scratch


@dataclass
class Gated:
    """What the way back needs.

    Attributes:
        inner: Weights within each block ``[R, block_q, n, block_k]``.
        outer: Weights of blocks ``[R, block_q, n]``.
        own: Which block is the query's own, bool ``[R, block_q, n]``.
        mix: The share of the gate, a float or ``[R, 1, 1]``.
        key: Gate keys ``[R, n, D]``; ``None`` where the last column of each block is the gate.
        careful: Whether something hidden may be no number.
    """

    inner: Tensor
    outer: Tensor
    own: Tensor
    mix: float | Tensor
    key: Tensor | None = None
    careful: bool = False


def weigh(
    scores: Tensor,
    block: int,
    *,
    own: Tensor,
    mix: float | Tensor,
    logits: Tensor | None,
    unseen: Tensor | None = None,
) -> tuple[Gated, Tensor, Tensor | None, Tensor]:
    """Gated weights of masked scores, which are used up.

    Args:
        scores: ``[R, block_q, n * block]``, -inf where hidden.
        block: Columns of a block.
        own: bool ``[R, block_q, n]``.
        mix: A float or ``[R, 1, 1]``.
        logits: The gates ``[R, block_q, n]``, or ``None`` where the last column of each block is its gate.
        unseen: Where scores are hidden, bool like them, if something that is hidden may be no number.

    Returns:
        ``(gated, weights, dead, lse)``: weights as scores; rows that see nothing, or ``None`` where there is none; lse
        ``[R, block_q, 1]``.
    """
    inner = scores.view(*scores.shape[:2], -1, block)
    is_last = logits is None
    if logits is None:
        logits = inner[..., block - 1].clone()
        inner[..., block - 1] = -torch.inf
    # The softmax within each block, and its log-sum-exp; the largest weight is exp(0) / sum.
    peak = inner.amax(-1)
    empty = peak == -torch.inf
    some_empty = bool(empty.any())
    if some_empty:
        inner.masked_fill_(empty.unsqueeze(-1), 0.0)
    torch.softmax(inner, -1, out=inner)
    total = peak - inner.amax(-1).log_()
    if some_empty:
        inner.masked_fill_(empty.unsqueeze(-1), 0.0)
    if unseen is not None:
        _zero_hidden(inner, unseen.view(inner.shape), is_last=is_last)
    mixed = _mixed(logits, total, mix, own)
    if some_empty:
        mixed.masked_fill_(empty, -torch.inf)
    outer, dead, lse = _outer_softmax(mixed)
    if unseen is not None:
        outer.masked_fill_(mixed == -torch.inf, 0.0)
    weights = scratch("gated", tuple(inner.shape), inner.dtype, inner.device)
    torch.mul(inner, outer.unsqueeze(-1), out=weights)
    if unseen is not None:
        weights.masked_fill_(_weightless(inner, outer), 0.0)
    return Gated(inner, outer, own, mix, careful=unseen is not None), weights.view(scores.shape), dead, lse


def _mixed(logits: Tensor, total: Tensor, mix: float | Tensor, own: Tensor) -> Tensor:
    """Logits of blocks: gates mixed with the blocks' log-sum-exps ``total``; the own block's is its log-sum-exp."""
    mixed = logits
    if isinstance(mix, Tensor) or mix != 1:
        # A hidden gate times a mix of 0 would be NaN.
        mixed = torch.where(logits == -torch.inf, -torch.inf, mix * logits + (1 - mix) * total)
    return torch.where(own, total, mixed)


def _outer_softmax(mixed: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """Weights of blocks, rows that see nothing (``None`` where there is none), and the log-sum-exp of a row."""
    top = mixed.amax(-1, keepdim=True)
    dead: Tensor | None = top == -torch.inf
    if dead is not None and bool(dead.any()):
        mixed.masked_fill_(dead, 0.0)
        outer = torch.softmax(mixed, -1).masked_fill_(dead, 0.0)
        lse = (top - outer.amax(-1, keepdim=True).log_()).masked_fill_(dead, -torch.inf)
    else:
        dead = None
        outer = torch.softmax(mixed, -1)
        lse = top - outer.amax(-1, keepdim=True).log_()
    return outer, dead, lse


def _zero_hidden(inner: Tensor, unseen: Tensor, *, is_last: bool) -> None:
    """Zeroes the weights of hidden slots, and of landmarks, in rows all of whose weights are NaN."""
    inner.masked_fill_(unseen, 0.0)
    if is_last:
        inner[..., -1] = 0.0


def _weightless(inner: Tensor, outer: Tensor) -> Tensor:
    """Slots without a part in a row's result, whatever the rest of it holds: bool, as the inner weights."""
    return (inner == 0) | (outer == 0).unsqueeze(-1)


def unweigh(gated: Gated, dweights: Tensor, dlse: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of the scores, in place of those of the weights, and of the gates ``[R, block_q, n]``."""
    inner = gated.inner
    outer = gated.outer
    dscores = dweights.view(inner.shape)
    if gated.careful:
        dscores.masked_fill_(inner == 0, 0.0)
    by_block = torch.linalg.vecdot(inner, dscores)
    change = by_block - (outer * by_block).sum(-1, keepdim=True)
    if dlse is not None:
        change += dlse
    change *= outer
    if gated.careful:
        change.masked_fill_(outer == 0, 0.0)
    through_gate = torch.where(gated.own, 0.0, change * gated.mix)
    through_total = change - through_gate
    torch.ops.aten._softmax_backward_data.out(dscores, inner, -1, inner.dtype, grad_input=dscores)
    dscores.mul_(outer.unsqueeze(-1)).addcmul_(inner, through_total.unsqueeze(-1))
    if gated.careful:
        dscores.masked_fill_(_weightless(inner, outer), 0.0)
    if gated.key is None:
        dscores[..., -1] = through_gate
    return dweights, through_gate
