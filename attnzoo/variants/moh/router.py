r"""Routers of heads: which heads a token uses, and with what weight.

Letters: B batch, T tokens, C model width, H heads, E routed heads, K active routed heads, h_s shared heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Norm = Literal["code", "paper"]


@dataclass(frozen=True, eq=False)
class Routing:
    """What a router decided.

    Attributes:
        gates: The weight of each head, ``[B, T, H]``; 0 at heads that are not active, shared ones first.
        active: Which heads run, bool ``[B, T, H]``.
        probs: The router's probabilities ``[B, T, E]``; ``None`` where no head is routed.
    """

    gates: Tensor
    active: Tensor
    probs: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How many heads of each kind there are.

    Attributes:
        shared: h_s, always on.
        routed: E, of which each token uses some.
        active: K, routed heads that a token uses.
        unit: Neighbouring heads that are routed together.
    """

    shared: int
    routed: int
    active: int
    unit: int = 1


def best(scores: Tensor, counts: Counts) -> Tensor:
    """The K largest of ``[.., E]`` as a mask, whole units together; among equals the lowest index comes first."""
    if counts.active == counts.routed:
        return torch.ones_like(scores, dtype=torch.bool)
    units = scores.detach()
    if counts.unit > 1:
        units = units.unflatten(-1, (-1, counts.unit)).sum(-1)
    # Unlike topk, a stable sort says which of equals it takes.
    order = units.argsort(dim=-1, descending=True, stable=True)[..., : counts.active // counts.unit]
    chosen = torch.zeros_like(units, dtype=torch.bool).scatter(-1, order, 1)
    return chosen.repeat_interleave(counts.unit, -1) if counts.unit > 1 else chosen


def shares(logits: Tensor, total: int, among: Tensor | None = None) -> Tensor:
    """A softmax times ``total``, over the last dimension or the part of it that a mask leaves.

    Exactly 1 everywhere where the logits are equal and ``total`` is their number: no rounding of ``1 / n`` remains.
    """
    weight = (logits - logits.detach().amax(-1, keepdim=True)).exp()
    if among is not None:
        weight = weight.masked_fill(~among, 0)
    return total * weight / weight.sum(-1, keepdim=True)


def learned(
    logits: tuple[Tensor | None, Tensor | None, Tensor | None], like: Tensor, counts: Counts, norm: Norm
) -> Routing:
    r"""The router with weights.

    .. math:: s = h_s softmax(W_s x), \quad r_e = K [e \in S] p_e / \sum_S p, \quad \alpha = 2 softmax(W_h x),
              \quad g = [\alpha_1 s \| \alpha_2 r]

    With ``norm="paper"`` the factors h_s, K / sum and 2 are 1.

    Args:
        logits: ``W_r x [B, T, E]``, ``W_s x [B, T, h_s]`` and ``W_h x [B, T, 2]``; ``None`` where there is none.
        like: ``[B, T, *]``, of the gates' dtype.
        counts: The heads.
        norm: Which form.
    """
    of_routed, of_shared, of_types = logits
    code = norm == "code"
    shared = like.new_ones(*like.shape[:2], counts.shared)
    if of_shared is not None:
        shared = shares(of_shared, counts.shared if code else 1)
    routed = like.new_zeros(*like.shape[:2], 0)
    chosen = None
    probs = None
    if of_routed is not None:
        probs = of_routed.softmax(-1)
        chosen = best(probs, counts)
        routed = shares(of_routed, counts.active, chosen) if code else probs.masked_fill(~chosen, 0)
    if of_types is not None:
        types = shares(of_types, 2 if code else 1)
        shared = shared * types[..., :1]
        routed = routed * types[..., 1:]
    return Routing(torch.cat([shared, routed], -1), _with_shared(chosen, counts, like), probs)


def by_norm(lengths: Tensor, counts: Counts, *, eps: float, coefficient: float, every: bool) -> Routing:
    r"""The router without weights: the routed heads with the longest queries run, ungated.

    .. math:: p = softmax(z / (std(z) + eps)), \quad g_e = [e \in S] + c (p_e - \bar p_e)

    with :math:`\bar p` a constant equal to p: the gate is 0 or 1 and its gradient that of c p (straight-through).

    Args:
        lengths: z, the lengths of the routed heads' queries, ``[B, T, E]``.
        counts: The heads.
        eps: Keeps equal lengths from dividing by 0.
        coefficient: c.
        every: Whether heads that are not chosen pass a gradient too; their outputs are needed then.
    """
    scaled = lengths / (lengths.std(-1, keepdim=True) + eps) if counts.routed > 1 else lengths
    probs = scaled.softmax(-1)
    chosen = best(probs, counts)
    opinion = coefficient * (probs - probs.detach())
    routed = chosen.to(probs.dtype) + (opinion if every else opinion.masked_fill(~chosen, 0))
    shared = probs.new_ones(*probs.shape[:2], counts.shared)
    return Routing(torch.cat([shared, routed], -1), _with_shared(chosen, counts, probs), probs)


def _with_shared(chosen: Tensor | None, counts: Counts, like: Tensor) -> Tensor:
    shared = torch.ones(*like.shape[:2], counts.shared, dtype=torch.bool, device=like.device)
    return shared if chosen is None else torch.cat([shared, chosen], -1)


def balance_loss(routing: Routing, counts: Counts, real: Tensor | None, scale: Norm) -> Tensor:
    r"""How unevenly the real tokens of a batch use the routed heads; only P has a gradient.

    .. math:: E \sum_e P_e f_e, \quad P_e = mean_t p_{t,e}, \quad f_e = mean_t [e \in S_t]

    Args:
        routing: What the router decided.
        counts: The heads.
        real: Which tokens are no padding, bool ``[B, T]``; ``None`` where all are.
        scale: "paper" leaves out the factor E.
    """
    probs = routing.probs
    if probs is None:
        return routing.gates.new_zeros(())
    used = routing.active[..., counts.shared :].to(probs.dtype)
    if real is None:
        tokens = max(1, probs.shape[0] * probs.shape[1])
        mean = probs.sum((0, 1)) / tokens
        share = used.sum((0, 1)) / tokens
    else:
        weight = real.unsqueeze(-1).to(probs.dtype)
        count = weight.sum().clamp(min=1)
        mean = (probs * weight).sum((0, 1)) / count
        share = (used * weight).sum((0, 1)) / count
    loss = (mean * share).sum()
    return loss * counts.routed if scale == "code" else loss
