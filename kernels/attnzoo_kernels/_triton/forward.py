"""The forward kernel, which also decodes, and the kernel that joins the parts of split lists."""

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo_kernels._triton.primitives import (
    LN2,
    LOG2E,
    angles,
    bias_of,
    blank,
    gate_keys,
    gate_logit,
    gated,
    index_of,
    load_keys,
    load_queries,
    open_keys,
    pairs,
    product,
    rotate,
    rows_of,
    store_rows,
    visible,
)
from attnzoo_kernels._triton.structs import Keys, Queries, Sizes, SoftmaxState, Spot, TileIndex


@triton.jit
def entry_of(lists, it, blocks_k, c: tl.constexpr):
    """Index, key block, first slot and offset within the block of a tile of a list."""
    parts: tl.constexpr = (c.BLOCK_K + c.BN - 1) // c.BN
    index = it // parts
    within = (it % parts) * c.BN
    block = tl.load(lists.col + index)
    block = tl.minimum(tl.maximum(block, 0), blocks_k - 1)
    return index, block, block * c.BLOCK_K + within, within


@triton.jit
def rotated_queries(queries, lists, index, optional, c: tl.constexpr):
    """The queries as an entry's origin rotates them."""
    q = queries.q
    if c.ROTARY > 0:
        cos, sin = angles(optional, tl.load(lists.origin + index), tl.arange(0, c.DP), c)
        q = rotate(q, queries.partner, cos, sin, c)
    return q


@triton.jit
def scores_of(queries, keys, lists, it, where, scale, optional, sizes, c: tl.constexpr):
    """Scores of a tile, base 2 unless ``c.RAISING``, before any mask; and the queries as they were rotated."""
    index, block, first, within = entry_of(lists, it, where.blocks_k, c)
    spot = Spot(where.b, where.g, queries.rows, first, sizes.seq_k, index)
    q = rotated_queries(queries, lists, index, optional, c)
    k = load_keys(keys.k_view, keys.k, first, sizes.seq_k, tl.arange(0, c.DP), False, c.D, c)
    s = pairs(q, k, blank(c.BM, c.BN, c), queries.view, keys.k_view, spot, lists.origin, optional, 1, c.D, c)
    if optional.q_aux is not None:
        aux = load_keys(optional.k_aux, keys.aux, first, sizes.seq_k, tl.arange(0, c.DAP), False, c.DA, c)
        s = pairs(queries.aux, aux, s, optional.q_aux, optional.k_aux, spot, None, optional, 1, c.DA, c)
    if not c.RAISING:
        s = s * scale
    return s, q, k


@triton.jit
def absorb(state, s, queries, keys, lists, it, where, scale, optional, sizes, MASKED: tl.constexpr, c: tl.constexpr):
    """Adds one tile to the online softmax."""
    index, block, first, within = entry_of(lists, it, where.blocks_k, c)
    v = load_keys(keys.v_view, keys.v, first, sizes.seq_k, tl.arange(0, c.DVP), False, c.DV, c)
    if MASKED:
        # The causal edge, the window and the sink, then the bias and the gate.
        keep = visible(first, within, queries.rows, 1, c)
        if optional.bias is not None:
            bias = bias_of(optional, where.b, where.h, first, sizes.groups, sizes.seq_k, c)
            keep = keep & (bias > -float("inf"))[None, :]
            s = s + tl.where(bias > -float("inf"), bias, 0.0)[None, :]
        if c.GATE > 0:
            logit = queries.mix
            if c.GATE == 2:
                q = rotated_queries(queries, lists, index, optional, c)
                logit = gate_logit(q, gate_keys(optional, where.b, where.g, block, False, c), scale)
            keep, inner, shift = gated(s, keep, queries.rows.own == block, logit, queries.mix, 1, c)
            s = s + shift[:, None]
        s = tl.where(keep, s, -float("inf"))
        if not c.SPECIAL:
            # Slots that no row of the tile sees may hold NaN, and 0 * NaN would spread.
            v = tl.where((tl.max(keep.to(tl.int32), 0) > 0)[:, None], v, 0.0)
    # Online softmax: the new maximum, the weights under it, and alpha, which rescales what was summed before.
    highest = tl.max(s, 1) * scale if c.RAISING else tl.max(s, 1)
    m_i = tl.maximum(state.m_i, highest)
    base = tl.where(m_i > -float("inf"), m_i, 0.0)
    p = tl.exp2((s * scale if c.RAISING else s) - base[:, None])
    alpha = tl.exp2(state.m_i - base)
    acc = product(p.to(v.dtype), v, state.acc * alpha[:, None], c)
    return SoftmaxState(acc, m_i, state.l_i * alpha + tl.sum(p, 1))


