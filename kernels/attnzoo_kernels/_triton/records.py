"""What the kernels are given, in named tuples: the compiler takes them apart.

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


class Lists(NamedTuple):
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
        PER: Query heads of a group. PACK: How many of them a tile holds, 1 or PER.
        CAUSAL, WINDOW, SINK: The token rule.
        GATE: 0 none, 1 each block's last key, 2 a key tensor.
        TURN: Planes that rotary origins turn; 0 for none.
        LIST_BATCH, LIST_HEADS, POS_BATCH, POS_HEADS, BIAS_BATCH, BIAS_HEADS: Whether lists, positions and bias differ
            between items (0 or 1), and between nothing, groups or heads (0, 1, 2).
        ACC: Dtype of scores and accumulators.
        PRECISION: Of products of fp32.
        RAISING: Whether the scale is positive and nothing is added to scores, so that their maximum may be scaled last.
        TMA: Whether keys and values come through descriptors. SKEW, SPECIAL: Forms of the forward loop.
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
    PACK: Any
    CAUSAL: Any
    WINDOW: Any
    SINK: Any
    GATE: Any
    TURN: Any
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
