"""The backward kernels: one over the lists of query blocks, one over the transposed lists. No atomics.

With p the weights, dP = dO . v and delta = sum(o dO) - dlse, the gradient of a score is ``p (dP - delta)``. Where a
block is gated, n are the weights within it, w its own weight, D = w sum(n dP) and G = D - w delta the gradient of its
logit: a score gets ``n (w dP - D + a G)``, a being 1 in the own block and 1 - mix elsewhere, and the gate ``mix G``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo_kernels._triton.forward import entry_of, load_tile, open_group, rotated_queries, scores_of, tile_of
from attnzoo_kernels._triton.primitives import (
    LOG2E,
    angles,
    bias_of,
    blank,
    gate_keys,
    gate_logit,
    gated,
    index_of,
    kept,
    load_keys,
    load_queries,
    open_keys,
    pairs,
    product,
    rotate,
    rows_of,
    shared,
    store_rows,
    visible,
)
from attnzoo_kernels._triton.structs import Rows, Sizes, Spot, TileIndex


@triton.jit
def gradients(s, dp, keep, rows, block, bias, logit, mix, lse2, delta, AXIS: tl.constexpr, c: tl.constexpr):
    """Weights of a tile, gradients of its scores, and of the gate ``[BM]``.

    ``s`` are scores base 2 before bias and mask, ``lse2`` the rows' log-sum-exps base 2.
    """
    if bias is not None:
        read = shared(bias, AXIS) > -float("inf")
        keep = keep & read
        s = s + tl.where(read, shared(bias, AXIS), 0.0)
    dgate = delta
    if c.GATE > 0:
        own = rows.own == block
        whole = keep
        keep, inner, shift = gated(s, keep, own, logit, mix, AXIS, c)
        n = tl.where(keep, tl.exp2(s - kept(inner, AXIS)), 0.0)
        w = tl.where(tl.max(keep.to(tl.int32), AXIS) > 0, tl.exp2(inner + shift - lse2), 0.0)
        dp = tl.where(keep, dp, 0.0)
        d = w * tl.sum(n * dp, AXIS)
        change = d - w * delta
        ds = n * (kept(w, AXIS) * dp - kept(d - tl.where(own, 1.0, 1.0 - mix) * change, AXIS))
        dgate = tl.where(own, 0.0, mix * change)
        if c.GATE == 1:
            landmark = whole & shared(tl.arange(0, c.BN) == c.BLOCK_K - 1, AXIS)
            ds = tl.where(landmark, kept(dgate, AXIS), ds)
        p = n * kept(w, AXIS)
    else:
        # Recomputed probabilities: the saved log-sum-exp makes weights of scores, without a second pass.
        p = tl.where(keep, tl.exp2(tl.where(keep, s, 0.0) - kept(lse2, AXIS)), 0.0)
        # Backward of the softmax.
        ds = tl.where(keep, p * (dp - kept(delta, AXIS)), 0.0)
    return p, ds, dgate


@triton.jit(do_not_specialize=["seq_q", "seq_k", "groups", "window", "sink_size"])
def query_kernel(
    q, k, v, out, dout, lse, dlse, delta, dq, dq_aux, lists, optional, natural, scale, seq_q, seq_k, groups, window,
    sink_size, c: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of queries, and ``delta [B, H, T]``; ``dq, dq_aux`` are contiguous, or ``None``."""
    sizes = Sizes(seq_q, seq_k, groups, window, sink_size)
    b, g, h, m, part, index = tile_of(tl.program_id(0), lists, sizes, c)
    rows = rows_of(b, h, m, part, optional, sizes, c)
    row = (b * groups * c.PER + rows.head).to(tl.int64) * seq_q + rows.token
    inside = (part * c.BM + tl.arange(0, c.BM) < c.PACK_GQA * c.BLOCK_Q) & (rows.token < seq_q)
    found = tl.load(lse + row, mask=inside, other=-float("inf"))
    live = found > -float("inf")
    d = tl.arange(0, c.DVP)
    alive = Rows(rows.head, rows.token, live, rows.own, rows.lo, rows.hi, rows.sink)
    do = load_queries(dout, b, alive, d, False, c.DV, c)
    o = tl.load(out + row[:, None] * c.DV + d[None, :], mask=live[:, None] & (d < c.DV)[None, :], other=0.0)
    # delta, the row sums of o * do, minus the gradient of the log-sum-exp.
    change = tl.sum(o.to(c.ACC) * do.to(c.ACC), 1)
    if dlse is not None:
        change -= tl.load(dlse + row, mask=live, other=0.0)
    tl.store(delta + row, change, mask=inside)
    if dq is not None or dq_aux is not None:
        lse2 = tl.where(live, found, 0.0) * LOG2E
        queries = load_tile(q, b, rows, optional, c)
        keys = open_group(k, v, b, g, seq_k, optional, c)
        where = TileIndex(b, g, h, (seq_k + c.BLOCK_K - 1) // c.BLOCK_K)
        tiles: tl.constexpr = (c.BLOCK_K + c.BN - 1) // c.BN
        dq_acc = blank(c.BM, c.DP, c)
        dq_aux_acc = blank(c.BM, c.DAP if c.DA > 0 else 16, c)
        for it in tl.range(tl.load(lists.start + index) * tiles, tl.load(lists.end + index) * tiles):
            s, rotated, key = scores_of(queries, keys, lists, it, where, scale, optional, sizes, c)
            at, block, first, within = entry_of(lists, it, where.blocks_k, c)
            keep = visible(first, within, rows, 1, c)
            bias = None
            if optional.bias is not None:
                bias = bias_of(optional, b, h, first, groups, seq_k, c)
            logit = queries.mix
            if c.GATE == 2:
                logit = gate_logit(rotated, gate_keys(optional, b, g, block, False, c), scale)
            value = load_keys(keys.v_view, keys.v, first, seq_k, d, False, c.DV, c)
            spot = Spot(b, g, alive, first, seq_k, at)
            dp = pairs(do, value, blank(c.BM, c.BN, c), dout, v, spot, None, optional, 1, c.DV, c)
            p, ds, dgate = gradients(s, dp, keep, rows, block, bias, logit, queries.mix, lse2, change, 1, c)
            # Keys that no row of the tile sees may hold NaN, and 0 * NaN would spread.
            seen = tl.max(keep.to(tl.int32), 0) > 0
            if optional.bias is not None:
                seen = seen & (bias > -float("inf"))
            if dq is not None:
                if c.ROTARY > 0:
                    cos, sin = angles(optional, tl.load(lists.origin + at), tl.arange(0, c.DP), c)
                    partner = load_keys(keys.k_view, k.ptr + b.to(tl.int64) * k.batch + g.to(tl.int64) * k.head,
                                        first, seq_k, tl.arange(0, c.DP), True, c.D, c)  # fmt: skip
                    key = rotate(key, partner, cos, -sin, c)
                key = tl.where(seen[:, None], key, 0.0)
                # dq = ds k.
                dq_acc = product(ds.to(key.dtype), key, dq_acc, c)
                if c.GATE == 2:
                    gate = gate_keys(optional, b, g, block, False, c)
                    if c.ROTARY > 0:
                        gate = gate * cos - gate_keys(optional, b, g, block, True, c) * sin
                    dq_acc += tl.where((dgate != 0)[:, None], dgate[:, None] * gate[None, :], 0.0)
            if dq_aux is not None:
                aux = load_keys(optional.k_aux, keys.aux, first, seq_k, tl.arange(0, c.DAP), False, c.DA, c)
                aux = tl.where(seen[:, None], aux, 0.0)
                dq_aux_acc = product(ds.to(aux.dtype), aux, dq_aux_acc, c)
        if dq is not None:
            store_rows(dq, dq_acc * natural, row, inside, c.D, c.DP)
        if dq_aux is not None:
            store_rows(dq_aux, dq_aux_acc * natural, row, inside, c.DA, c.DAP)


@triton.jit(do_not_specialize=["seq_q", "seq_k", "groups", "window", "sink_size", "splits", "num_keys"])
def key_kernel(
    q, k, v, dout, lse, delta, dk, dv, dbias, dk_aux, dgate, lists, optional, natural, scale, seq_q, seq_k, groups,
    window, sink_size, splits, num_keys, c: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys from the rows that read it, over all query heads of its group.

    With ``splits`` above 1 each program takes an equal share of the heads' lists, and every gradient has a leading
    dimension ``[splits]`` of ``num_keys`` keys each, to be added in order. Lists name query blocks for each key block.
    """
    sizes = Sizes(seq_q, seq_k, groups, window, sink_size)
    parts: tl.constexpr = (c.BLOCK_K + c.BN - 1) // c.BN
    row_parts: tl.constexpr = (c.PACK_GQA * c.BLOCK_Q + c.BM - 1) // c.BM
    packs: tl.constexpr = c.PER // c.PACK_GQA
    blocks_q = (seq_q + c.BLOCK_Q - 1) // c.BLOCK_Q
    blocks_k = (seq_k + c.BLOCK_K - 1) // c.BLOCK_K
    split = tl.program_id(0) % splits
    pid = tl.program_id(0) // splits
    within = (pid % parts) * c.BN
    block = (pid // parts) % blocks_k
    g = (pid // (parts * blocks_k)) % groups
    b = pid // (parts * blocks_k * groups)
    if lists.order is not None:
        block = tl.load(lists.order + index_of(b, g * c.PER, groups, c.LIST_BATCH, c.LIST_HEADS, c) * blocks_k + block)
    first = block * c.BLOCK_K + within
    key = load_keys(k, open_keys(k, b, g, seq_k, c.D, c.DP, c), first, seq_k, tl.arange(0, c.DP), False, c.D, c)
    value = load_keys(v, open_keys(v, b, g, seq_k, c.DV, c.DVP, c), first, seq_k, tl.arange(0, c.DVP), False, c.DV, c)
    key_aux = key
    if optional.k_aux is not None:
        source = open_keys(optional.k_aux, b, g, seq_k, c.DA, c.DAP, c)
        key_aux = load_keys(optional.k_aux, source, first, seq_k, tl.arange(0, c.DAP), False, c.DA, c)
    gate = blank(c.DP, 0, c)
    if c.GATE == 2:
        gate = gate_keys(optional, b, g, block, False, c)
    dk_acc = blank(c.BN, c.DP, c)
    dv_acc = blank(c.BN, c.DVP, c)
    dk_aux_acc = blank(c.BN, c.DAP if c.DA > 0 else 16, c)
    dbias_acc = blank(c.BN, 0, c)
    dgate_acc = blank(c.DP, 0, c)
    for group in range(packs):
        h = g * c.PER + group * c.PACK_GQA
        index = index_of(b, h, groups, c.LIST_BATCH, c.LIST_HEADS, c) * blocks_k + block
        start = tl.load(lists.start + index) * row_parts
        count = tl.load(lists.end + index) * row_parts - start
        share = (count + splits - 1) // splits
        bias = None
        if optional.bias is not None:
            bias = bias_of(optional, b, h, first, groups, seq_k, c)
        for it in tl.range(start + tl.minimum(split * share, count), start + tl.minimum((split + 1) * share, count)):
            at = it // row_parts
            m = tl.minimum(tl.maximum(tl.load(lists.col + at), 0), blocks_q - 1)
            rows = rows_of(b, h, m, it % row_parts, optional, sizes, c)
            row = (b * groups * c.PER + rows.head).to(tl.int64) * seq_q + rows.token
            found = tl.load(lse + row, mask=rows.valid, other=-float("inf"))
            # Rows that see nothing may hold NaN, and 0 * NaN would spread.
            live = found > -float("inf")
            rows = Rows(rows.head, rows.token, live, rows.own, rows.lo, rows.hi, rows.sink)
            change = tl.load(delta + row, mask=live, other=0.0)
            queries = load_tile(q, b, rows, optional, c)
            rotated = rotated_queries(queries, lists, at, optional, c)
            keep = visible(first, within, rows, 0, c) & live[None, :]
            do = load_queries(dout, b, rows, tl.arange(0, c.DVP), False, c.DV, c)
            spot = Spot(b, g, rows, first, seq_k, at)
            s = pairs(rotated, key, blank(c.BN, c.BM, c), q, k, spot, lists.origin, optional, 0, c.D, c)
            if optional.q_aux is not None:
                s = pairs(queries.aux, key_aux, s, optional.q_aux, optional.k_aux, spot, None, optional, 0, c.DA, c)
            logit = queries.mix
            if c.GATE == 2:
                logit = gate_logit(rotated, gate, scale)
            dp = pairs(do, value, blank(c.BN, c.BM, c), dout, v, spot, None, optional, 0, c.DV, c)
            p, ds, dlogit = gradients(s * scale, dp, keep, rows, block, bias, logit, queries.mix,
                                      tl.where(live, found, 0.0) * LOG2E, change, 0, c)  # fmt: skip
            # dv = p^T do, dk = ds^T q.
            if dv is not None:
                dv_acc = product(p.to(do.dtype), do, dv_acc, c)
            if dk is not None:
                dk_acc = product(ds.to(rotated.dtype), rotated, dk_acc, c)
            if dk_aux is not None:
                dk_aux_acc = product(ds.to(queries.aux.dtype), queries.aux, dk_aux_acc, c)
            if dbias is not None:
                dbias_acc += tl.sum(ds, 1)
            if dgate is not None:
                dgate_acc += tl.sum(dlogit[:, None] * rotated.to(c.ACC), 0)
        if dbias is not None and c.BIAS_HEADS == 2:
            n = split.to(tl.int64) * num_keys * c.PER + (b * groups * c.PER + h).to(tl.int64) * seq_k
            slot = first + tl.arange(0, c.BN)
            tl.store(dbias + n + slot, dbias_acc, mask=(slot < seq_k) & (slot - first < c.BLOCK_K - within))
            dbias_acc = blank(c.BN, 0, c)
    n = split.to(tl.int64) * num_keys + (b * groups + g).to(tl.int64) * seq_k
    dk_acc = dk_acc * natural
    slot = first + tl.arange(0, c.BN)
    row = n + slot
    there = (slot < seq_k) & (slot - first < c.BLOCK_K - within)
    if dbias is not None and c.BIAS_HEADS != 2:
        tl.store(dbias + row, dbias_acc, mask=there)
    if dk is not None:
        store_rows(dk, dk_acc, row, there, c.D, c.DP)
    if dv is not None:
        store_rows(dv, dv_acc, row, there, c.DV, c.DVP)
    if dk_aux is not None:
        store_rows(dk_aux, dk_aux_acc * natural, row, there, c.DA, c.DAP)
    if dgate is not None:
        d = tl.arange(0, c.DP)
        n = (split * (num_keys // seq_k) + b * groups + g).to(tl.int64) * blocks_k + block
        tl.store(dgate + n * c.D + d, (dgate_acc * natural).to(dgate.dtype.element_ty), mask=d < c.D)
