"""What rows see where that is one run of slots each, or a run and the sink before it.

Letters: B batch, H heads, T rows, S slots, M query blocks; b and h are 1 where batch or heads agree.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnzoo_kernels.layouts.entries import list_entries
from attnzoo_kernels.layouts.memo import remembered
from attnzoo_kernels.spec.call import Call
from attnzoo_kernels.spec.token_rule import TokenRule


@dataclass(frozen=True)
class RowSpans:
    """The run of slots that each row sees, and which rows see the sink's besides.

    Attributes:
        lo: The first slot of the run, int64 ``[b, h, T]``.
        hi: The slot behind the last; as ``lo`` or less where there is none.
        sink: Slots before which rows that are ``apart`` see all; their runs begin behind it.
        apart: Which rows these are, bool as ``lo``, or ``None`` where there is none.
    """

    lo: Tensor
    hi: Tensor
    sink: int = 0
    apart: Tensor | None = None


@dataclass(frozen=True)
class _BlockRuns:
    """The run of blocks that each query block lists, int64 ``[b, h, M]`` each; ``last`` is behind it.

    ``before`` counts the sink's blocks that are listed besides, from the first on, where the run begins behind them.
    """

    first: Tensor
    last: Tensor
    before: Tensor


def lists_runs(call: Call) -> bool:
    """Whether the blocks of every list follow one another, but for those of a sink before them."""
    return _block_runs(call) is not None


def lists_all(call: Call) -> bool:
    """Whether every list holds every block."""
    runs = _block_runs(call)
    return runs is not None and bool((runs.last - runs.first == call.grid[1]).all())


def row_spans(call: Call) -> RowSpans | None:
    """What the rows of a call see, or ``None`` where that is something else."""
    runs = _block_runs(call)
    if runs is None:
        return None
    rule = call.rule
    _, _, _, seq_q, seq_k = call.shape
    pos = rule.positions(seq_q, seq_k, call.col.device)
    window = rule.window.long().view(1, -1, 1) if isinstance(rule.window, Tensor) else rule.window
    lo, hi = rule.span(pos, window, seq_k)
    sink = _sink_of(rule)
    end = rule.sink_end(pos, sink, seq_k)
    if not lists_all(call):
        first, last, before = (_by_row(x, call) for x in (runs.first, runs.last, runs.before))
        # A window that reaches into a sink's last block from behind a gap would be a third piece.
        if bool(((before > 0) & ((lo < before) | (before < end))).any()):
            return None
        end = torch.where(before > 0, end, torch.where(first > 0, 0, torch.minimum(end, last)))
        lo = torch.maximum(lo, first)
        hi = torch.minimum(hi, last)
    if sink == 0:
        return RowSpans(*torch.broadcast_tensors(lo, hi))
    lo, hi, end = torch.broadcast_tensors(lo, hi, end)
    apart = (end > 0) & (lo > end)
    # Rows whose run would be empty, or that see another part of the sink, are nothing that tiles know.
    if bool((apart & ((lo >= hi) | (end != sink))).any()):
        return None
    meets = (end > 0) & ~apart
    lo = lo.masked_fill(meets, 0)
    hi = torch.where(meets, torch.maximum(hi, end), hi)
    return RowSpans(lo, hi, sink, apart) if bool(apart.any()) else RowSpans(lo, hi)


def _sink_of(rule: TokenRule) -> int:
    return rule.sink if rule.window is not None and isinstance(rule.sink, int) else 0


def _block_runs(call: Call) -> _BlockRuns | None:
    rule = TokenRule(causal=False, window=1, sink=_sink_of(call.rule))
    return remembered(replace(call, rule=rule, origins=None), _find_runs)


def _find_runs(call: Call) -> _BlockRuns | None:
    entries, _ = list_entries(call)
    rows = entries.shape[0] * entries.shape[1] * entries.shape[2]
    blocks = call.grid[1]
    of_sink = entries.col < -(-_sink_of(call.rule) // call.block_k)
    found = []
    for kept in (of_sink, ~of_sink):
        row = entries.row[kept]
        col = entries.col[kept]
        first = col.new_full((rows,), blocks).scatter_reduce_(0, row, col, "amin")
        last = col.new_zeros(rows).scatter_reduce_(0, row, col + 1, "amax")
        count = torch.bincount(row, minlength=rows)
        if not bool(((last - first).clamp(min=0) == count).all()):
            return None
        found.append((first, last, count))
    (sink_first, sink_last, sinks), (first, last, count) = found
    if bool(((sinks > 0) & (sink_first > 0)).any()):
        return None
    # Where nothing lies between the sink's blocks and the others, or there are no others, they are one run.
    joined = (sinks > 0) & ((count == 0) | (first == sink_last))
    first = torch.where(joined, 0, first)
    last = torch.where(joined & (count == 0), sink_last, last)
    before = torch.where(joined, 0, sinks)
    return _BlockRuns(*(x.view(entries.shape) for x in (first, last, before)))


def _by_row(x: Tensor, call: Call) -> Tensor:
    """Values of query blocks ``[b, h, M]``, in blocks of keys, for each row, in slots; h is 1 or H."""
    heads = call.q.shape[1]
    each = heads // x.shape[1] if x.shape[1] > 1 else 1
    rows = x.repeat_interleave(each, 1).repeat_interleave(call.block_q, 2)
    return rows[:, :, : call.q.shape[2]] * call.block_k
