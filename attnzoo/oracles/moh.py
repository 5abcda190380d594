r"""Mixture-of-head attention: a router weights the heads of every token and leaves some out, one token at a time.

Source: Jin et al. 2024, *MoH: Multi-Head Attention as Mixture-of-Head Attention* (arXiv:2410.11842); code:
SkyworkAI/MoH, which has both routers, the one without parameters for inference alone.

Letters: ``H`` query heads, the first ``h_s`` of them shared (always on), ``E = H - h_s`` routed, ``K`` of these active
in a token; ``G`` key heads; ``R = H / G`` query heads of one key head; ``p`` the router's probabilities.

Decided where the sources leave it open:

- Shared and active heads are counted in heads also where whole key heads are routed; both are then multiples of R. A
  group's score is the sum of its heads' *probabilities*; every head of a chosen group keeps its own gate; the balance
  loss stays a sum over heads.
- The router without parameters ranks by ``p = softmax(z / (std(z) + eps))`` of the lengths z of the queries before any
  rotation, with the standard deviation over the routed heads (divisor E - 1); with one routed head nothing is divided.
- Head-type weights exist where there are shared heads and active routed heads; the router without parameters has none.
- The balance loss is a mean over the real tokens of the whole batch; without active heads it is 0.
- ``rescale`` multiplies all gates by ``H / (h_s + K)``, the straight-through part included.

The published code counts padding in the balance loss, and gives NaN where all lengths are equal: not reproduced.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attnzoo.oracles.mha import Recipe, each_sequence, linear, one_sequence, separate


@dataclass(frozen=True, kw_only=True)
class MoHRouting:
    """Which heads run, and with what weight.

    Attributes:
        shared_heads: First heads, always on.
        active_heads: Routed heads active in every token.
        router: "learned" uses ``router``, ``shared_router`` and ``type_router``; "norm" has no parameters.
        gate_norm: "code" makes the routed gates sum to K, the shared gates to h_s and the types to 2; "paper" leaves
            the softmaxes as they are.
        unit: "head", or "kv_group" where all query heads of a key head are routed together.
        aux_scale: "code" multiplies the balance loss by E.
        ste_scope: Router without parameters: whether "all" heads or the "selected" pass a gradient to the router.
        ste_coefficient: Router without parameters: factor on that gradient.
        eps: Added to the standard deviation.
        rescale: Whether the gates are multiplied by ``H / (h_s + K)``.
    """

    shared_heads: int
    active_heads: int
    router: Literal["learned", "norm"] = "learned"
    gate_norm: Literal["code", "paper"] = "code"
    unit: Literal["head", "kv_group"] = "head"
    aux_scale: Literal["code", "paper"] = "code"
    ste_scope: Literal["selected", "all"] = "selected"
    ste_coefficient: float = 1.0
    eps: float = 1e-6
    rescale: bool = False


@dataclass(frozen=True)
class Routed:
    """A layer's result.

    Attributes:
        out: ``[B, T, C]``.
        gates: The weight of every head, ``[B, T, H]``; 0 where the token is padding.
        selected: bool ``[B, T, H]``, the heads that run, the shared ones included.
        loss: The balance loss, without a coefficient.
    """

    out: Tensor
    gates: Tensor
    selected: Tensor
    loss: Tensor


def probabilities(
    x: Tensor, q: Tensor, weights: Mapping[str, Tensor], routing: MoHRouting, shared: int, routed: int
) -> Tensor:
    """The router's opinion of one token: ``x [C]``, ``q [H, D]`` to ``p [E]``."""
    if routing.router == "learned":
        return torch.softmax(linear(x, weights, "router"), 0)
    z = torch.stack([q[shared + e].norm() for e in range(routed)])
    if routed > 1:
        z = z / (z.std() + routing.eps)
    return torch.softmax(z, 0)


