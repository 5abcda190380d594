"""What a call's kernels are compiled for and given: tiles, switches, lists and views, chosen from the call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo_kernels._triton.block_lists import BlockLists
from attnzoo_kernels._triton.structs import ListPointers, Shape, Switches, View
from attnzoo_kernels._triton.tile_table import Pass, Tiles, architecture_of, padded, tiles_for
from attnzoo_kernels.spec.call import Call

INTERPRETED: bool = triton.knobs.runtime.interpret
LEAST_RAISING = 1e-30
"""Scales from which -inf times the scale stays -inf, on devices too that take the smallest numbers for 0."""
STEP = 16
"""Channels that a product of the stepped form takes at a time."""
MOST_INT32 = 2**31 - 1
"""The largest position; a larger window hides nothing."""


def architecture(device: torch.device) -> str:
    """The table's name for a device."""
    return "default" if device.type != "cuda" else architecture_of(device.index or 0)


def unit_last(x: Tensor) -> Tensor:
    return x if x.shape[3] <= 1 or x.stride(3) == 1 else x.contiguous()


def view_of(x: Tensor) -> View:
    """A view; where there is one item or head, the stride means nothing and is 0."""
    batch, head = (0 if x.shape[i] == 1 else x.stride(i) for i in range(2))
    return View(x, batch, head, x.stride(2))


def is_describable(x: Tensor) -> bool:
    """Whether a descriptor can hold ``[S, D]`` of a tensor: addresses in multiples of 16 bytes."""
    view = view_of(x)
    size = x.element_size()
    steps = (view.batch, view.head, view.row)
    return x.data_ptr() % 16 == 0 and view.row > 0 and all(step * size % 16 == 0 for step in steps)


