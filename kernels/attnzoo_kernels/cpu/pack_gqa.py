"""Laying the query heads of a group along the rows, so that a key block is gathered once for all of them.

Letters: B batch, H query heads, G KV heads, T query tokens, M query blocks.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnzoo_kernels.spec.call import Call
from attnzoo_kernels.spec.token_rule import PackedGQA

MOST_TALL = 256
"""Rows of a query block that stays whole."""

MOST_ROWS = 64
"""Rows of a packed query block: larger blocks are as quick as they are."""


def pack_gqa(call: Call) -> Call:
    """The same call with the heads of each group packed into its query blocks, where they read the same blocks."""
    batch, heads, groups, seq_q, _ = call.shape
    if seq_q == 0 or batch == 0:
        return call
    # One short query block needs no rows that hold nothing.
    call = cut_tall(replace(call, block_q=min(call.block_q, seq_q)))
    per_group = heads // groups
    if not _packs(call):
        return call
    packed = PackedGQA(per_group, call.block_q, seq_q)
    rule = call.rule
    aux = call.aux
    q_pos = None if rule.q_pos is None else _pack(rule.q_pos.unsqueeze(-1), packed, 1, absent=-1).squeeze(-1)
    return replace(
        call,
        q=_pack(call.q, packed, per_group),
        block_q=per_group * call.block_q,
        rule=replace(rule, q_pos=q_pos, packed=packed),
        aux=None if aux is None else (_pack(aux[0], packed, per_group), aux[1]),
    )


def packed_rows(call: Call) -> int:
    """Rows of a query block of :func:`pack_gqa`'s result, without making it. Reads metadata alone."""
    batch, heads, groups, seq_q, _ = call.shape
    if seq_q == 0 or batch == 0:
        return call.block_q
    call = replace(call, block_q=_cut_block(min(call.block_q, seq_q)))
    return call.block_q * (heads // groups if _packs(call) else 1)


def _packs(call: Call) -> bool:
    """Whether the heads of a group are packed into query blocks of this size."""
    _, heads, groups, _, _ = call.shape
    per_group = heads // groups
    return per_group > 1 and per_group * call.block_q <= MOST_ROWS and _heads_agree(call)


def _cut_block(rows: int) -> int:
    """The largest divisor of a tall block's rows that is not tall, or the rows themselves."""
    if rows <= MOST_TALL:
        return rows
    return next((n for n in range(MOST_TALL, 15, -1) if rows % n == 0), rows)


def cut_tall(call: Call) -> Call:
    """The same call with shorter query blocks where they are so tall that one row of blocks would not fit a chunk."""
    block = _cut_block(call.block_q)
    if block == call.block_q or call.q.shape[2] == 0:
        return call
    rows = torch.arange(-(-call.q.shape[2] // block), device=call.col.device) * block // call.block_q
    return replace(call, block_q=block, start=call.start[..., rows], count=call.count[..., rows])


def _heads_agree(call: Call) -> bool:
    groups = call.shape[2]
    bias = call.key_bias
    gate = call.gate
    return (
        call.start.shape[1] in (1, groups)
        and not call.rule.is_per_head
        and (bias is None or bias.shape[1] in (1, groups))
        and (gate is None or not isinstance(gate.mix, Tensor))
    )


def _pack(x: Tensor, packed: PackedGQA, split: int, absent: float = 0) -> Tensor:
    """``[B, h, T, D]`` as ``[B, h / split, M * heads * block, D]``; heads that are one for all are repeated."""
    heads, block, tokens = packed
    blocks = -(-tokens // block)
    x = pad(x, (0, 0, 0, blocks * block - tokens), value=absent) if tokens % block else x
    x = x.reshape(x.shape[0], x.shape[1] // split, split, blocks, block, x.shape[3])
    x = x.expand(-1, -1, heads, -1, -1, -1).transpose(2, 3)
    return x.reshape(x.shape[0], x.shape[1], blocks * heads * block, x.shape[5])


def pack_rows(x: Tensor, call: Call) -> Tensor:
    """Lays something of the original call, ``[B, H, T, D]``, as the packed call has its rows."""
    packed = call.rule.packed
    return x if packed is None else _pack(x, packed, packed.heads)


def unpack_rows(x: Tensor, call: Call) -> Tensor:
    """The inverse: ``[B, G, M * heads * block, D]`` as ``[B, H, T, D]``."""
    packed = call.rule.packed
    if packed is None:
        return x
    heads, block, tokens = packed
    batch, groups, rows, width = x.shape
    x = x.view(batch, groups, rows // (heads * block), heads, block, width).transpose(2, 3)
    return x.reshape(batch, groups * heads, -1, width)[:, :, :tokens]
