"""Calls of few rows on CPUs: a decoding step, a few tokens after a long past, and small calls altogether.

A schedule in blocks costs more there than the arithmetic. What rows see of a static layout is found once as runs of
slots, which are read where they lie, or as an index; torch's fused kernel does the rest.

Letters: B batch, H query heads, G KV heads, T rows, S slots, N key blocks, n slots that are read; b and h are 1 where
items or heads agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo_kernels.cpu.path import FromResultsPath
from attnzoo_kernels.cpu.slots import Slots, attend_slots_with_lse, seen_by_last, slots_of
from attnzoo_kernels.layouts.entries import list_entries
from attnzoo_kernels.layouts.memo import remembered
from attnzoo_kernels.runtime.processor import multiplies_bf16
from attnzoo_kernels.spec.call import Call

_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

MOST_ROWS = 64
"""Rows of a call, however few its slots are."""
FEW = 16
"""Rows up to which a call may have any number of slots."""
MOST_PAIRS = 1 << 16
"""Rows times slots of a call of more rows."""
MOST_MASK = 1 << 20
"""Numbers in a mask, which is kept between calls."""
LEAST_SCALE = 1e-30
MOST_WASTE = 4
"""Pairs that may be computed for each one that is seen, ..."""
SMALL = 1 << 13
"""... unless there are at most so many pairs for each head."""


@dataclass(frozen=True, eq=False)
class Reading:
    """What the rows of a call read together.

    Attributes:
        first: The first slot of the run that holds it.
        last: The slot behind the last.
        index: The slots, int64 ``[n]``, where there are many gaps in the run; else ``None``, and all are read.
        mask: 0 where a row sees a slot, else -inf, ``[b, h, T, n]``; ``None`` where rows see everything or ``causal``.
        causal: Whether row i sees the first i + 1 slots.
        dead: Rows that see nothing, bool ``[b, h, T]``; ``None`` where every row sees something.
    """

    first: int
    last: int
    index: Tensor | None
    mask: Tensor | None
    causal: bool
    dead: Tensor | None

    @property
    def hides(self) -> bool:
        """Whether a row computes something that it does not see."""
        return self.causal or self.mask is not None

    def of(self, x: Tensor) -> Tensor:
        """What is read of ``x [B, h, S, D]``; a view unless there is an index."""
        if self.index is not None:
            return x.index_select(2, self.index)
        return x if self.last - self.first == x.shape[2] else x[:, :, self.first : self.last]

    def spread(self, grad: Tensor, like: Tensor) -> Tensor:
        """The gradient ``[B, G, n, D]`` of what is read as one of ``like [B, G, S, D]``."""
        if grad.shape == like.shape and self.index is None:
            return grad.contiguous()
        whole = torch.zeros_like(like, memory_format=torch.contiguous_format)
        if self.index is not None:
            whole.index_copy_(2, self.index, grad)
        else:
            whole[:, :, self.first : self.last] = grad
        return whole


class FewRowsPath(FromResultsPath):
    """Calls of few rows, forward and backward."""

    name = "few_rows"

    def reasons(self, call: Call, *, need_lse: bool = False) -> tuple[str, ...]:
        """As :func:`reasons`."""
        return reasons(call, need_lse=need_lse)

    def forward(self, call: Call, *, need_lse: bool) -> tuple[Tensor, Tensor] | None:
        """As :func:`forward`."""
        return forward(call, need_lse=need_lse)

    def declines(self, call: Call) -> bool:
        """Whether a head reads nothing, or rows see too little of what they would read together."""
        return (slots_of_row(call) if call.q.shape[2] == 1 else reading_of(call)) is None

    def keeps_results(self, call: Call) -> bool:
        """Whether the backward is computed here."""
        return not backward_reasons(call)

    def backward_reasons(self, call: Call, *, dlse: bool = False) -> tuple[str, ...]:
        """As :func:`backward_reasons`."""
        return backward_reasons(call, dlse=dlse)

    def gradients(
        self, call: Call, results: tuple[Tensor, Tensor], dout: Tensor
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """As :func:`backward`."""
        return backward(call, results, dout)


def reasons(call: Call, *, need_lse: bool = False) -> tuple[str, ...]:
    """Why a call is not computed here; reads metadata alone."""
    q = call.q
    batch, heads, rows, width = q.shape
    slots = call.k.shape[2]
    if not isinstance(rows, int) or not isinstance(slots, int):
        return ("few_rows: a length is a symbol, as while a program is traced",)
    if rows > MOST_ROWS:
        return (f"few_rows: there are {rows} queries; it takes up to {MOST_ROWS}",)
    found = []
    if rows > FEW and rows * slots > MOST_PAIRS:
        found.append(f"few_rows: {rows} queries have {slots} keys; more than {FEW} take {MOST_PAIRS} pairs at most")
    if q.device.type != "cpu":
        found.append(f"few_rows: q is on {q.device}; it runs on CPUs alone")
    if q.dtype == torch.bfloat16:
        if not multiplies_bf16():
            found.append("few_rows: the inputs are bf16 and the CPU has no instructions for products of them")
        if need_lse:
            found.append("few_rows: the log-sum-exp of bf16 inputs is wanted, and the kernel's is good for five digits")
    elif q.dtype != torch.float32:
        found.append(f"few_rows: the inputs are {q.dtype}; it takes torch.float32 and torch.bfloat16")
    if 0 in (batch, heads, rows, slots):
        found.append("few_rows: there are no queries or keys")
    if rows > 1 and width != call.v.shape[3]:
        found.append(
            f"few_rows: keys and values have widths {width} and {call.v.shape[3]}; more rows than one take equal ones"
        )
    # Causally, the kernel hides before it scales: -inf times 0 or less is no longer -inf.
    if not call.scale >= LEAST_SCALE:
        found.append(
            f"few_rows: the scale is {call.scale}; the kernel hides scores before it scales them, by more than 0"
        )
    return (*found, *_rule_reasons(call)) if found or not (call.is_plain and call.rule.is_static) else ()


def _rule_reasons(call: Call) -> list[str]:
    found = []
    if not call.rule.is_static:
        found.append("few_rows: positions, windows or sinks are tensors, so that what rows see is another at each call")
    if call.gate is not None or call.origins is not None:
        found.append("few_rows: the call has gates or origins, which make keys or weights of their own")
    if call.key_bias is not None:
        found.append("few_rows: the call has a bias, which may hide whole rows at each call anew")
    if call.aux is not None and call.q.shape[2] > 1:
        found.append("few_rows: the call has auxiliary channels and more rows than one")
    return found


def backward_reasons(call: Call, *, dlse: bool = False) -> tuple[str, ...]:
    """Why a backward is not computed here; reads metadata alone."""
    found = list(reasons(call))
    if dlse:
        found.append("few_rows: the log-sum-exp has a gradient, which the kernel does not know")
    if call.q.dtype != torch.float32:
        found.append(
            f"few_rows: the inputs are {call.q.dtype}; the kernel's backward is quicker in torch.float32 alone"
        )
    if call.aux is not None:
        found.append("few_rows: the call has auxiliary channels, whose gradients the kernel does not know")
    if call.q.shape[3] != call.v.shape[3]:
        found.append("few_rows: keys and values have two widths, and the kernel's backward takes equal ones")
    return tuple(found)


def forward(call: Call, *, need_lse: bool) -> tuple[Tensor, Tensor] | None:
    """Out ``[B, H, T, Dv]`` and lse ``[B, H, T]`` (empty where not needed), or ``None`` where the next path has to.

    It has to where out is not finite: what nobody may see may have spoiled it.
    """
    if call.q.shape[2] == 1:
        return _one_row(call, need_lse=need_lse)
    reading = reading_of(call)
    if reading is None:
        return None
    q, k, v = (_unit_stride(x) for x in (call.q, reading.of(call.k), reading.of(call.v)))
    out, lse = _fused(q, k, v, 0.0, reading.causal, attn_mask=reading.mask, scale=call.scale)
    if reading.dead is not None:
        out = out.masked_fill(reading.dead.unsqueeze(-1), 0.0)
        lse = lse.masked_fill(reading.dead, -torch.inf)
    if reading.hides and not _is_finite(out):
        return None
    return out.contiguous(), lse.contiguous() if need_lse else lse.new_empty(0)


def _one_row(call: Call, *, need_lse: bool) -> tuple[Tensor, Tensor] | None:
    """A decoding step; nothing hidden is touched."""
    found = slots_of_row(call)
    if found is None:
        return None
    if len(found) == 1:
        out, lse = attend_slots_with_lse(
            call.q, call.k, call.v, found[0], scale=call.scale, aux=call.aux, need_lse=need_lse
        )
    else:
        items = [_one_item(call, item, slots, need_lse=need_lse) for item, slots in enumerate(found)]
        out, lse = (torch.cat(parts) for parts in zip(*items, strict=True))
    if call.q.dtype == torch.bfloat16 and not _is_finite(out):
        # Products in bf16 may read beyond the end of their rows, times 0.
        return None
    return out.contiguous(), lse.contiguous()


def _one_item(call: Call, item: int, slots: Slots, *, need_lse: bool) -> tuple[Tensor, Tensor]:
    """A batch item that reads slots of its own."""
    own = slice(item, item + 1)
    q, k, v = (x[own] for x in (call.q, call.k, call.v))
    aux = call.aux
    if aux is not None:
        aux = (aux[0][own], aux[1][own] if aux[1].shape[0] > 1 else aux[1])
    return attend_slots_with_lse(q, k, v, slots, scale=call.scale, aux=aux, need_lse=need_lse)


def backward(call: Call, results: tuple[Tensor, Tensor], dout: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Gradients of q, k and v from those of out, or ``None`` as in :func:`forward`.

    Args:
        call: The call.
        results: Out and lse of the forward, by whatever implementation.
        dout: ``[B, H, T, D]``.
    """
    reading = reading_of(call)
    if reading is None:
        return None
    out, lse = results
    if reading.dead is not None:
        # Their weights become exp(-inf), which zeroes all that is finite.
        lse = lse.masked_fill(reading.dead, torch.inf)
    q, k, v, dout = (_unit_stride(x) for x in (call.q, reading.of(call.k), reading.of(call.v), dout))
    dq, dk, dv = _fused_backward(
        dout, q, k, v, out, lse, 0.0, reading.causal, attn_mask=reading.mask, scale=call.scale
    )  # fmt: skip
    # What spoils anything spoils rows that compute it.
    if reading.hides and not _is_finite(dq):
        return None
    return dq.contiguous(), reading.spread(dk, call.k), reading.spread(dv, call.v)