@triton.jit
def walk(state, begin, end, queries, keys, lists, where, scale, optional, sizes, MASKED: tl.constexpr, c: tl.constexpr):
    """Adds the tiles ``begin`` to ``end`` to the online softmax."""
    if c.SKEW:
        # The next tile's scores are under way while this one's softmax runs.
        if begin < end:
            s, q, k = scores_of(queries, keys, lists, begin, where, scale, optional, sizes, c)
            for it in tl.range(begin, end):
                ahead, q, k = scores_of(
                    queries, keys, lists, tl.minimum(it + 1, end - 1), where, scale, optional, sizes, c
                )
                state = absorb(state, s, queries, keys, lists, it, where, scale, optional, sizes, MASKED, c)
                s = ahead
    else:
        for it in tl.range(begin, end, warp_specialize=c.SPECIAL):
            s, q, k = scores_of(queries, keys, lists, it, where, scale, optional, sizes, c)
            state = absorb(state, s, queries, keys, lists, it, where, scale, optional, sizes, MASKED, c)
    return state


@triton.jit
def tile_of(pid, lists, sizes, c: tl.constexpr):
    """What a program computes: item, KV head, first query head, query block, and part of it; longest lists first."""
    parts: tl.constexpr = (c.PACK_GQA * c.BLOCK_Q + c.BM - 1) // c.BM
    packs: tl.constexpr = c.PER // c.PACK_GQA
    blocks_q = (sizes.seq_q + c.BLOCK_Q - 1) // c.BLOCK_Q
    part = pid % parts
    m = (pid // parts) % blocks_q
    rest = pid // (parts * blocks_q)
    h = (rest % (sizes.groups * packs)) * c.PACK_GQA
    b = rest // (sizes.groups * packs)
    index = index_of(b, h, sizes.groups, c.LIST_BATCH, c.LIST_HEADS, c) * blocks_q
    if lists.order is not None:
        m = tl.load(lists.order + index + m)
    return b, h // c.PER, h, m, part, index + m


@triton.jit
def load_tile(q, b, rows, optional, c: tl.constexpr):
    """The queries of a tile."""
    own = load_queries(q, b, rows, tl.arange(0, c.DP), False, c.D, c)
    partner = load_queries(q, b, rows, tl.arange(0, c.DP), True, c.D, c) if c.ROTARY > 0 else own
    aux = own
    if optional.q_aux is not None:
        aux = load_queries(optional.q_aux, b, rows, tl.arange(0, c.DAP), False, c.DA, c)
    mix = blank(c.BM, 0, c)
    if c.GATE > 0:
        mix = tl.load(optional.mix + rows.head, mask=rows.valid, other=0.0).to(c.ACC)
    return Queries(own, partner, aux, mix, q, rows)


@triton.jit
def open_group(k, v, b, g, seq_k, optional, c: tl.constexpr):
    """The keys and values of a group."""
    keys = open_keys(k, b, g, seq_k, c.D, c.DP, c)
    aux = keys
    if optional.k_aux is not None:
        aux = open_keys(optional.k_aux, b, g, seq_k, c.DA, c.DAP, c)
    return Keys(keys, open_keys(v, b, g, seq_k, c.DV, c.DVP, c), aux, k, v)


@triton.jit(do_not_specialize=["seq_q", "seq_k", "groups", "window", "sink_size", "splits", "num_rows"])
def forward_kernel(
    q, k, v, out, lse, lists, optional, scale, seq_q, seq_k, groups, window, sink_size, splits, num_rows,
    c: tl.constexpr,
):  # fmt: skip
    """One tile of rows against its list, or against one of ``splits`` equal parts of it.

    ``out [splits, B, H, T, DV]`` and ``lse [splits, B, H, T]`` (natural) are contiguous; ``num_rows`` is ``B * H * T``.
    """
    sizes = Sizes(seq_q, seq_k, groups, window, sink_size)
    split = tl.program_id(0) % splits
    b, g, h, m, part, index = tile_of(tl.program_id(0) // splits, lists, sizes, c)
    rows = rows_of(b, h, m, part, optional, sizes, c)
    if c.SPECIAL:
        # Specialised warps exist only in kernels without loads through tensors of pointers before the loop.
        head = q.ptr + b.to(tl.int64) * q.batch + h.to(tl.int64) * q.head
        source = tl.make_tensor_descriptor(head, [seq_q, c.D], [q.row, 1], [c.BM, c.DP])
        own = source.load([m * c.BLOCK_Q + part * c.BM, 0])
        queries = Queries(own, own, own, blank(c.BM, 0, c), q, rows)
    else:
        queries = load_tile(q, b, rows, optional, c)
    keys = open_group(k, v, b, g, seq_k, optional, c)
    where = TileIndex(b, g, h, (seq_k + c.BLOCK_K - 1) // c.BLOCK_K)
    tiles: tl.constexpr = (c.BLOCK_K + c.BN - 1) // c.BN
    start = tl.load(lists.start + index)
    state = SoftmaxState(blank(c.BM, c.DVP, c), blank(c.BM, 0, c) - float("inf"), blank(c.BM, 0, c))
    if lists.full is None:
        count = tl.load(lists.end + index) * tiles
        share = (count + splits - 1) // splits
        begin = start * tiles + tl.minimum(split * share, count)
        end = start * tiles + tl.minimum((split + 1) * share, count)
        state = walk(state, begin, end, queries, keys, lists, where, scale, optional, sizes, True, c)
    else:
        middle = tl.load(lists.full + index) * tiles
        end = tl.load(lists.end + index) * tiles
        state = walk(state, start * tiles, middle, queries, keys, lists, where, scale, optional, sizes, False, c)
        state = walk(state, middle, end, queries, keys, lists, where, scale, optional, sizes, True, c)
    # Finalise: divide by the sum of weights; a row that saw nothing gives 0 and -inf.
    live = state.l_i > 0
    result = state.acc / tl.where(live, state.l_i, 1.0)[:, None]
    found = tl.where(live, (state.m_i + tl.log2(tl.where(live, state.l_i, 1.0))) * LN2, -float("inf"))
    row = (b * groups * c.PER + rows.head).to(tl.int64) * seq_q + rows.token
    inside = (rows.token < seq_q) & (part * c.BM + tl.arange(0, c.BM) < c.PACK_GQA * c.BLOCK_Q)
    row += split.to(tl.int64) * num_rows
    tl.store(lse + row, found, mask=inside)
    store_rows(out, result, row, inside, c.DV, c.DVP)


@triton.jit(do_not_specialize=["rows", "splits"])
def join_kernel(parts, lses, out, lse, rows, splits, SPLITS: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr):
    """Joins ``parts [splits, rows, DV]`` with natural log-sum-exps ``[splits, rows]``, always in the same order."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, SPLITS)
    d = tl.arange(0, DVP)
    there = part < splits
    at = part.to(tl.int64) * rows + row
    found = tl.load(lses + at, mask=there, other=-float("inf"))
    m_i = tl.max(found, 0)
    live = m_i > -float("inf")
    weight = tl.exp2((found - tl.where(live, m_i, 0.0)) * LOG2E)
    l_i = tl.where(live, tl.sum(weight, 0), 1.0)
    values = tl.load(parts + at[:, None] * DV + d[None, :], mask=there[:, None] & (d < DV)[None, :], other=0.0)
    joined = tl.sum(values * weight[:, None], 0) / l_i
    tl.store(out + row * DV + d, joined.to(out.dtype.element_ty), mask=d < DV)
    tl.store(lse + row, tl.where(live, m_i + tl.log2(l_i) * LN2, -float("inf")))