def best(scores: list[float], count: int) -> list[int]:
    """The indices of the largest scores, the lowest index first among equals."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]


def chosen(p: Tensor, routing: MoHRouting, recipe: Recipe) -> set[int]:
    """The active routed heads of a token, counted from the first routed one."""
    size = recipe.num_heads // recipe.num_kv_heads if routing.unit == "kv_group" else 1
    if routing.shared_heads % size or routing.active_heads % size:
        raise ValueError("shared_heads and active_heads must be whole groups")
    groups = [range(first, first + size) for first in range(0, len(p), size)]
    scores = [float(sum(p.detach()[e] for e in group)) for group in groups]
    return {e for i in best(scores, routing.active_heads // size) for e in groups[i]}


def gates(
    x: Tensor, q: Tensor, weights: Mapping[str, Tensor], recipe: Recipe, routing: MoHRouting
) -> tuple[Tensor, Tensor, set[int]]:
    r"""Weights of all heads in one token, the router's probabilities, and the active routed heads.

    .. math:: s_i = h_s softmax(W_s x)_i, \quad
              r_e = K [e \in S] p_e / \sum_{S} p, \quad
              \alpha = 2 softmax(W_h x), \quad g = [\alpha_1 s \| \alpha_2 r]

    With ``gate_norm="paper"`` the factors h_s, K / sum and 2 are 1.
    """
    code = routing.gate_norm == "code"
    shared = routing.shared_heads
    routed = recipe.num_heads - routing.shared_heads
    active = routing.active_heads
    p = x.new_zeros(routed)
    on = set[int]()
    if routed:
        p = probabilities(x, q, weights, routing, shared=shared, routed=routed)
        on = chosen(p, routing, recipe)
    one = x.new_ones(())
    s = [one] * shared
    r = [one * 0] * routed
    if routing.router == "norm":
        for e in range(routed):
            if e in on or routing.ste_scope == "all":
                opinion = routing.ste_coefficient * p[e]
                r[e] = (e in on) + (opinion - opinion.detach())
    else:
        if shared > 1:
            s = list(torch.softmax(linear(x, weights, "shared_router"), 0) * (shared if code else 1))
        total = sum((p[e] for e in sorted(on)), start=one * 0)
        for e in on:
            r[e] = active * p[e] / total if code else p[e]
        if shared and active:
            types = torch.softmax(linear(x, weights, "type_router"), 0) * (2 if code else 1)
            s = [types[0] * gate for gate in s]
            r = [types[1] * gate for gate in r]
    gate = torch.stack([*s, *r])
    return (gate * recipe.num_heads / (shared + active) if routing.rescale else gate), p, on


def balance_loss(p: list[Tensor], on: list[set[int]], routing: MoHRouting) -> Tensor:
    r"""How unevenly the tokens of all sequences use the routed heads.

    .. math:: E \sum_e P_e f_e, \quad P_e = mean_t p_{t,e}, \quad f_e = mean_t [e \in S_t]

    With ``aux_scale="paper"`` without the factor E. Only P has a gradient.
    """
    mean = torch.stack(p).mean(0)
    loss = mean.new_zeros(())
    for e in range(len(mean)):
        loss = loss + mean[e] * sum(e in heads for heads in on) / len(on)
    return loss * len(mean) if routing.aux_scale == "code" else loss


def moh(
    x: Tensor,
    weights: Mapping[str, Tensor],
    recipe: Recipe,
    routing: MoHRouting,
    *,
    window: int | None = None,
    sink: int = 0,
    key_padding: Tensor | None = None,
    positions: Tensor | None = None,
) -> Routed:
    r"""Softmax attention whose heads are weighted per token; a head that is not chosen contributes nothing.

    .. math:: y_t = \sum_i g_{t,i} W_O^i o_{t,i}

    Args:
        x: Tokens ``[B, T, C]``.
        weights: ``q_proj``, ``k_proj``, ``v_proj``, ``o_proj``; learned: ``router [E, C]``, ``shared_router [h_s, C]``
            with more than one shared head, ``type_router [2, C]`` (shared first) with both kinds; biases are optional.
        recipe: The shared numbers.
        routing: Which heads run.
        window: Tokens seen, the own one included; ``None`` sees all.
        sink: First tokens of the sequence that stay visible beside the window.
        key_padding: bool ``[B, T]``, true where a token is padding.
        positions: ``[T]`` or ``[B, T]``, for the rotation alone.

    Raises:
        ValueError: If groups are routed and the counts are not whole groups.
    """
    all_gates: list[Tensor] = []
    all_p: list[Tensor] = []
    all_on: list[set[int]] = []
    project = separate(weights, recipe)

    def sees(_: int, t: int, s: int) -> bool:
        return window is None or abs(t - s) < window or s < sink

    def one(tokens: Tensor, places: Tensor) -> Tensor:
        out = one_sequence(tokens, places, project, recipe, sees)
        width = out.shape[1] // recipe.num_heads
        q = project(tokens)[0]
        rows = []
        for t in range(len(tokens)):
            gate, p, on = gates(tokens[t], q[t], weights, recipe, routing)
            all_gates.append(gate)
            all_p.append(p)
            all_on.append(on)
            rows.append(torch.cat([gate[h] * out[t, h * width : (h + 1) * width] for h in range(recipe.num_heads)]))
        return torch.stack(rows) if rows else out

    y = each_sequence(x, weights, one, key_padding=key_padding, positions=positions)
    real = torch.ones(x.shape[:2], dtype=torch.bool) if key_padding is None else ~key_padding
    gate = x.new_zeros(*x.shape[:2], recipe.num_heads)
    on = torch.zeros(*x.shape[:2], recipe.num_heads, dtype=torch.bool)
    if not all_gates:
        return Routed(y, gate, on, x.new_zeros(()))
    gate = gate.masked_scatter(real.unsqueeze(-1), torch.stack(all_gates))
    shared = routing.shared_heads
    rows = [[h < shared or h - shared in heads for h in range(recipe.num_heads)] for heads in all_on]
    on[real] = torch.tensor(rows)
    loss = balance_loss(all_p, all_on, routing) if routing.active_heads else x.new_zeros(())
    return Routed(y, gate, on, loss)
