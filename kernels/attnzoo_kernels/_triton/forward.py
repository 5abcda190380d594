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
    load_keys,
    load_queries,
    open_keys,
    pairs,
    place_of,
    product,
    rows_of,
    store_rows,
    turn,
    visible,
)
from attnzoo_kernels._triton.structs import Keys, Place, Queries, Running, Sizes, Spot


@triton.jit
def entry_of(lists, it, blocks_k, c: tl.constexpr):
    """Place, key block, first slot and offset within the block of a tile of a list."""
    parts: tl.constexpr = (c.BLOCK_K + c.BN - 1) // c.BN
    place = it // parts
    within = (it % parts) * c.BN
    block = tl.load(lists.col + place)
    block = tl.minimum(tl.maximum(block, 0), blocks_k - 1)
    return place, block, block * c.BLOCK_K + within, within


@triton.jit
def turned_queries(queries, lists, place, more, c: tl.constexpr):
    """The queries as an entry's origin turns them."""
    q = queries.q
    if c.TURN > 0:
        cos, sin = angles(more, tl.load(lists.origin + place), tl.arange(0, c.DP), c)
        q = turn(q, queries.partner, cos, sin, c)
    return q


@triton.jit
def scores_of(queries, keys, lists, it, where, scale, more, sizes, c: tl.constexpr):
    """Scores of a tile, base 2 unless ``c.RAISING``, before any mask; and the queries as they were turned."""
    place, block, first, within = entry_of(lists, it, where.blocks_k, c)
    spot = Spot(where.b, where.g, queries.rows, first, sizes.seq_k, place)
    q = turned_queries(queries, lists, place, more, c)
    k = load_keys(keys.k_view, keys.k, first, sizes.seq_k, tl.arange(0, c.DP), False, c.D, c)
    s = pairs(q, k, blank(c.BM, c.BN, c), queries.view, keys.k_view, spot, lists.origin, more, 1, c.D, c)
    if more.q_aux is not None:
        aux = load_keys(more.k_aux, keys.aux, first, sizes.seq_k, tl.arange(0, c.DAP), False, c.DA, c)
        s = pairs(queries.aux, aux, s, more.q_aux, more.k_aux, spot, None, more, 1, c.DA, c)
    if not c.RAISING:
        s = s * scale
    return s, q, k


@triton.jit
def absorb(run, s, queries, keys, lists, it, where, scale, more, sizes, MASKED: tl.constexpr, c: tl.constexpr):
    """Adds one tile to the softmax."""
    place, block, first, within = entry_of(lists, it, where.blocks_k, c)
    v = load_keys(keys.v_view, keys.v, first, sizes.seq_k, tl.arange(0, c.DVP), False, c.DV, c)
    if MASKED:
        keep = visible(first, within, queries.rows, 1, c)
        if more.bias is not None:
            bias = bias_of(more, where.b, where.h, first, sizes.groups, sizes.seq_k, c)
            keep = keep & (bias > -float("inf"))[None, :]
            s = s + tl.where(bias > -float("inf"), bias, 0.0)[None, :]
        if c.GATE > 0:
            logit = queries.mix
            if c.GATE == 2:
                q = turned_queries(queries, lists, place, more, c)
                logit = gate_logit(q, gate_keys(more, where.b, where.g, block, False, c), scale)
            keep, inner, shift = gated(s, keep, queries.rows.own == block, logit, queries.mix, 1, c)
            s = s + shift[:, None]
        s = tl.where(keep, s, -float("inf"))
        if not c.SPECIAL:
            # Slots that no row of the tile sees may hold NaN, and 0 * NaN would spread.
            v = tl.where((tl.max(keep.to(tl.int32), 0) > 0)[:, None], v, 0.0)
    highest = tl.max(s, 1) * scale if c.RAISING else tl.max(s, 1)
    peak = tl.maximum(run.peak, highest)
    base = tl.where(peak > -float("inf"), peak, 0.0)
    p = tl.exp2((s * scale if c.RAISING else s) - base[:, None])
    fade = tl.exp2(run.peak - base)
    acc = product(p.to(v.dtype), v, run.acc * fade[:, None], c)
    return Running(acc, peak, run.total * fade + tl.sum(p, 1))


@triton.jit
def walk(run, begin, end, queries, keys, lists, where, scale, more, sizes, MASKED: tl.constexpr, c: tl.constexpr):
    """Adds the tiles ``begin`` to ``end`` to the softmax."""
    if c.SKEW:
        # The next tile's scores are under way while this one's softmax runs.
        if begin < end:
            s, q, k = scores_of(queries, keys, lists, begin, where, scale, more, sizes, c)
            for it in tl.range(begin, end):
                ahead, q, k = scores_of(queries, keys, lists, tl.minimum(it + 1, end - 1), where, scale, more, sizes, c)
                run = absorb(run, s, queries, keys, lists, it, where, scale, more, sizes, MASKED, c)
                s = ahead
    else:
        for it in tl.range(begin, end, warp_specialize=c.SPECIAL):
            s, q, k = scores_of(queries, keys, lists, it, where, scale, more, sizes, c)
            run = absorb(run, s, queries, keys, lists, it, where, scale, more, sizes, MASKED, c)
    return run


