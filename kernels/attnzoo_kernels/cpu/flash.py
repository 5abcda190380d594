"""Long rows that read one run of slots each, or one beside a sink, on CPUs, by torch's own fused kernel.

Its tiles stay in the cache; whole rows of thousands of scores do not. In half precision it is quicker only with
instructions that products of fp32 do not have.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo_kernels.cpu.path import FromResultsPath
from attnzoo_kernels.cpu.row_tiles import HeadGroup, KeyRange, RowTile, RowTiles, row_tiles_of
from attnzoo_kernels.layouts.row_spans import lists_runs
from attnzoo_kernels.runtime.plain import is_plain
from attnzoo_kernels.runtime.processor import cpu_class
from attnzoo_kernels.runtime.store import remembers
from attnzoo_kernels.runtime.workspace import scratch
from attnzoo_kernels.spec.call import Call

LEAST_ROWS = 512
"""Rows from which a call is handed over."""
LEAST_SLOTS = 192
"""Slots that a row sees on average, from which more than one row tile is worth its calls."""
LEAST_SCALE = 1e-30
MOST_WASTE = {torch.float32: 1.4, torch.bfloat16: 2.0}
"""Scores that may be computed for each one that is seen."""


class FlashPath(FromResultsPath):
    """Long rows that read one run of slots each, or one beside a sink, forward and backward."""

    name = "flash"

    def reasons(self, call: Call, *, need_lse: bool = False) -> tuple[str, ...]:
        """As :func:`reasons`."""
        return reasons(call, need_lse=need_lse)

    def forward(self, call: Call, *, need_lse: bool) -> tuple[Tensor, Tensor] | None:
        """As :func:`forward`."""
        return forward(call)

    def declines(self, call: Call) -> bool:
        """Whether :func:`plan` finds lists with gaps, or too much that would be computed and not seen."""
        return plan(call) is None

    def keeps_results(self, call: Call) -> bool:
        """As :func:`keeps`."""
        return keeps(call)

    def backward_reasons(self, call: Call, *, dlse: bool = False) -> tuple[str, ...]:
        """As :func:`backward_reasons`."""
        return backward_reasons(call, dlse=dlse)

    def gradients(
        self, call: Call, results: tuple[Tensor, Tensor], dout: Tensor
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """As :func:`backward`."""
        return backward(call, results, dout)


def reasons(call: Call, *, need_lse: bool = False) -> tuple[str, ...]:
    """Why a call is not of the kind that :func:`plan` takes; reads metadata alone."""
    q = call.q
    k = call.k
    v = call.v
    if not isinstance(q.shape[2], int) or not isinstance(k.shape[2], int):
        return ("flash: a length is a symbol, as while a program is traced",)
    found = []
    if q.device.type != "cpu":
        found.append(f"flash: q is on {q.device}; it runs on CPUs alone")
    if q.dtype == torch.bfloat16:
        if cpu_class() != "amx":
            found.append("flash: the inputs are bf16 and the CPU has no AMX, without which blocks are quicker")
        if need_lse:
            found.append("flash: the log-sum-exp of bf16 inputs is wanted, and the kernel's is good for five digits")
    elif q.dtype != torch.float32:
        found.append(f"flash: the inputs are {q.dtype}; it takes torch.float32 and torch.bfloat16")
    if 0 in (q.numel(), k.numel(), v.numel()):
        found.append("flash: there are no queries, keys or values")
    if q.shape[3] != v.shape[3]:
        found.append(f"flash: keys and values have widths {q.shape[3]} and {v.shape[3]}; it takes equal ones")
    if q.shape[2] < LEAST_ROWS:
        found.append(f"flash: there are {q.shape[2]} queries; it pays from {LEAST_ROWS}")
    return (*found, *_rule_reasons(call))


def _rule_reasons(call: Call) -> list[str]:
    found = []
    if not call.is_plain:
        found.append("flash: the call has a bias, auxiliary channels, gates or origins, which the kernel does not know")
    rule = call.rule
    sink = type(rule.sink) is not int or rule.sink > 0
    if rule.window is not None and sink and not rule.is_static:
        found.append("flash: there is a sink beside a window, and heads or rows differ in them; it reads them apart")
    # The kernel hides what is not causal before it scales: -inf times 0 or less is no longer -inf.
    if not call.scale >= LEAST_SCALE:
        found.append(f"flash: the scale is {call.scale}; the kernel hides scores before it scales them, by more than 0")
    return found


def backward_reasons(call: Call, *, dlse: bool = False) -> tuple[str, ...]:
    """Why a backward is not computed here, where it would not be quicker or is not known; reads metadata alone."""
    found = list(reasons(call))
    if dlse:
        found.append("flash: the log-sum-exp has a gradient, which the kernel does not know")
    if call.q.dtype != torch.float32:
        found.append(f"flash: the inputs are {call.q.dtype}; the kernel's backward is quicker in torch.float32 alone")
    heads = call.k.shape[0] * call.k.shape[1]
    if heads < torch.get_num_threads():
        found.append(
            f"flash: there are {heads} KV heads in all; the backward divides its work by them over the threads"
        )
    return tuple(found)


def plan(call: Call) -> RowTiles | None:
    """The row tiles of a call without :func:`reasons`, or ``None`` where blocks are quicker or needed."""
    tiles = row_tiles_of(call, torch.get_num_threads())
    if tiles is None:
        return None
    cheap = tiles.computed(*call.q.shape[:2]) <= MOST_WASTE[call.q.dtype] * tiles.visible
    pays = all(len(group.tiles) == 1 for group in tiles.head_groups) or tiles.visible >= LEAST_SLOTS
    return tiles if cheap and pays else None


def keeps(call: Call) -> bool:
    """Whether the backward may want out and log-sum-exp; while tracing, of dense calls alone."""
    if backward_reasons(call):
        return False
    if is_plain(call.col):
        # What follows from positions is not remembered, and costs more than to keep what may not be needed.
        return plan(call) is not None if call.rule.is_static else lists_runs(call)
    return call.col.shape[0] == call.grid[1] and call.rule.is_static and call.rule.window is None


def forward(call: Call) -> tuple[Tensor, Tensor] | None:
    """Out ``[B, H, T, D]`` and lse ``[B, H, T]``, or ``None`` where blocks have to compute the call.

    They have to where out is not finite: what nobody may see may have spoiled it.
    """
    tiles = plan(call)
    if tiles is None:
        return None
    q, k, v = (_contiguous(x, tiles) for x in (call.q, call.k, call.v))
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    for group in tiles.head_groups:
        own_q, own_out, own_lse = (group.of_rows(x) for x in (q, out, lse))
        own_k = group.of_slots(k)
        own_v = group.of_slots(v)
        edges = _Edges(group, tiles, q.dtype)
        for tile in group.tiles:
            rows = own_q[:, :, tile.rows]
            found = None
            for keys in tile.ranges:
                one = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    rows, own_k[:, :, keys.slots], own_v[:, :, keys.slots], 0.0, keys.causal,
                    attn_mask=edges.mask(tile, keys), scale=call.scale,
                )  # fmt: skip
                # Online softmax over key ranges: two results are joined by their log-sum-exps.
                found = one if found is None else _merged(found, one)
            own_out[:, :, tile.rows] = 0.0 if found is None else found[0]
            own_lse[:, :, tile.rows] = 0.0 if found is None else found[1]
    if _is_spoiled(out, tiles):
        return None
    if tiles.dead is not None:
        out.masked_fill_(tiles.dead.unsqueeze(-1), 0.0)
        lse.masked_fill_(tiles.dead, -torch.inf)
    return out, lse


def backward(call: Call, results: tuple[Tensor, Tensor], dout: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Gradients of q, k and v from those of out, or ``None`` as in :func:`forward`.

    Args:
        call: The call.
        results: Out and lse of the forward, by whatever implementation.
        dout: ``[B, H, T, D]``.
    """
    tiles = plan(call)
    if tiles is None:
        return None
    q, k, v, dout = (_contiguous(x, tiles) for x in (call.q, call.k, call.v, dout))
    out, lse = results
    if tiles.dead is not None:
        # Their weights become exp(-inf), which zeroes all that is finite.
        lse = lse.masked_fill(tiles.dead, torch.inf)
        if not bool((q.sum() + dout.sum()).isfinite()):
            q, dout = (x.masked_fill(tiles.dead.unsqueeze(-1), 0.0) for x in (q, dout))
    lone = tiles.lone_range
    if lone is not None and lone.last - lone.first == k.shape[2]:
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, lone.causal, scale=call.scale
        )
        return None if _is_spoiled(dq, tiles) else (dq.contiguous(), dk.contiguous(), dv.contiguous())
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for group in tiles.head_groups:
        by_row = [group.of_rows(x) for x in (dout, q, out, lse, dq)]
        by_slot = [group.of_slots(x) for x in (k, v, dk, dv)]
        edges = _Edges(group, tiles, q.dtype)
        for tile in group.tiles:
            of_dout, rows, *found, total = (x[:, :, tile.rows] for x in by_row)
            for keys in tile.ranges:
                *of_range, total_k, total_v = (x[:, :, keys.slots] for x in by_slot)
                grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    of_dout, rows, *of_range, *found, 0.0, keys.causal,
                    attn_mask=edges.mask(tile, keys), scale=call.scale,
                )  # fmt: skip
                for x, grad in zip((total, total_k, total_v), grads, strict=True):
                    x.add_(grad)
    return None if _is_spoiled(dq, tiles) else (dq, dk, dv)


