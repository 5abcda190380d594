"""What the kernels share: where rows and keys lie, who sees whom, scores and gates of one tile.

A tile is BM query rows by BN key slots. Rows are tokens of one query block, of one head or of all heads of a group laid
one after the other. Inside, logarithms are base 2. ``AXIS`` is the axis of the keys: 1 in a tile of rows by keys, 0 in
a transposed one. What a constant condition excludes is left out by the compiler, branch by branch.

Letters: b batch, h query head, g KV head, m query block, n key block; t token, s slot.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo_kernels._triton.structs import Rows

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def kept(x, AXIS: tl.constexpr):
    """Values of rows, to be broadcast along the keys."""
    return tl.expand_dims(x, AXIS)


@triton.jit
def shared(x, AXIS: tl.constexpr):
    """Values of keys, to be broadcast along the rows."""
    return tl.expand_dims(x, 1 - AXIS)


@triton.jit
def index_of(b, h, groups, BATCH: tl.constexpr, HEADS: tl.constexpr, c: tl.constexpr):
    """The index of an item's query head among things that items, heads of a group or all heads may share."""
    index = b * BATCH
    if HEADS == 2:
        index = index * groups * c.PER + h
    elif HEADS == 1:
        index = index * groups + h // c.PER
    return index


@triton.jit
def rows_of(b, h, m, part, optional, sizes, c: tl.constexpr):
    """The rows of part ``part`` of query block m; h is the first of the tile's heads."""
    r = part * c.BM + tl.arange(0, c.BM)
    head = h + r // c.BLOCK_Q
    token = m * c.BLOCK_Q + r % c.BLOCK_Q
    valid = (r < c.PACK_GQA * c.BLOCK_Q) & (token < sizes.seq_q)
    pos = token + (sizes.seq_k - sizes.seq_q)
    if optional.q_pos is not None:
        index = index_of(b, head, sizes.groups, c.POS_BATCH, c.POS_HEADS, c).to(tl.int64) * sizes.seq_q
        pos = tl.load(optional.q_pos + index + token, mask=valid, other=-1)
        valid = valid & (pos >= 0)
    if c.WINDOW or optional.q_pos is not None:
        # A position, or its sum with a sizes.window, may be as large as 32 bits hold.
        pos = pos.to(tl.int64)
    lo = tl.zeros_like(pos)
    sink = tl.zeros_like(pos)
    hi = tl.zeros_like(pos) + sizes.seq_k
    if c.WINDOW:
        wide = tl.zeros_like(pos) + sizes.window
        if optional.windows is not None:
            wide = tl.load(optional.windows + head, mask=valid, other=1).to(tl.int64)
        lo = pos - wide + 1
        hi = pos + wide
        if c.SINK:
            sink += sizes.sink_size
            if optional.sinks is not None:
                sink = tl.load(optional.sinks + head, mask=valid, other=0).to(tl.int64)
            if c.CAUSAL:
                sink = tl.minimum(sink, pos + 1)
    if c.CAUSAL:
        hi = pos + 1
    lo = tl.minimum(tl.maximum(lo, 0), sizes.seq_k).to(tl.int32)
    hi = tl.where(valid, tl.minimum(tl.maximum(hi, 0), sizes.seq_k), 0).to(tl.int32)
    sink = tl.where(valid, tl.minimum(tl.maximum(sink, 0), sizes.seq_k), 0).to(tl.int32)
    # Division truncates here: without a causal rule a row may lie before the first slot.
    own = tl.where(pos < 0, -1, pos // c.BLOCK_K).to(tl.int32)
    return Rows(head, token, valid, own, lo, hi, sink)


@triton.jit
def load_queries(x, b, rows, d, partner: tl.constexpr, WIDTH: tl.constexpr, c: tl.constexpr):
    """Channels ``d`` of rows of a view, ``[BM, d]``; ``partner`` gives each one's partner in its rotary plane."""
    at = partners(d, c) if partner else d
    base = x.ptr + b.to(tl.int64) * x.batch + rows.head.to(tl.int64) * x.head + rows.token.to(tl.int64) * x.row
    return tl.load(base[:, None] + at[None, :], mask=rows.valid[:, None] & (d < WIDTH)[None, :], other=0.0)


@triton.jit
def open_keys(x, b, g, seq, WIDTH: tl.constexpr, PADDED: tl.constexpr, c: tl.constexpr):
    """Keys or values of a group: a descriptor, or a pointer to the first."""
    base = x.ptr + b.to(tl.int64) * x.batch + g.to(tl.int64) * x.head
    if c.TMA:
        return tl.make_tensor_descriptor(base, [seq, WIDTH], [x.row, 1], [c.BN, PADDED])
    else:
        return base


@triton.jit
def load_keys(x, source, first, seq, d, partner: tl.constexpr, WIDTH: tl.constexpr, c: tl.constexpr):
    """Channels ``d`` of slots ``first`` onwards, ``[BN, d]``, all where a descriptor reads; zeros behind the last."""
    if c.TMA and not partner:
        return source.load([first, 0])
    else:
        at = partners(d, c) if partner else d
        s = first + tl.arange(0, c.BN)
        where = s.to(tl.int64)[:, None] * x.row + at[None, :]
        return tl.load(source + where, mask=(s < seq)[:, None] & (d < WIDTH)[None, :], other=0.0)


@triton.jit
def store_rows(x, values, row, inside, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Stores a tile as rows ``row`` of a contiguous ``x [.., WIDTH]``."""
    d = tl.arange(0, PADDED)
    at = x + row[:, None] * WIDTH + d[None, :]
    tl.store(at, values.to(x.dtype.element_ty), mask=inside[:, None] & (d < WIDTH)[None, :])


@triton.jit
def partners(d, c: tl.constexpr):
    """The other value of each one's rotary plane."""
    return tl.where(d < c.ROTARY, d + c.ROTARY, tl.where(d < 2 * c.ROTARY, d - c.ROTARY, d))


@triton.jit
def angles(optional, origin, d, c: tl.constexpr):
    """Cosine and signed sine of an origin for channels ``d``; 1 and 0 where nothing is rotated."""
    at = origin.to(tl.int64) * c.ROTARY + tl.where(d < c.ROTARY, d, d - c.ROTARY)
    inside = d < 2 * c.ROTARY
    cos = tl.load(optional.cos + at, mask=inside, other=1.0).to(c.ACC)
    sin = tl.load(optional.sin + at, mask=inside, other=0.0).to(c.ACC)
    return cos, tl.where(d < c.ROTARY, sin, -sin)


@triton.jit
def rotate(x, partner, cos, sin, c: tl.constexpr):
    """Rows rotated by minus an origin; with the sine negated, by the origin."""
    moved = x.to(c.ACC) * cos[None, :] + partner.to(c.ACC) * sin[None, :]
    return moved.to(x.dtype)


@triton.jit
def visible(first, within, rows, AXIS: tl.constexpr, c: tl.constexpr):
    """Which pairs of a tile the token rule leaves; ``within`` is the tile's first slot counted from its block's."""
    offset = tl.arange(0, c.BN)
    s = shared(first + offset, AXIS)
    keep = s < kept(rows.hi, AXIS)
    if c.WINDOW:
        keep = keep & (s >= kept(rows.lo, AXIS))
        if c.SINK:
            keep = keep | (s < kept(rows.sink, AXIS))
    if c.BLOCK_K % c.BN != 0:
        keep = keep & shared(within + offset < c.BLOCK_K, AXIS)
    return keep


@triton.jit
def bias_of(optional, b, h, first, groups, seq_k, c: tl.constexpr):
    """The bias of a tile's keys ``[BN]``, base 2; -inf behind the last."""
    s = first + tl.arange(0, c.BN)
    index = index_of(b, h, groups, c.BIAS_BATCH, c.BIAS_HEADS, c).to(tl.int64) * seq_k
    return tl.load(optional.bias + index + s, mask=s < seq_k, other=-float("inf")).to(c.ACC) * LOG2E


@triton.jit
def product(a, b, acc, c: tl.constexpr):
    """A product in the accumulator's dtype, added to ``acc``."""
    return tl.dot(a, b, acc, input_precision=c.PRECISION, out_dtype=c.ACC)


@triton.jit
def pairs(a, e, acc, x, y, spot, origins, optional, AXIS: tl.constexpr, WIDTH: tl.constexpr, c: tl.constexpr):
    """Products of a tile's rows ``a``, of ``x`` rotated by ``origins``, and slots ``e``, of ``y``, added to ``acc``.

    Registers hold fp32 in two parts, too many where heads are wide: then ``c.STEP`` channels at a time are read again.
    """
    if c.STEP == 0:
        acc = product(a, tl.trans(e), acc, c) if AXIS == 1 else product(e, tl.trans(a), acc, c)
    else:
        source = open_keys(y, spot.b, spot.g, spot.seq_k, WIDTH, c.STEP, c)
        for begin in tl.range(0, a.shape[1], c.STEP):
            d = begin + tl.arange(0, c.STEP)
            rows = load_queries(x, spot.b, spot.rows, d, False, WIDTH, c)
            if origins is not None:
                cos, sin = angles(optional, tl.load(origins + spot.entry), d, c)
                rows = rotate(rows, load_queries(x, spot.b, spot.rows, d, True, WIDTH, c), cos, sin, c)
            slots = load_keys(y, source, spot.first, spot.seq_k, d, False, WIDTH, c)
            acc = product(rows, tl.trans(slots), acc, c) if AXIS == 1 else product(slots, tl.trans(rows), acc, c)
    return acc


@triton.jit
def blank(ROWS: tl.constexpr, WIDTH: tl.constexpr, c: tl.constexpr):
    """Zeros ``[ROWS, WIDTH]``, or ``[ROWS]`` for a width of 0."""
    return tl.full([ROWS] if WIDTH == 0 else [ROWS, WIDTH], 0.0, c.ACC)


@triton.jit
def gate_keys(optional, b, g, block, partner: tl.constexpr, c: tl.constexpr):
    """The gate key of a block ``[DP]``, or its partners."""
    d = tl.arange(0, c.DP)
    at = partners(d, c) if partner else d
    base = optional.gate.ptr + b.to(tl.int64) * optional.gate.batch + g.to(tl.int64) * optional.gate.head
    return tl.load(base + block.to(tl.int64) * optional.gate.row + at, mask=d < c.D, other=0.0).to(c.ACC)


@triton.jit
def gate_logit(q, key, scale):
    """Logits of a block's gate key for the rows of a tile ``[BM]``, base 2."""
    return tl.sum(q.to(key.dtype) * key[None, :], 1) * scale


@triton.jit
def gated(s, keep, own, logit, mix, AXIS: tl.constexpr, c: tl.constexpr):
    """The pairs of a gated block that count, its log-sum-exp ``lse``, and the ``shift`` that gating adds to scores.

    Rows whose own block this is are not gated; a gated block without a visible gate or an ordinary key vanishes.
    """
    if c.GATE == 1:
        last = shared(tl.arange(0, c.BN) == c.BLOCK_K - 1, AXIS)
        landmark = keep & last
        logit = tl.sum(tl.where(landmark, s, 0.0), AXIS)
        opened = own | (tl.max(landmark.to(tl.int32), AXIS) > 0)
        keep = keep & (last == 0)
    else:
        opened = own | True
    m_i = tl.max(tl.where(keep, s, -float("inf")), AXIS)
    alive = m_i > -float("inf")
    m_i = tl.where(alive, m_i, 0.0)
    weight = tl.sum(tl.where(keep, tl.exp2(s - kept(m_i, AXIS)), 0.0), AXIS)
    lse = m_i + tl.log2(tl.where(alive, weight, 1.0))
    shift = tl.where(own, 0.0, mix * (logit - lse))
    return keep & kept(alive & opened, AXIS), lse, shift
