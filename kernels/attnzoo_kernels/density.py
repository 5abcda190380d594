"""How many (query, key) pairs a call sees, counted without a T x S mask."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo_kernels.call import Call
from attnzoo_kernels.entries import Entries, list_entries
from attnzoo_kernels.layout_build import Lists, Sizes
from attnzoo_kernels.rule import Rule

_PAIRS_AT_ONCE = 1 << 22


def count_pairs(call: Call) -> tuple[int, int]:
    """Pairs visible by the call's whole rule, and pairs that a dense call without window and sink would see."""
    batch, heads, _, seq_q, seq_k = call.shape
    if batch * heads * seq_q * seq_k == 0:
        return 0, 0
    entries = _entries_per_bias(call)
    src_batch, src_heads, _ = entries.shape
    upto = _live_keys_upto(call, src_batch, src_heads)
    every = torch.arange(entries.row.shape[0], device=entries.row.device)
    parts = every.split(max(1, _PAIRS_AT_ONCE // call.block_q))
    visible = sum(int(_visible(call, entries, upto, at).sum().item()) for at in parts)
    return visible * (batch // src_batch) * (heads // src_heads), _dense_pairs(call)


def layout_density(lists: Lists, sizes: Sizes, *, causal: bool) -> float:
    """Visible pairs of a layout over those of a dense call, aligned at the last key; 1 where there are none."""
    block_q, block_k, seq_q, seq_k = sizes
    batch, heads, _ = lists.start.shape
    q = torch.empty(batch, heads, seq_q, 0, device=lists.col.device)
    k = torch.empty(batch, heads, seq_k, 0, device=lists.col.device)
    call = Call(q, k, k, lists.start, lists.count, lists.col, None, Rule(causal), block_q, block_k, 1.0)
    visible, dense = count_pairs(call)
    return visible / dense if dense else 1.0


def _entries_per_bias(call: Call) -> Entries:
    """The entries at batch and head counts that also hold the bias."""
    heads = call.q.shape[1]
    bias = call.key_bias
    if bias is None:
        return list_entries(call)[0]
    start, count = call.start, call.count
    if bias.shape[0] > start.shape[0]:
        start, count = (x.expand(bias.shape[0], -1, -1) for x in (start, count))
    if bias.shape[1] > 1:
        start, count = (x.repeat_interleave(heads // x.shape[1], 1) for x in (start, count))
    widened = Call(
        call.q, call.k, call.v, start, count, call.col, bias, call.rule, call.block_q, call.block_k, call.scale
    )
    return list_entries(widened)[0]


def _live_keys_upto(call: Call, src_batch: int, src_heads: int) -> Tensor:
    """Running count of keys that the bias leaves alive, int64 ``[Bs * Hs, S + 1]``."""
    seq_k, bias = call.k.shape[2], call.key_bias
    alive = torch.ones(src_batch, src_heads, seq_k, dtype=torch.int64, device=call.q.device)
    if bias is not None:
        finite = (bias != -torch.inf).long()
        if finite.shape[1] > 1:
            finite = finite.repeat_interleave(src_heads // finite.shape[1], 1)
        alive = alive * finite
    running = alive.cumsum(-1).view(src_batch * src_heads, seq_k)
    return torch.cat([torch.zeros_like(running[:, :1]), running], 1)


def _visible(call: Call, entries: Entries, upto: Tensor, at: Tensor) -> Tensor:
    """Visible keys of some entries, for each of their rows, int64 ``[e, block_q]``."""
    rule, seq_k = call.rule, call.k.shape[2]
    _, src_heads, blocks_q = entries.shape
    row, col = entries.row[at], entries.col[at]
    head, block = row // blocks_q, row % blocks_q
    pos_batch, pos_heads = entries.pos.shape[:2]
    pos = entries.pos[head // src_heads if pos_batch > 1 else 0, head % src_heads if pos_heads > 1 else 0, block]

    def of_row(value: int | Tensor) -> int | Tensor:
        return value.long()[head % src_heads].unsqueeze(1) if isinstance(value, Tensor) else value

    lo, hi = rule.span(pos, None if rule.window is None else of_row(rule.window), seq_k)
    first = (col * call.block_k).unsqueeze(1)

    def between(least: Tensor, most: Tensor) -> Tensor:
        """Visible keys in slots ``[least, most)``."""

        def keys(begin: Tensor, end: Tensor) -> Tensor:
            begin = torch.minimum(torch.maximum(begin, least), most)
            end = torch.maximum(torch.minimum(end, most), begin)
            place = head.unsqueeze(1)
            return upto[place, end] - upto[place, begin]

        seen = keys(lo, hi)
        if rule.window is not None:
            end = rule.sink_end(pos, of_row(rule.sink), seq_k)
            beside = torch.minimum(end, torch.where(lo < hi, lo, end))
            seen = seen + keys(torch.zeros_like(end), beside) + keys(torch.where(lo < hi, hi, end), end)
        return seen

    last = (first + call.block_k).clamp(max=seq_k)
    if call.gate is None or call.gate.key is not None:
        seen = between(first, last)
    else:
        # The last column is a gate and no ordinary key; a block whose gate is hidden vanishes, but for the own one.
        landmark = (first + call.block_k - 1).clamp(max=seq_k)
        own = pos // call.block_k == col.unsqueeze(1)
        seen = torch.where(own | (between(landmark, last) > 0), between(first, landmark), 0)
    # The tail of a ragged last block repeats a row and is no row of its own.
    row_index = block.unsqueeze(1) * call.block_q + torch.arange(call.block_q, device=row.device)
    return torch.where(row_index < call.q.shape[2], seen, 0)


def _dense_pairs(call: Call) -> int:
    batch, heads, _, seq_q, seq_k = call.shape
    rule = call.rule
    pos = rule.positions(seq_q, seq_k, call.q.device)
    bias_heads = 1 if call.key_bias is None else call.key_bias.shape[1]
    bias_batch = 1 if call.key_bias is None else call.key_bias.shape[0]
    src_batch, src_heads = max(pos.shape[0], bias_batch), heads if pos.shape[1] > 1 else bias_heads
    upto = _live_keys_upto(call, src_batch, src_heads).view(src_batch, src_heads, seq_k + 1)
    _, end = rule.span(pos, None, seq_k)
    seen = upto.gather(-1, end.expand(src_batch, src_heads, seq_q)).sum()
    return int(seen) * (batch // src_batch) * (heads // src_heads)
