"""Runs a call on the Triton kernels: views, lists, tiles, grids, and what becomes of partial results."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from attnzoo_kernels._triton.backward import key_kernel, query_kernel
from attnzoo_kernels._triton.block_lists import BlockLists, lists_of
from attnzoo_kernels._triton.forward import forward_kernel, join_kernel
from attnzoo_kernels._triton.structs import ListPointers, Shape, Switches, View
from attnzoo_kernels._triton.tile_table import Pass, Tiles, architecture_of, padded, tiles_for
from attnzoo_kernels.errors import KernelError
from attnzoo_kernels.spec.call import Call

INTERPRETED: bool = triton.knobs.runtime.interpret
LOG2E = math.log2(math.e)
MOST_SPLITS = 64
LEAST_RAISING = 1e-30
"""Scales from which -inf times the scale stays -inf, on devices too that take the smallest numbers for 0."""
STEP = 16
"""Channels that a product of the stepped form takes at a time."""
MOST_INT32 = 2**31 - 1
"""The largest position; a larger window hides nothing."""
FEW_ROWS = 16
"""Tiles of at most so many rows read a layout's lists as they are: sorting them first would cost more than masks."""

_interpreter = threading.RLock()
"""Interpreted programs share one grid index: two at once compute wrong numbers without a word."""


@cache
def processors(device: torch.device) -> int:
    """Programs that run side by side on a device; 1 in the interpreter."""
    return 1 if device.type != "cuda" else int(torch.cuda.get_device_properties(device).multi_processor_count)


def architecture(device: torch.device) -> str:
    """The table's name for a device."""
    return "default" if device.type != "cuda" else architecture_of(device.index or 0)


def run(kernel: Any, programs: int, arguments: Sequence[Any], tiles: Tiles | None, **constants: Any) -> None:
    """Starts a kernel.

    Raises:
        KernelError: If it does not compile, or does not fit the device.
    """
    options = {} if tiles is None else {"num_warps": tiles.warps, "num_stages": tiles.stages}
    try:
        kernel[(programs,)](*arguments, **constants, **options)
    except (OutOfResources, CompilationError, PTXASError) as error:
        first = str(error).strip().splitlines()[:1]
        reason = f"triton: {kernel.fn.__name__} does not run on this device: {type(error).__name__}: {' '.join(first)}"
        raise KernelError(f"block_sparse_attention: {reason}", (reason,)) from error


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """The device made current, or the interpreter's lock."""
    if device.type != "cuda":
        return _interpreter
    # The allocator of descriptors is a context variable, which autograd's threads do not inherit.
    triton.set_allocator(_scratch)
    return torch.cuda.device(device)


def _unit_last(x: Tensor) -> Tensor:
    return x if x.shape[3] <= 1 or x.stride(3) == 1 else x.contiguous()


def _view(x: Tensor) -> View:
    """A view; where there is one item or head, the stride means nothing and is 0."""
    batch, head = (0 if x.shape[i] == 1 else x.stride(i) for i in range(2))
    return View(x, batch, head, x.stride(2))