def _unit_stride(x: Tensor) -> Tensor:
    """A tensor as the kernel takes it."""
    return x if x.stride(3) == 1 and x.stride(2) >= x.shape[3] else x.contiguous()


def _is_finite(x: Tensor) -> bool:
    """Whether all is finite; a sum that overflows counts as not."""
    return math.isfinite(x.sum().item())


def slots_of_row(call: Call) -> tuple[Slots, ...] | None:
    """What the single row reads, for all items of the batch or for each; ``None`` where a head reads nothing."""
    return remembered(call, _find_slots)


def _find_slots(call: Call) -> tuple[Slots, ...] | None:
    rule = call.rule
    window = rule.window if isinstance(rule.window, int) else None
    sink = rule.sink if isinstance(rule.sink, int) else 0
    return slots_of(call, seen_by_last(call.k.shape[2], window=window, sink=sink))


def reading_of(call: Call) -> Reading | None:
    """What the rows read together; ``None`` where they would see too little of it."""
    return remembered(call, _find_reading)


def _find_reading(call: Call) -> Reading | None:
    _, heads, _, rows, length = call.shape
    keep = _listed_blocks(call)
    if keep is None:
        return None
    rule = call.rule
    # Slots that some row of some head may see: those of a listed block, from the first row's first to the last.
    slots = torch.arange(length, device=call.col.device)
    pos = rule.positions(rows, length, call.col.device)
    window = rule.window if isinstance(rule.window, int) else None
    lo, hi = (x.unsqueeze(-1) for x in rule.span(pos, window, length))
    sink = rule.sink_end(pos, rule.sink, length).unsqueeze(-1) if window is not None else torch.zeros_like(lo)
    block = slots // call.block_k
    listed = keep.any(2).flatten(0, 1).any(0)
    slots = slots[listed[block] & (((slots >= lo.min()) & (slots < hi.max())) | (slots < sink.max()))]
    if slots.shape[0] * rows * keep.shape[0] * keep.shape[1] > MOST_MASK:
        return None
    # Which of them each row sees: by the rule, and by its own query block's list.
    seen = ((slots >= lo) & (slots < hi)) | (slots < sink)
    own = keep.index_select(3, slots // call.block_k)
    own = own.index_select(2, torch.arange(rows, device=slots.device) // call.block_q)
    seen = seen & own
    each = seen.shape[0] * seen.shape[1]
    if seen[0, 0].numel() > max(MOST_WASTE * int(seen.sum()) // each, SMALL):
        return None
    used = seen.flatten(0, 2).any(0)
    return _reading(slots[used], seen[..., used], heads)


def _listed_blocks(call: Call) -> Tensor | None:
    """The blocks that each query block lists, bool ``[b, h, M, N]``; ``None`` where that would be large."""
    entries, _ = list_entries(call)
    shape = (*entries.shape, call.grid[1])
    if math.prod(shape) > MOST_MASK:
        return None
    keep = torch.zeros(math.prod(shape), dtype=torch.bool, device=call.col.device)
    keep[entries.row * shape[3] + entries.col] = True
    return keep.view(shape)


def _reading(slots: Tensor, seen: Tensor, heads: int) -> Reading | None:
    """Slots ascending, each of which some row sees, and which rows those are, bool ``[b, h, T, n]``."""
    count = slots.shape[0]
    if count == 0:
        return None
    first = int(slots[0])
    last = int(slots[-1]) + 1
    if last - first > 2 * count:
        index = slots
    else:
        # One run, with the gaps in it hidden.
        index = None
        whole = torch.zeros(*seen.shape[:3], last - first, dtype=torch.bool, device=seen.device)
        whole[..., slots - first] = seen
        seen = whole
    if seen.shape[1] > 1:
        seen = seen.repeat_interleave(heads // seen.shape[1], 1)
    dead = ~seen.any(-1)
    rows = seen.shape[2]
    below = torch.ones(rows, rows, dtype=torch.bool, device=seen.device).tril()
    causal = index is None and rows > 1 and seen.shape == (1, 1, rows, rows) and torch.equal(seen[0, 0], below)
    mask = None
    if not causal and not bool(seen.all()):
        mask = torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, -torch.inf)
    return Reading(first, last, index, mask, causal, dead if bool(dead.any()) else None)