@triton.jit
def tile_of(pid, lists, sizes, c: tl.constexpr):
    """What a program computes: item, KV head, first query head, query block, and part of it; longest lists first."""
    parts: tl.constexpr = (c.PACK * c.BLOCK_Q + c.BM - 1) // c.BM
    packs: tl.constexpr = c.PER // c.PACK
    blocks_q = (sizes.seq_q + c.BLOCK_Q - 1) // c.BLOCK_Q
    part = pid % parts
    m = (pid // parts) % blocks_q
    rest = pid // (parts * blocks_q)
    h = (rest % (sizes.groups * packs)) * c.PACK
    b = rest // (sizes.groups * packs)
    place = place_of(b, h, sizes.groups, c.LIST_BATCH, c.LIST_HEADS, c) * blocks_q
    if lists.order is not None:
        m = tl.load(lists.order + place + m)
    return b, h // c.PER, h, m, part, place + m


@triton.jit
def load_tile(q, b, rows, more, c: tl.constexpr):
    """The queries of a tile."""
    own = load_queries(q, b, rows, tl.arange(0, c.DP), False, c.D, c)
    partner = load_queries(q, b, rows, tl.arange(0, c.DP), True, c.D, c) if c.TURN > 0 else own
    aux = own
    if more.q_aux is not None:
        aux = load_queries(more.q_aux, b, rows, tl.arange(0, c.DAP), False, c.DA, c)
    mix = blank(c.BM, 0, c)
    if c.GATE > 0:
        mix = tl.load(more.mix + rows.head, mask=rows.valid, other=0.0).to(c.ACC)
    return Queries(own, partner, aux, mix, q, rows)


@triton.jit
def open_group(k, v, b, g, seq_k, more, c: tl.constexpr):
    """The keys and values of a group."""
    keys = open_keys(k, b, g, seq_k, c.D, c.DP, c)
    aux = keys
    if more.k_aux is not None:
        aux = open_keys(more.k_aux, b, g, seq_k, c.DA, c.DAP, c)
    return Keys(keys, open_keys(v, b, g, seq_k, c.DV, c.DVP, c), aux, k, v)


@triton.jit(do_not_specialize=["seq_q", "seq_k", "groups", "window", "sink_size", "splits", "total"])
def forward_kernel(
    q, k, v, out, lse, lists, more, scale, seq_q, seq_k, groups, window, sink_size, splits, total, c: tl.constexpr,
):  # fmt: skip
    """One tile of rows against its list, or against one of ``splits`` equal parts of it.

    ``out [splits, B, H, T, DV]`` and ``lse [splits, B, H, T]`` (natural) are contiguous; ``total`` is ``B * H * T``.
    """
    sizes = Sizes(seq_q, seq_k, groups, window, sink_size)
    split = tl.program_id(0) % splits
    b, g, h, m, part, place = tile_of(tl.program_id(0) // splits, lists, sizes, c)
    rows = rows_of(b, h, m, part, more, sizes, c)
    if c.SPECIAL:
        # Specialised warps exist only in kernels without loads through tensors of pointers before the loop.
        head = q.ptr + b.to(tl.int64) * q.batch + h.to(tl.int64) * q.head
        source = tl.make_tensor_descriptor(head, [seq_q, c.D], [q.row, 1], [c.BM, c.DP])
        own = source.load([m * c.BLOCK_Q + part * c.BM, 0])
        queries = Queries(own, own, own, blank(c.BM, 0, c), q, rows)
    else:
        queries = load_tile(q, b, rows, more, c)
    keys = open_group(k, v, b, g, seq_k, more, c)
    where = Place(b, g, h, (seq_k + c.BLOCK_K - 1) // c.BLOCK_K)
    tiles: tl.constexpr = (c.BLOCK_K + c.BN - 1) // c.BN
    start = tl.load(lists.start + place)
    run = Running(blank(c.BM, c.DVP, c), blank(c.BM, 0, c) - float("inf"), blank(c.BM, 0, c))
    if lists.full is None:
        count = tl.load(lists.end + place) * tiles
        share = (count + splits - 1) // splits
        begin = start * tiles + tl.minimum(split * share, count)
        end = start * tiles + tl.minimum((split + 1) * share, count)
        run = walk(run, begin, end, queries, keys, lists, where, scale, more, sizes, True, c)
    else:
        middle = tl.load(lists.full + place) * tiles
        end = tl.load(lists.end + place) * tiles
        run = walk(run, start * tiles, middle, queries, keys, lists, where, scale, more, sizes, False, c)
        run = walk(run, middle, end, queries, keys, lists, where, scale, more, sizes, True, c)
    live = run.total > 0
    result = run.acc / tl.where(live, run.total, 1.0)[:, None]
    found = tl.where(live, (run.peak + tl.log2(tl.where(live, run.total, 1.0))) * LN2, -float("inf"))
    row = (b * groups * c.PER + rows.head).to(tl.int64) * seq_q + rows.token
    inside = (rows.token < seq_q) & (part * c.BM + tl.arange(0, c.BM) < c.PACK * c.BLOCK_Q)
    row += split.to(tl.int64) * total
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
    peak = tl.max(found, 0)
    live = peak > -float("inf")
    weight = tl.exp2((found - tl.where(live, peak, 0.0)) * LOG2E)
    total = tl.where(live, tl.sum(weight, 0), 1.0)
    values = tl.load(parts + at[:, None] * DV + d[None, :], mask=there[:, None] & (d < DV)[None, :], other=0.0)
    joined = tl.sum(values * weight[:, None], 0) / total
    tl.store(out + row * DV + d, joined.to(out.dtype.element_ty), mask=d < DV)
    tl.store(lse + row, tl.where(live, peak + tl.log2(total) * LN2, -float("inf")))
