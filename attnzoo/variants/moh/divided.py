"""Calls of the operation that stand for one: shared beside routed heads, and runs of KV heads that one token needs.

Letters: B batch, T query tokens, S key tokens, C model width, H query heads, G KV heads, D head width, Dv value width,
R rows of the longest head.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from attnzoo.base.shared_layouts import dense_layout
from attnzoo.base.steps import AttentionInputs
from attnzoo.variants.moh.forms import query_block
from attnzoo.variants.moh.routed_rows import Rows
from attnzoo_kernels import BlockLayout, Extras, Slots, attend_slots, block_sparse_attention


@dataclass(frozen=True, kw_only=True)
class Operation:
    """What all calls share.

    Attributes:
        block: Tokens in a block of the layouts.
        scale: The factor on scores; ``None`` means ``D ** -0.5``.
        impl: The implementation.
    """

    block: int
    scale: float | None
    impl: str

    def rule(self, *, causal: bool) -> dict[str, Any]:
        """The named arguments of each call."""
        return {"causal": causal, "scale": self.scale, "impl": self.impl}


def two_calls(
    operation: Operation, inputs: AttentionInputs, rows: Rows, shared: int, *, causal: bool
) -> tuple[Tensor, Tensor]:
    """The shared heads in one call, which computes every row, and the rows of the routed heads in another.

    Args:
        operation: How each is computed.
        inputs: All heads.
        rows: The rows of the routed heads.
        shared: Shared heads, the first ones.
        causal: Whether a row reads no later slot.

    Returns:
        ``[B, shared, T, Dv]`` and ``[B, H - shared, R, Dv]``.
    """
    tokens = inputs.q.shape[2]
    slots = inputs.k.shape[2]
    heads = [shared, inputs.q.shape[1] - shared]
    groups = [n * inputs.k.shape[1] // inputs.q.shape[1] for n in heads]
    q, routed_q = inputs.q.split(heads, 1)
    k, routed_k = inputs.k.split(groups, 1)
    v, routed_v = inputs.v.split(groups, 1)
    rule = operation.rule(causal=causal)
    # Shared heads: every row, at no positions of their own.
    whole = block_sparse_attention(q, k, v, dense_layout(operation.block, tokens, slots, q), **rule)
    # Routed heads: the gathered rows, each at the slot of its token.
    routed_q = rows.gather(routed_q)
    longest = routed_q.shape[2]
    block_q = query_block(operation.block, longest)
    layout = BlockLayout.dense(block_q, operation.block, longest, slots, device=q.device)
    pos = rows.positions(None, slots - tokens if causal else 0)
    routed = block_sparse_attention(routed_q, routed_k, routed_v, layout, extras=Extras(q_pos=pos), **rule)
    return whole, routed


def in_order(whole: Tensor, routed: Tensor, rows: Rows) -> Tensor:
    """Shared heads and the rows of routed ones as ``[B, H, T, D]``, laid out by tokens as the projection reads it."""
    return torch.cat([whole.transpose(1, 2), rows.scatter(routed).transpose(1, 2)], 2).transpose(1, 2)


def packed(whole: Tensor, routed: Tensor) -> Tensor:
    """The rows of shared heads and the gathered ones of routed heads behind each other, ``[B, 1, rows, Dv]``."""
    return torch.cat([whole.flatten(1, 2), routed.flatten(1, 2)], 1).unsqueeze(1)


def project_packed(out: Tensor, o_proj: nn.Linear, gates: Tensor, rows: Rows) -> Tensor:
    """The output ``[B, T, C]`` of :func:`packed` rows: of the routed heads, the routed rows alone are multiplied.

    Args:
        out: ``[B, 1, shared * T + routed * R, Dv]``.
        o_proj: The output's projection, a plain product.
        gates: Weights of all heads, ``[B, H, T, 1]``.
        rows: The rows of the routed heads.
    """
    batch, _, _, width = out.shape
    tokens = rows.tokens
    shared = gates.shape[1] - rows.token.shape[1]
    whole = out[:, 0, : shared * tokens].view(batch, shared, tokens, width)
    routed = out[:, 0, shared * tokens :].view(batch, *rows.token.shape[1:], width)
    of_whole, of_routed = gates.split([shared, routed.shape[1]], 1)
    weights = o_proj.weight.unflatten(1, (-1, width)).unbind(1)  # of each head, [C, Dv]
    # Shared heads are joined and projected as ever; each routed head adds its own rows' products.
    joined = (whole * of_whole).transpose(1, 2).reshape(batch * tokens, shared * width)
    y = linear(joined, torch.cat(weights[:shared], 1), o_proj.bias)
    rows.add_products(y, routed * rows.gather(of_routed), weights[shared:])
    return y.view(batch, tokens, -1)


class RowCall(NamedTuple):
    """A decoding step: a row of queries ``[B, H, 1, D]``, a cache's keys and values, what is read, and the scale."""

    q: Tensor
    k: Tensor
    v: Tensor
    slots: Slots
    scale: float


def attend_needed(call: RowCall, active: Tensor) -> Tensor:
    """A row's heads ``[B, H, 1, Dv]``, of which KV heads that nobody needs are not read, and give 0.

    Args:
        call: All heads.
        active: Which query heads are needed, bool ``[B, H]``.
    """
    q, k, v, slots, scale = call
    each = q.shape[1] // k.shape[1]
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    for item, needed in enumerate(active.unflatten(1, (-1, each)).any(2).tolist()):
        first = 0
        for is_needed, run in groupby(needed):
            last = first + len(list(run))
            if is_needed:
                rows = slice(first * each, last * each)
                groups = slice(first, last)
                row = q[item : item + 1, rows]
                keys = k[item : item + 1, groups]
                values = v[item : item + 1, groups]
                out[item : item + 1, rows] = attend_slots(row, keys, values, slots, scale=scale)
            first = last
    return out


def read_in_place(operation: Operation, inputs: AttentionInputs) -> Tensor:
    """One token: a call for each run of neighbouring KV heads that an item needs, so that nothing is copied.

    Args:
        operation: How each is computed.
        inputs: All heads; ``q_pos`` is -1 at heads that are not needed.
    """
    if inputs.q_pos is None:
        raise AssertionError("one token whose heads are chosen has positions")
    q = inputs.q
    k = inputs.k
    v = inputs.v
    each = q.shape[1] // k.shape[1]
    outs = []
    for item, positions in enumerate(inputs.q_pos[:, ::each, 0].tolist()):
        runs = []
        head = 0
        for position, run in groupby(positions):
            end = head + len(list(run))
            rows = q[item : item + 1, head * each : end * each]
            if position < 0:
                runs.append(rows.new_zeros(*rows.shape[:3], v.shape[3]))
            else:
                # One token reads every slot up to its own.
                keys, values = (x[item : item + 1, head:end, : position + 1] for x in (k, v))
                layout = dense_layout(operation.block, 1, position + 1, q)
                runs.append(block_sparse_attention(rows, keys, values, layout, **operation.rule(causal=True)))
            head = end
        outs.append(torch.cat(runs, 1))
    return torch.cat(outs)
