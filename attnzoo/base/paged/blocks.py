"""Rows of heads that remember by place: near blocks, the first ones, and the row that stands for all that is lost.

Every query block reads by its own place, so that calls may be cut at will. Keys are laid out by blocks: of each own
block the row for what its rows have lost, the blocks that are held, the call's own.

Letters: B batch, T tokens of a call, h heads of an extent, G KV heads, D head width, w tokens of a block, C blocks
held, N own blocks, M query blocks, L near blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnzoo.base.editing.operation import HeldKeys, OperationCall, attend
from attnzoo.base.padding import add_front, drop_front, front_positions
from attnzoo.base.paged.inputs import PagedInputs, precise_of
from attnzoo.base.steps import Way
from attnzoo.cache.evicting.regions import of_heads
from attnzoo.cache.lengths import Lengths
from attnzoo.cache.pages.apply import Lost
from attnzoo.cache.pages.extents import BlockRing, Extent
from attnzoo_kernels import BlockLayout, Extras


@dataclass(frozen=True, eq=False)
class Columns:
    """Blocks of keys, and which of the sequence's blocks they are.

    Attributes:
        k: ``[B, h, n * w, D]``.
        v: ``[B, h, n * w, Dv]``.
        bias: ``[B, h, n * w]``, -inf where there is no row.
        block: Number of each, int64 ``[B|1, h|1, n]``; -1 where there is none.
    """

    k: Tensor
    v: Tensor
    bias: Tensor
    block: Tensor


def attend_blocks(inputs: PagedInputs, extent: Extent, way: Way) -> Tensor:
    """Attention of heads that remember by place.

    Args:
        inputs: The call.
        extent: Whose pages are read.
        way: How the operation is run.

    Returns:
        ``[B, h * H / G, T, Dv]``.
    """
    ring = extent.ring
    if ring is None:
        raise AssertionError("blocks are those of heads that remember by place")
    cache = inputs.cache
    size = ring.rows
    q, _, _ = inputs.own_of(extent.heads)
    tokens = q.shape[2]
    offset = cache.offset
    held = _held(inputs, extent)
    own = _own(inputs, extent, size)
    parts = [held, own]
    lost = None
    if cache.policy.folds:
        lost = _lost(inputs, extent, held, own)
        parts.insert(0, lost)
    k, v, bias = (torch.cat([getattr(part, name) for part in parts], 2) for name in ("k", "v", "bias"))
    # Query blocks lie on the sequence's own grid.
    block_q = size if tokens >= size else 1
    front = offset % block_q
    rows = Lengths(front).most(block_q - 1) + tokens
    begin = torch.arange(-(-rows // block_q), device=q.device) * block_q
    query = ((Lengths(offset - front).column() + begin.unsqueeze(0)) // size)[:, None, :, None]  # [B|1, 1, M, 1]
    keep = [_reads(ring, part.block.unsqueeze(2), query) for part in (held, own)]
    if lost is not None:
        keep.insert(0, (lost.block.unsqueeze(2) == query).expand(-1, len(extent.heads), -1, -1))
    heads = len(extent.heads)
    batch = max(x.shape[0] for x in keep)
    seen = torch.cat([x.expand(batch, heads, -1, -1) for x in keep], 3)
    before = k.shape[2] - own.k.shape[2]
    q_pos = inputs.row_slots(offset % size + before)
    operation = OperationCall(
        q=add_front(q, front, rows),
        k=k,
        v=v,
        layout=BlockLayout.from_mask(seen, block_q, size, rows, k.shape[2]),
        extras=Extras(q_pos=front_positions(q_pos, front, rows), key_bias=bias),
        scale=way.scale,
        impl=way.impl,
    )
    token = None if inputs.edits is None else _tokens(inputs, extent, own, before)
    return drop_front(attend(operation, inputs.edits, HeldKeys(extent.heads, token)), front, tokens)


def _tokens(inputs: PagedInputs, extent: Extent, own: Columns, before: int) -> Tensor:
    """The tokens of keys that are laid out so, int64 ``[B, h, n]``; -1 for what is none, as are rows before these."""
    pool = inputs.cache.pool
    position = pool.view("position", extent).narrow(2, 0, extent.live * pool.page).long()
    row = torch.arange(pool.page, device=position.device)
    token = (own.block.unsqueeze(-1) * pool.page + row).flatten(2)
    front = pad(position, (before - position.shape[2], 0), value=-1)
    return torch.cat((front, token.expand(*position.shape[:2], -1)), 2)


def _reads(ring: BlockRing, block: Tensor, query: Tensor) -> Tensor:
    """Whether rows of a block read another, bool ``[B|1, h|1, M, n]``."""
    return (block >= 0) & (block <= query) & ((block < ring.sink) | (query - block < ring.local))


def _held(inputs: PagedInputs, extent: Extent) -> Columns:
    """The blocks that are held, in the order in which they lie."""
    pool = inputs.cache.pool
    rows = extent.live * pool.page
    k = pool.view("k", extent).narrow(2, 0, rows).to(inputs.k)
    v = pool.view("v", extent).narrow(2, 0, rows).to(inputs.v)
    # Blocks that are out of sight for the next token are seen by no row of the call.
    bias = pool.view("bias", extent).narrow(2, 0, rows).to(precise_of(inputs.q))
    return Columns(k, v, bias, pool.blocks(extent).to(pool.device))


def _own(inputs: PagedInputs, extent: Extent, size: int) -> Columns:
    """The call's own blocks, on the sequence's grid."""
    _, k, v = inputs.own_of(extent.heads)
    offset = inputs.cache.offset
    tokens = k.shape[2]
    front = offset % size
    blocks = -(-(Lengths(front).most(size - 1) + tokens) // size)
    row = torch.arange(blocks * size, device=k.device) - Lengths(front).column()
    there = (row >= 0) & (row < Lengths(inputs.lengths).column())  # [n * w] or [B, n * w]
    bias = torch.zeros(there.shape, dtype=precise_of(inputs.q), device=k.device).masked_fill_(~there, -torch.inf)
    bias = bias.view(-1, 1, blocks * size).expand(k.shape[0], k.shape[1], -1)
    number = torch.arange(blocks, device=k.device) + Lengths(offset // size).column()
    k, v = (add_front(x, front, blocks * size) for x in (k, v))
    return Columns(k, v, bias, number.view(-1, 1, blocks))


def _lost(inputs: PagedInputs, extent: Extent, held: Columns, own: Columns) -> Columns:
    """For each own block the row that stands for what its rows have lost, alone in a block of keys."""
    cache = inputs.cache
    ring = extent.ring
    if ring is None:
        raise AssertionError("blocks are those of heads that remember by place")
    heads = list(extent.heads)
    batch, number = inputs.k.shape[0], own.block.shape[2]
    before = cache.lost if cache.lost is not None else Lost.nothing(cache.pool)
    block = torch.cat([x.block.expand(batch, len(heads), -1) for x in (held, own)], 2).unsqueeze(2)
    query = own.block.unsqueeze(-1)  # [B|1, 1, N, 1]
    gone = ((block >= ring.sink) & (block <= query - ring.local)).to(before.mass.dtype)  # [B, h, N, C + N]
    sums = _block_sums(inputs, extent, held, own)
    wide = []
    for each, total in zip(sums, before.tensors, strict=True):
        found = total.new_zeros(batch, number, cache.pool.heads, *total.shape[2:])
        first = total[:, heads].unsqueeze(2)
        added = torch.matmul(gone, each if each.dim() == 4 else each.unsqueeze(-1))
        summed = first + (added if each.dim() == 4 else added.squeeze(-1))
        wide.append(found.index_copy(2, torch.tensor(heads, device=found.device), summed.transpose(1, 2)))
    # Own blocks along the batch: the policy says their biases at once.
    k, v, bias = cache.shown(Lost(*(x.flatten(0, 1) for x in wide)))
    k, v, bias = (of_heads(x.unflatten(0, (batch, number)).transpose(1, 2), extent.heads) for x in (k, v, bias))
    size = ring.rows
    bias = pad(bias.unsqueeze(-1), (0, size - 1), value=-torch.inf).flatten(2, 3)
    k, v = (pad(x.unsqueeze(3), (0, 0, 0, size - 1)).flatten(2, 3) for x in (k, v))
    return Columns(k.to(own.k.dtype), v.to(own.v.dtype), bias.to(own.bias.dtype), own.block)


def _block_sums(inputs: PagedInputs, extent: Extent, held: Columns, own: Columns) -> tuple[Tensor, ...]:
    """Of each block, held or own: sums of keys and values ``[B, h, C + N, D]``, rows and moments ``[B, h, C + N]``."""
    cache = inputs.cache
    pool = cache.pool
    size = pool.page
    moment = pool.tensors.get("moment")
    sums: list[list[Tensor]] = [[], [], [], []]
    for part in (held, own):
        if part is held:
            there = pool.view("position", extent).narrow(2, 0, part.k.shape[2]) >= 0
        else:
            there = part.bias > -torch.inf
        precise = precise_of(inputs.q)
        for x, found in ((part.k, sums[0]), (part.v, sums[1])):
            found.append(x.to(precise).masked_fill(~there.unsqueeze(-1), 0).unflatten(2, (-1, size)).sum(3))
        sums[2].append(there.unflatten(2, (-1, size)).sum(3).to(precise))
        if moment is None:
            sums[3].append(torch.zeros_like(sums[2][-1]))
            continue
        if part is held:
            each = pool.view("moment", extent).narrow(2, 0, part.k.shape[2])
        else:
            given = cache.policy.moment_of(inputs.k)
            if given is None:
                raise AssertionError("moments are asked for where there are some")
            each = add_front(of_heads(given, extent.heads).unsqueeze(-1), cache.offset % size, part.k.shape[2])
            each = each.squeeze(-1)
        sums[3].append(each.to(precise).masked_fill(~there, 0).unflatten(2, (-1, size)).sum(3))
    return tuple(torch.cat(x, 2) for x in sums)
