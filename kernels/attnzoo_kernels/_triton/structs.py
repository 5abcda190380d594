"""What the kernels are given and pass to each other, in named tuples: the compiler takes them apart.

Letters: b batch, h head, G KV heads, H query heads, M/N query/key blocks, T/S tokens and slots, D width.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class View(NamedTuple):
    """A tensor ``[B, h, T, D]`` whose last stride is 1, and its other strides."""

    ptr: Any
    batch: Any
    head: Any
    row: Any


class ListPointers(NamedTuple):
    """Lists of blocks: ``start, full, end`` of each list in ``col``; entries before ``full`` need no mask.

    ``origin`` lies beside ``col``. In lists of a layout as given, ``full`` is ``None`` and ``end`` is a count.
    """

    start: Any
    full: Any
    end: Any
    col: Any
    origin: Any
    order: Any


class Switches(NamedTuple):
    """Pointers of the switches, each ``None`` where it is off; ``q_aux, k_aux, gate`` are views."""

    q_pos: Any
    windows: Any
    sinks: Any
    bias: Any
    q_aux: Any
    k_aux: Any
    gate: Any
    mix: Any
    cos: Any
    sin: Any


class Shape(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
        BLOCK_Q, BLOCK_K: The layout's blocks.
        BM, BN: Sides of a tile.
        D, DV, DA: Widths of keys, values and auxiliary channels; 0 for none.
        DP, DVP, DAP: The same, padded to powers of two.
        PER: Query heads of a group. PACK_GQA: How many of them a tile holds, 1 or PER.
        CAUSAL, WINDOW, SINK: The token rule.
        GATE: 0 none, 1 each block's last key, 2 a key tensor.
        ROTARY: Planes that rotary origins rotate; 0 for none.
        LIST_BATCH, LIST_HEADS, POS_BATCH, POS_HEADS, BIAS_BATCH, BIAS_HEADS: Whether lists, positions and bias differ
            between items (0 or 1), and between nothing, groups or heads (0, 1, 2).
        ACC: Dtype of scores and accumulators.
        PRECISION: Of products of fp32.
        RAISING: Whether the scale is positive and nothing is added to scores, so that their maximum may be scaled last.
        TMA: Whether keys and values come through descriptors. SKEW, SPECIAL: Forms of the forward loop.
        STEP: How many channels products over channels take at a time; 0 for all.
    """

    BLOCK_Q: Any
    BLOCK_K: Any
    BM: Any
    BN: Any
    D: Any
    DV: Any
    DA: Any
    DP: Any
    DVP: Any
    DAP: Any
    PER: Any
    PACK_GQA: Any
    CAUSAL: Any
    WINDOW: Any
    SINK: Any
    GATE: Any
    ROTARY: Any
    LIST_BATCH: Any
    LIST_HEADS: Any
    POS_BATCH: Any
    POS_HEADS: Any
    BIAS_BATCH: Any
    BIAS_HEADS: Any
    ACC: Any
    PRECISION: Any
    RAISING: Any
    TMA: Any
    SKEW: Any
    SPECIAL: Any
    STEP: Any


class Sizes(NamedTuple):
    """Numbers that differ from call to call and compile nothing anew."""

    seq_q: Any
    seq_k: Any
    groups: Any
    window: Any
    sink_size: Any


class TileIndex(NamedTuple):
    """Where a tile is: item, KV head, first query head; and N."""

    b: Any
    g: Any
    h: Any
    blocks_k: Any


class Rows(NamedTuple):
    """The query rows of a tile, ``[BM]`` each: head, token, whether there is one, own block, and what it sees."""

    head: Any
    token: Any
    valid: Any
    own: Any
    lo: Any
    hi: Any
    sink: Any


class Spot(NamedTuple):
    """Where the pairs of a tile lie: item, KV head, query rows, first slot, number of slots; and the list's entry."""

    b: Any
    g: Any
    rows: Any
    first: Any
    seq_k: Any
    entry: Any


class Queries(NamedTuple):
    """What a tile's rows bring along: q, its rotary partners, auxiliary channels, and the share of gates ``[BM]``.

    ``view`` is where q came from, ``rows`` the rows themselves.
    """

    q: Any
    partner: Any
    aux: Any
    mix: Any
    view: Any
    rows: Any


class Keys(NamedTuple):
    """Where keys, values and auxiliary channels of a group come from: views with descriptors or pointers."""

    k: Any
    v: Any
    aux: Any
    k_view: Any
    v_view: Any


class SoftmaxState(NamedTuple):
    """The softmax so far: weighted values ``[BM, DVP]``, the largest score and the sum of weights ``[BM]``."""

    acc: Any
    m_i: Any
    l_i: Any