@dataclass(frozen=True)
class Job:
    """A call with everything that its kernels are given beside results.

    Attributes:
        call: The call, every tensor with a unit last stride.
        switches: Pointers of the switches.
        tiles: Of the pass.
        shape: What the kernel is compiled for.
        lists: The lists of the pass.
    """

    call: Call
    switches: Switches
    tiles: Tiles
    shape: Shape
    lists: ListPointers

    @property
    def sizes(self) -> tuple[Any, ...]:
        """Lengths, groups, window and sink."""
        call = self.call
        window = call.rule.window if isinstance(call.rule.window, int) else 1
        sink = call.rule.sink if isinstance(call.rule.sink, int) else 0
        _, _, groups, seq_q, seq_k = call.shape
        return seq_q, seq_k, groups, min(window, MOST_INT32), min(sink, MOST_INT32)

    @property
    def row_tiles(self) -> int:
        """Programs that cover all query blocks."""
        call = self.call
        c = self.shape
        batch, heads, _, _, _ = call.shape
        return batch * heads // int(c.PACK_GQA) * call.grid[0] * -(-int(c.PACK_GQA) * call.block_q // int(c.BM))

    @property
    def key_tiles(self) -> int:
        """Programs that cover all key blocks."""
        batch, _, groups, _, _ = self.call.shape
        return batch * groups * self.call.grid[1] * -(-self.call.block_k // int(self.shape.BN))


def prepare(call: Call) -> Call:
    """The call with unit last strides, and in the interpreter without bf16, which it cannot compute."""
    wide = INTERPRETED and call.q.dtype == torch.bfloat16

    def fit(x: Tensor) -> Tensor:
        return unit_last(x.float() if wide else x)

    gate = call.gate
    if gate is not None and gate.key is not None:
        gate = replace(gate, key=fit(gate.key))
    aux = None if call.aux is None else (fit(call.aux[0]), fit(call.aux[1]))
    return replace(call, q=fit(call.q), k=fit(call.k), v=fit(call.v), aux=aux, gate=gate)


def _switches(call: Call) -> Switches:
    rule = call.rule
    gate = call.gate
    origins = call.origins
    bias = call.key_bias
    mix = None
    if gate is not None:
        heads = call.shape[1]
        acc = call.acc_dtype
        given = gate.mix
        mix = given.to(acc).contiguous() if isinstance(given, Tensor) else call.q.new_full((heads,), given, dtype=acc)
    return Switches(
        q_pos=None if rule.q_pos is None else rule.q_pos.contiguous(),
        windows=rule.window.contiguous() if isinstance(rule.window, Tensor) else None,
        sinks=rule.sink.contiguous() if isinstance(rule.sink, Tensor) else None,
        bias=None if bias is None else bias.contiguous(),
        q_aux=None if call.aux is None else view_of(call.aux[0]),
        k_aux=None if call.aux is None else view_of(call.aux[1]),
        gate=None if gate is None or gate.key is None else view_of(gate.key),
        mix=mix,
        cos=None if origins is None else origins.cos.contiguous(),
        sin=None if origins is None else origins.sin.contiguous(),
    )


def _sharing(shape: Sequence[int], heads: int, groups: int) -> tuple[int, int]:
    """Whether something ``[B|1, h, ..]`` differs between items, and between nothing, groups or heads."""
    return int(shape[0] > 1), 0 if shape[1] == 1 else 2 if shape[1] == heads else 1


def job(call: Call, of: Pass, lists: BlockLists | None) -> Job:
    """Chooses tiles and says what to compile; without lists the layout's own are read as they are."""
    _, heads, groups, _, _ = call.shape
    width = call.q.shape[3]
    value_width = call.v.shape[3]
    aux_width = 0 if call.aux is None else call.aux[0].shape[3]
    widest = max(padded(width + aux_width), padded(value_width))
    name = architecture(call.q.device)
    tiles = tiles_for(name, of, min(widest, 256), call.q.element_size())
    switched = call.rule.window is not None or call.rule.q_pos is not None or call.key_bias is not None
    if switched or call.gate is not None or call.origins is not None:
        tiles = _narrowed(tiles, of)
    listed = _sharing((call.start if lists is None else lists.start).shape, heads, groups)
    bias = (0, 0) if call.key_bias is None else _sharing(call.key_bias.shape, heads, groups)
    pos = (0, 0) if call.rule.q_pos is None else _sharing(call.rule.q_pos.shape, heads, heads)
    per = heads // groups
    pack_gqa = per if per * call.block_q <= tiles.rows and listed[1] < 2 and bias[1] < 2 else 1
    rows, keys = _sides(call, tiles, pack_gqa)
    gate = 0 if call.gate is None else 1 if call.gate.is_last else 2
    plain = call.key_bias is None and call.aux is None and gate == 0 and call.origins is None
    form = tiles.form if plain and of == "forward" else "plain"
    described = all(is_describable(x) for x in (call.k, call.v, *(() if call.aux is None else (call.aux[1],))))
    # Specialised warps cannot zero slots of the next block, which a tile wider than its own would reach.
    whole = pack_gqa == 1 and call.block_k % keys == 0
    special = form == "specialised" and described and whole and is_describable(call.q)
    hidden = call.key_bias is not None or gate > 0 or call.block_k % keys > 0
    fields: dict[str, Any] = {
        "BLOCK_Q": call.block_q, "BLOCK_K": call.block_k, "BM": rows, "BN": keys,
        "D": width, "DV": value_width, "DA": aux_width,
        "DP": padded(width), "DVP": padded(value_width), "DAP": padded(aux_width),
        "PER": per, "PACK_GQA": pack_gqa, "CAUSAL": call.rule.causal, "WINDOW": _hides(call.rule.window),
        "SINK": isinstance(call.rule.sink, Tensor) or call.rule.sink > 0, "GATE": gate,
        "ROTARY": 0 if call.origins is None else call.origins.cos.shape[1],
        "LIST_BATCH": listed[0], "LIST_HEADS": listed[1], "POS_BATCH": pos[0], "POS_HEADS": pos[1],
        "BIAS_BATCH": bias[0], "BIAS_HEADS": bias[1],
        "ACC": tl.float64 if call.acc_dtype == torch.float64 else tl.float32,
        "PRECISION": _precision(name),
        "RAISING": call.scale > LEAST_RAISING and call.key_bias is None and gate == 0 and of in ("forward", "decode"),
        "TMA": described and tiles.form != "stepped", "SKEW": form == "skewed", "SPECIAL": special,
        "STEP": STEP if tiles.form == "stepped" else 0,
    }  # fmt: skip
    return Job(call, _switches(call), tiles, Shape(**fields), _lists(call, lists, split=not hidden, merged=special))


def _lists(call: Call, lists: BlockLists | None, *, split: bool, merged: bool) -> ListPointers:
    """The lists as the kernel takes them.

    Args:
        call: The call.
        lists: Sorted lists, or ``None`` for the layout's own.
        split: Whether entries before ``full`` may go without a mask.
        merged: Whether there must be one loop, which masks every entry.
    """
    if lists is None:
        origin = None if call.origins is None else call.origins.of_entry
        return ListPointers(call.start.contiguous(), None, call.count.contiguous(), call.col, origin, None)
    if merged:
        return ListPointers(lists.start, None, lists.end - lists.start, lists.col, lists.origin, lists.order)
    full = lists.full if split else lists.start
    return ListPointers(lists.start, full, lists.end, lists.col, lists.origin, lists.order)


def _hides(window: int | Tensor | None) -> bool:
    return isinstance(window, Tensor) or (window is not None and window <= MOST_INT32)


def _precision(name: str) -> str:
    """How fp32 is multiplied: on tensor cores in three parts, as exact as fp32 itself, where there are such."""
    # allow_tf32 raises where a user chose by this name, the newer one.
    if torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee" if name.startswith("gfx") else "tf32x3"


def _narrowed(tiles: Tiles, of: Pass) -> Tiles:
    """Half the side that passes by: switches take registers, which the table's tiles leave none of."""
    if of == "key":
        return tiles._replace(rows=max(16, tiles.rows // 2))
    return tiles._replace(keys=max(16, tiles.keys // 2))


def _sides(call: Call, tiles: Tiles, pack_gqa: int) -> tuple[int, int]:
    """Rows and keys of a tile: powers of two from 16. A gated tile holds its whole block."""
    rows = min(tiles.rows, padded(pack_gqa * call.block_q))
    keys = min(tiles.keys, padded(call.block_k))
    if call.gate is None or call.block_k <= keys:
        return rows, keys
    whole = padded(call.block_k)
    return max(16, min(rows, tiles.rows * tiles.keys // whole)), whole