def _describable(x: Tensor) -> bool:
    """Whether a descriptor can hold ``[S, D]`` of a tensor: addresses in multiples of 16 bytes."""
    view = _view(x)
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
        return _unit_last(x.float() if wide else x)

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
        q_aux=None if call.aux is None else _view(call.aux[0]),
        k_aux=None if call.aux is None else _view(call.aux[1]),
        gate=None if gate is None or gate.key is None else _view(gate.key),
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
    pack = per if per * call.block_q <= tiles.rows and listed[1] < 2 and bias[1] < 2 else 1
    rows, keys = _sides(call, tiles, pack)
    gate = 0 if call.gate is None else 1 if call.gate.is_last else 2
    plain = call.key_bias is None and call.aux is None and gate == 0 and call.origins is None
    form = tiles.form if plain and of == "forward" else "plain"
    described = all(_describable(x) for x in (call.k, call.v, *(() if call.aux is None else (call.aux[1],))))
    # Specialised warps cannot zero slots of the next block, which a tile wider than its own would reach.
    whole = pack == 1 and call.block_k % keys == 0
    special = form == "specialised" and described and whole and _describable(call.q)
    hidden = call.key_bias is not None or gate > 0 or call.block_k % keys > 0
    fields: dict[str, Any] = {
        "BLOCK_Q": call.block_q, "BLOCK_K": call.block_k, "BM": rows, "BN": keys,
        "D": width, "DV": value_width, "DA": aux_width,
        "DP": padded(width), "DVP": padded(value_width), "DAP": padded(aux_width),
        "PER": per, "PACK_GQA": pack, "CAUSAL": call.rule.causal, "WINDOW": _hides(call.rule.window),
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


def _sides(call: Call, tiles: Tiles, pack: int) -> tuple[int, int]:
    """Rows and keys of a tile: powers of two from 16. A gated tile holds its whole block."""
    rows = min(tiles.rows, padded(pack * call.block_q))
    keys = min(tiles.keys, padded(call.block_k))
    if call.gate is None or call.block_k <= keys:
        return rows, keys
    whole = padded(call.block_k)
    return max(16, min(rows, tiles.rows * tiles.keys // whole)), whole


def _splits(programs: int, most: int, device: torch.device) -> int:
    """Into how many equal parts each program's list is cut, so that the device is busy: a power of two."""
    splits = 1
    while splits < min(most, MOST_SPLITS) and programs * splits < processors(device):
        splits *= 2
    return splits


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Out ``[B, H, T, Dv]`` in q's dtype and lse ``[B, H, T]``."""
    batch, heads, _, seq_q, seq_k = call.shape
    dtype = call.q.dtype
    call = prepare(call)
    out = call.q.new_empty(batch, heads, seq_q, call.v.shape[3])
    lse = call.q.new_empty(batch, heads, seq_q, dtype=call.acc_dtype)
    if 0 in (batch, seq_q, seq_k):
        return out.zero_().to(dtype), lse.fill_(-torch.inf)
    with _on(call.q.device):
        work = job(call, "decode", None)
        splits = _splits(work.row_tiles, -(-call.grid[1] // 2), call.q.device)
        if splits == 1 and call.grid[0] > 1 and work.shape.PACK_GQA * call.block_q > FEW_ROWS:
            work = job(call, "forward", lists_of(call).queries)
        c = work.shape
        total = batch * heads * seq_q
        parts = out
        lses = lse
        if splits > 1:
            parts = call.q.new_empty(splits, *out.shape, dtype=call.acc_dtype)
            lses = lse.new_empty(splits, *lse.shape)
        views = (_view(call.q), _view(call.k), _view(call.v))
        arguments = (*views, parts, lses, work.lists, work.switches, call.scale * LOG2E, *work.sizes, splits,
                     total, c)  # fmt: skip
        run(forward_kernel, work.row_tiles * splits, arguments, work.tiles)
        if splits > 1:
            width = call.v.shape[3]
            run(join_kernel, total, (parts, lses, out, lse, total, splits), None,
                SPLITS=padded(splits), DV=width, DVP=padded(width))  # fmt: skip
    return out.to(dtype), lse


def backward(
    call: Call, results: tuple[Tensor, Tensor], dout: Tensor | None, dlse: Tensor | None, need: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, key_bias, q_aux, k_aux and the gate's keys, each ``None`` where ``need`` says so."""
    given = call
    out, lse = results
    call = prepare(call)
    batch, _, _, seq_q, seq_k = call.shape
    if dout is None:
        dout = out.new_zeros(()).expand(out.shape)
    likes = _gradient_like(given)
    if 0 in (batch, seq_q, seq_k):
        return tuple(
            torch.zeros_like(x) if needed and x is not None else None for x, needed in zip(likes, need, strict=True)
        )
    need = [needed and like is not None for needed, like in zip(need, likes, strict=True)]
    dout = _unit_last(dout.to(call.q.dtype))
    out = out.to(call.q.dtype).contiguous()
    dlse = None if dlse is None else dlse.to(lse.dtype).contiguous()
    with _on(call.q.device):
        lists = lists_of(call)
        delta = torch.empty_like(lse)
        queries = query_gradients(job(call, "query", lists.queries), (out, dout, lse, dlse, delta), need)
        keys = key_gradients(job(call, "key", lists.keys), (dout, lse, delta), need)
    dq, dq_aux = queries
    dk, dv, dbias, dk_aux, dgate = keys
    found = (dq, dk, dv, dbias, dq_aux, dk_aux, dgate)
    return tuple(None if x is None or like is None else _reduced(x, like) for x, like in zip(found, likes, strict=True))


def _gradient_like(call: Call) -> tuple[Tensor | None, ...]:
    q_aux, k_aux = call.aux or (None, None)
    return call.q, call.k, call.v, call.key_bias, q_aux, k_aux, None if call.gate is None else call.gate.key


def query_gradients(work: Job, given: tuple[Any, ...], need: Sequence[bool]) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of q and q_aux; ``given`` are out, dout, lse, dlse and delta, which is written."""
    call = work.call
    out, dout, lse, dlse, delta = given
    dq = call.q.new_empty(call.q.shape) if need[0] else None
    dq_aux = call.aux[0].new_empty(call.aux[0].shape) if need[4] and call.aux is not None else None
    views = (_view(call.q), _view(call.k), _view(call.v))
    arguments = (*views, out, _view(dout), lse, dlse, delta, dq, dq_aux, work.lists, work.switches, call.scale,
                 call.scale * LOG2E, *work.sizes, work.shape)  # fmt: skip
    run(query_kernel, work.row_tiles, arguments, work.tiles)
    return dq, dq_aux


def key_gradients(work: Job, given: tuple[Tensor, ...], need: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Gradients ``[B, G|H, .., D]`` of keys and what belongs to them, in the accumulator's dtype."""
    call = work.call
    c = work.shape
    dout, lse, delta = given
    batch, heads, groups, _, seq_k = call.shape
    splits = _splits(work.key_tiles, 8, call.q.device)

    def made(needed: bool, *shape: int) -> Tensor | None:
        return call.q.new_empty(splits, batch, *shape, dtype=call.acc_dtype) if needed else None

    dk = made(need[1], groups, seq_k, call.q.shape[3])
    dv = made(need[2], groups, seq_k, call.v.shape[3])
    dbias = made(need[3], heads if c.BIAS_HEADS == 2 else groups, seq_k)
    dk_aux = made(need[5], groups, seq_k, c.DA)
    dgate = made(need[6], groups, call.grid[1], call.q.shape[3])
    views = (_view(call.q), _view(call.k), _view(call.v), _view(dout))
    results = (dk, dv, dbias, dk_aux, dgate)
    if any(x is not None for x in results):
        arguments = (*views, lse, delta, *results, work.lists, work.switches, call.scale, call.scale * LOG2E,
                     *work.sizes, splits, batch * groups * seq_k, c)  # fmt: skip
        run(key_kernel, work.key_tiles * splits, arguments, work.tiles)
    return tuple(None if x is None else x.sum(0) if splits > 1 else x[0] for x in results)


def _reduced(x: Tensor, like: Tensor) -> Tensor:
    """A gradient summed where the input was one for all, in the input's dtype."""
    if x.shape != like.shape:
        x = x.sum_to_size(like.shape)
    return x.to(like.dtype)
