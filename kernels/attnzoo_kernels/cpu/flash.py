"""Long rows that read one run of slots each, on CPUs, by torch's own fused kernel.

Its tiles stay in the cache; whole rows of thousands of scores do not. In half precision it is quicker only with
instructions that products of fp32 do not have.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo_kernels.cpu.row_tiles import HeadGroup, KeyRange, RowTile, RowTiles, lists_runs, row_tiles_of
from attnzoo_kernels.runtime.plain import is_plain
from attnzoo_kernels.runtime.processor import cpu_class
from attnzoo_kernels.runtime.store import remembers
from attnzoo_kernels.runtime.workspace import scratch
from attnzoo_kernels.spec.call import Call

LEAST_ROWS = 512
"""Rows from which a call is handed over."""
LEAST_SLOTS = 256
"""Slots that a row sees on average, from which more than one row tile is worth its calls."""
LEAST_SCALE = 1e-30
MOST_WASTE = {torch.float32: 1.4, torch.bfloat16: 2.0}
"""Scores that may be computed for each one that is seen."""


def may_take(call: Call) -> bool:
    """Whether a call may be of the kind that :func:`plan` takes; reads metadata alone."""
    q, k, v, rule = call.q, call.k, call.v, call.rule
    seq_q, seq_k = q.shape[2], k.shape[2]
    if not isinstance(seq_q, int) or not isinstance(seq_k, int) or q.device.type != "cpu":
        return False
    quick = q.dtype == torch.float32 or (q.dtype == torch.bfloat16 and cpu_class() == "amx")
    fits = 0 not in (q.numel(), k.numel(), v.numel()) and q.shape[3] == v.shape[3]
    # A sink beside a window is a second run.
    single = rule.window is None or (type(rule.sink) is int and rule.sink == 0)
    # The kernel hides what is not causal before it scales: -inf times 0 or less is no longer -inf.
    rises = call.scale >= LEAST_SCALE
    return rises and call.is_plain and quick and fits and seq_q >= LEAST_ROWS and single


def plan(call: Call) -> RowTiles | None:
    """The row tiles in which a call is computed here, or ``None`` where blocks are quicker or needed."""
    tiles = row_tiles_of(call, torch.get_num_threads()) if may_take(call) else None
    if tiles is None:
        return None
    cheap = tiles.computed(*call.q.shape[:2]) <= MOST_WASTE[call.q.dtype] * tiles.visible
    pays = all(len(group.tiles) == 1 for group in tiles.head_groups) or tiles.visible >= LEAST_SLOTS
    return tiles if cheap and pays else None


def keeps(call: Call) -> bool:
    """Whether the backward may want out and log-sum-exp; while tracing, of dense calls alone."""
    if not may_take(call) or not _is_quick_backward(call):
        return False
    if is_plain(call.col):
        # What follows from positions is not remembered, and costs more than to keep what may not be needed.
        return plan(call) is not None if call.rule.is_static else lists_runs(call)
    return call.col.shape[0] == call.grid[1] and call.rule.is_static and call.rule.window is None


def _is_quick_backward(call: Call) -> bool:
    """Whether the kernel's backward is quicker: in half precision it is not, and it divides its work by heads."""
    return call.q.dtype == torch.float32 and call.k.shape[0] * call.k.shape[1] >= torch.get_num_threads()


def forward(call: Call, *, need_lse: bool) -> tuple[Tensor, Tensor] | None:
    """Out ``[B, H, T, D]`` and lse ``[B, H, T]``, or ``None`` where blocks have to compute the call.

    They have to where out is not finite: what nobody may see may have spoiled it. And where lse is wanted in half
    precision, in which the kernel's exponential is good for five digits.
    """
    tiles = plan(call)
    if tiles is None or (need_lse and call.q.dtype != torch.float32):
        return None
    q, k, v = (_contiguous(x, tiles) for x in (call.q, call.k, call.v))
    out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:3], dtype=torch.float32)
    for group in tiles.head_groups:
        own_q, own_out, own_lse = (group.of_rows(x) for x in (q, out, lse))
        own_k, own_v, edges = group.of_slots(k), group.of_slots(v), _Edges(group, tiles, q.dtype)
        for tile in group.tiles:
            rows, found = own_q[:, :, tile.rows], None
            for keys in tile.ranges:
                one = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    rows, own_k[:, :, keys.slots], own_v[:, :, keys.slots], 0.0, keys.causal,
                    attn_mask=edges.mask(tile, keys), scale=call.scale,
                )  # fmt: skip
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
    tiles = plan(call) if _is_quick_backward(call) else None
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
        by_slot, edges = [group.of_slots(x) for x in (k, v, dk, dv)], _Edges(group, tiles, q.dtype)
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
        self.lo, self.hi, self.dtype = group.of_rows(tiles.lo), group.of_rows(tiles.hi), dtype

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