def _is_spoiled(by_row: Tensor, tiles: RowTiles) -> bool:
    """Whether something hidden may have spoiled a result: that which spoils anything spoils rows that compute it."""
    return tiles.hides and not bool(by_row.sum().isfinite())


class _Edges:
    """Masks for what the rows of a group do not see of their key ranges."""

    def __init__(self, group: HeadGroup, tiles: RowTiles, dtype: torch.dtype) -> None:
        self.lo = group.of_rows(tiles.spans.lo)
        self.hi = group.of_rows(tiles.spans.hi)
        self.dtype = dtype

    def mask(self, tile: RowTile, keys: KeyRange) -> Tensor | None:
        """What is added to scores, ``[i, g, R, s]`` in scratch memory, or ``None``."""
        width = keys.last - keys.first
        found = None
        if keys.early:
            found = _edge(self.hi[..., tile.rows] - keys.first, width, self.dtype, hides_after=True)
        if keys.late:
            other = _edge(self.lo[..., tile.rows] - keys.first, width, self.dtype, hides_after=False)
            found = other if found is None else torch.minimum(found, other, out=found)
        return found


def _edge(index: Tensor, width: int, dtype: torch.dtype, *, hides_after: bool) -> Tensor:
    """Rows of ``width`` values that change from 0 to -inf at ``index [i, g, R]``, or from -inf to 0."""
    size = 1 << (width - 1).bit_length()
    out = scratch(f"edge {hides_after}", (index.numel(), width), dtype, index.device)
    # Row i is what a window that begins i values further on shows of a single step.
    windows = _step(size, dtype, hides_after=hides_after).as_strided((size + 1, width), (1, 1))
    shape = (*index.shape, width)
    torch.index_select(windows, 0, index.neg_().add_(size).clamp_(size - width, size).view(-1), out=out)
    return out.view(shape)


@remembers(32)
def _step(size: int, dtype: torch.dtype, *, hides_after: bool) -> Tensor:
    with torch.inference_mode(False):
        shown, hidden = (torch.full((size,), value, dtype=dtype, device="cpu") for value in (0.0, -torch.inf))
        return torch.cat([shown, hidden] if hides_after else [hidden, shown])


def _merged(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Out and lse over two key ranges; no row is without a slot in one of them."""
    share = (other[1] - one[1]).sigmoid_().unsqueeze(-1)
    out = torch.lerp(one[0].to(share.dtype), other[0].to(share.dtype), share)
    return out, torch.logaddexp(one[1], other[1])


def _contiguous(x: Tensor, tiles: RowTiles) -> Tensor:
    """A tensor as the kernel takes it; what is read tile by tile lies in one piece."""
    once = tiles.lone_range is not None
    return x if once and x.stride(-1) == 1 and x.stride(-2) >= x.shape[-1] else x.contiguous()
