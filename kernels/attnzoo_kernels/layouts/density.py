"""How many (query, key) pairs a call sees, counted without a T x S mask.

Lists that rows share are looked at once, and a row asks its list for running counts of keys: the work grows with rows
and with what is listed, and not with their product.

Letters: R rows, U distinct lists, N key blocks, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from attnzoo_kernels.layouts.build import LayoutLists, Sizes, distinct_lists, listed_indices
from attnzoo_kernels.spec.call import Call
from attnzoo_kernels.spec.token_rule import TokenRule

ROWS_AT_ONCE = 1 << 19
"""Rows that are counted together."""


def count_pairs(call: Call) -> tuple[int, int]:
    """Pairs visible by the call's whole rule, and pairs that a dense call without window and sink would see."""
    batch, heads, _, seq_q, seq_k = call.shape
    if batch * heads * seq_q * seq_k == 0:
        return 0, 0
    counts = _counts_of(call)
    if counts.key.shape[0] == 0:
        return 0, _dense_pairs(call)
    src_batch, src_heads, _ = counts.list_of_row.shape
    rows = torch.arange(src_batch * src_heads * seq_q, device=call.col.device)
    visible = sum(int(_visible(call, counts, at).sum()) for at in rows.split(ROWS_AT_ONCE))
    return visible * (batch // src_batch) * (heads // src_heads), _dense_pairs(call)


def gathered_rows(lists: LayoutLists, sizes: Sizes) -> Tensor:
    """Key rows of all blocks that each query block lists, int64 ``[B|1, h, M]``; the last block may have fewer."""
    _, block_k, _, seq_k = sizes
    width = (seq_k - lists.col.long() * block_k).clamp(max=block_k)
    running = torch.cat([width.new_zeros(1), width.cumsum(0)])
    start = lists.start.long()
    return running[start + lists.count] - running[start]


def layout_density(lists: LayoutLists, sizes: Sizes, *, causal: bool) -> float:
    """Visible pairs of a layout over those of a dense call, aligned at the last key; 1 where there are none."""
    block_q, block_k, seq_q, seq_k = sizes
    batch, heads, _ = lists.start.shape
    q = torch.empty(batch, heads, seq_q, 0, device=lists.col.device)
    k = torch.empty(batch, heads, seq_k, 0, device=lists.col.device)
    call = Call(q, k, k, lists.start, lists.count, lists.col, None, TokenRule(causal), block_q, block_k, 1.0)
    visible, dense = count_pairs(call)
    return visible / dense if dense else 1.0


@dataclass(frozen=True)
class _Counts:
    """Running counts of keys along the distinct lists of a call.

    Attributes:
        list_of_row: int64 ``[Bs, Hs, M]``, the list of each source row.
        block_k: Slots in a key block.
        blocks: N.
        key: int64 ``[nnz]``, ``list * N + block`` of all entries, ascending.
        begin: int64 ``[U]``, where each list begins.
        source: int64 ``[U]``, the row of ``upto`` that holds for each list.
        upto: int64 ``[sources, S + 1]``, ordinary keys alive before a slot.
        before: int64 ``[nnz + 1]``, ordinary keys alive in the entries before one.
        opened: The same of entries whose landmark is alive; all are where there are no landmarks.
        is_open: bool ``[nnz]``, whether an entry's landmark is alive.
    """

    list_of_row: Tensor
    block_k: int
    blocks: int
    key: Tensor
    begin: Tensor
    source: Tensor
    upto: Tensor
    before: Tensor
    opened: Tensor
    is_open: Tensor

    def find(self, lists: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
        """The first entry from a block on, and whether it is that block's, ``[R]`` each."""
        wanted = lists * self.blocks + block
        index = torch.searchsorted(self.key, wanted)
        found = self.key[index.clamp(max=self.key.shape[0] - 1)] == wanted
        return index, found & (index < self.key.shape[0]) & (block < self.blocks)

    def alive(self, lists: Tensor, least: Tensor, most: Tensor) -> Tensor:
        """Ordinary keys alive in slots ``[least, most)``, listed or not."""
        source = self.source[lists]
        return self.upto[source, torch.maximum(least, most)] - self.upto[source, least]

    def listed(self, lists: Tensor, end: Tensor) -> Tensor:
        """Keys of the lists before a slot."""
        block = end // self.block_k
        index, found = self.find(lists, block)
        whole = self.before[index] - self.before[self.begin[lists]]
        return whole + torch.where(found, self.alive(lists, block * self.block_k, end), 0)

    def gated(self, lists: Tensor, end: Tensor) -> Tensor:
        """Keys of the listed blocks whose landmark is alive and before a slot."""
        index, _ = self.find(lists, end // self.block_k)
        return self.opened[index] - self.opened[self.begin[lists]]

    def cut_off(self, lists: Tensor, end: Tensor) -> Tensor:
        """Keys before a slot in its own block, where that is listed and its landmark is alive."""
        block = end // self.block_k
        index, found = self.find(lists, block)
        is_open = found & self.is_open[index.clamp(max=self.key.shape[0] - 1)]
        return torch.where(is_open, self.alive(lists, block * self.block_k, end), 0)


class _Seen(NamedTuple):
    """What rows may see, the layout left aside: slots ``[0, sink)`` and ``[lo, hi)``, ``sink <= lo <= hi``."""

    sink: Tensor
    lo: Tensor
    hi: Tensor


def _counts_of(call: Call) -> _Counts:
    seq_k = call.k.shape[2]
    blocks = call.grid[1]
    list_of_row, lists, source = _distinct(call)
    row, index = listed_indices(lists)
    key = (row * blocks + call.col.long()[index]).sort().values
    row = key // blocks
    block = key % blocks
    upto, is_alive = _live_keys(call)
    first = block * call.block_k
    last = (first + call.block_k).clamp(max=seq_k)
    width = upto[source[row], last] - upto[source[row], first]
    before = opened = _running(width)
    is_open = torch.ones_like(key, dtype=torch.bool)
    if _has_landmarks(call):
        landmark = first + call.block_k - 1
        is_open = (landmark < seq_k) & is_alive[source[row], landmark.clamp(max=seq_k - 1)]
        opened = _running(torch.where(is_open, width, 0))
    count = lists.count.reshape(-1).long()
    begin = count.cumsum(0) - count
    return _Counts(list_of_row, call.block_k, blocks, key, begin, source, upto, before, opened, is_open)


def _running(x: Tensor) -> Tensor:
    """Sums of what stands before each entry, and of all: ``[..., n]`` to ``[..., n + 1]``."""
    return torch.nn.functional.pad(x.cumsum(-1), (1, 0))


def _has_landmarks(call: Call) -> bool:
    return call.gate is not None and call.gate.is_last


def _distinct(call: Call) -> tuple[Tensor, LayoutLists, Tensor]:
    """The list of each source row ``[Bs, Hs, M]``, the distinct lists, and the row of the bias that goes with each.

    Source rows are those of layout, rule and bias before broadcasting.
    """
    batch, heads, _, _, _ = call.shape
    bias = call.key_bias
    q_pos = call.rule.q_pos
    bias_batch, bias_heads = (1, 1) if bias is None else bias.shape[:2]
    own_batch, own_heads, blocks_q = call.start.shape
    src_batch = batch if max(own_batch, bias_batch, 1 if q_pos is None else q_pos.shape[0]) > 1 else 1
    sizes = {own_heads, bias_heads, 1}
    src_heads = heads if call.rule.is_per_head or len(sizes) > 2 else max(sizes)
    of_row, lists = distinct_lists(LayoutLists(call.start, call.count, call.col))
    of_row = of_row.repeat_interleave(src_heads // own_heads, 1).expand(src_batch, -1, -1)
    # Lists under different rows of a bias count as different lists.
    source = torch.arange(bias_batch * bias_heads, device=call.col.device).view(bias_batch, bias_heads, 1)
    source = source.repeat_interleave(src_heads // bias_heads, 1).expand(src_batch, -1, blocks_q)
    pairs, list_of_row = (of_row * (bias_batch * bias_heads) + source).unique(return_inverse=True)
    chosen = pairs // (bias_batch * bias_heads)
    return (
        list_of_row,
        LayoutLists(lists.start[chosen], lists.count[chosen], call.col),
        pairs % (bias_batch * bias_heads),
    )


def _live_keys(call: Call) -> tuple[Tensor, Tensor]:
    """Running counts of ordinary keys that the bias leaves alive, int64 ``[sources, S + 1]``, and which keys it does.

    A landmark is no ordinary key.
    """
    seq_k = call.k.shape[2]
    if call.key_bias is None:
        alive = torch.ones(1, seq_k, dtype=torch.bool, device=call.col.device)
    else:
        alive = (call.key_bias != -torch.inf).reshape(-1, seq_k)
    ordinary = alive
    if _has_landmarks(call):
        slot = torch.arange(seq_k, device=call.col.device)
        ordinary = alive & (slot % call.block_k != call.block_k - 1)
    return _running(ordinary.long()), alive


def _visible(call: Call, counts: _Counts, at: Tensor) -> Tensor:
    """Visible keys of some source rows, flat in ``[Bs, Hs, T]``: int64 ``[R]``."""
    _, src_heads, _ = counts.list_of_row.shape
    seq_q = call.q.shape[2]
    item = at // (src_heads * seq_q)
    head = at // seq_q % src_heads
    token = at % seq_q
    lists = counts.list_of_row[item, head, token // call.block_q]
    positions = call.rule.positions(seq_q, call.k.shape[2], call.col.device)
    pos = positions[item if positions.shape[0] > 1 else 0, head if positions.shape[1] > 1 else 0, token]
    seen = _seen(call, pos, head)
    if _has_landmarks(call):
        return _gated(counts, lists, pos, seen)
    if call.rule.window is None:
        return counts.listed(lists, seen.hi)
    return counts.listed(lists, seen.sink) + counts.listed(lists, seen.hi) - counts.listed(lists, seen.lo)


def _seen(call: Call, pos: Tensor, head: Tensor) -> _Seen:
    """What rows of some heads at some positions see."""
    rule = call.rule
    seq_k = call.k.shape[2]

    def of_row(value: int | Tensor) -> int | Tensor:
        return value.long()[head] if isinstance(value, Tensor) else value

    lo, hi = rule.span(pos, None if rule.window is None else of_row(rule.window), seq_k)
    if rule.window is None:
        return _Seen(torch.zeros_like(hi), torch.zeros_like(hi), hi)
    sink = rule.sink_end(pos, of_row(rule.sink), seq_k)
    # A sink that reaches the window makes one interval of both, and so does an empty window.
    joined = (lo >= hi) | (sink >= lo)
    sink = torch.where(joined, torch.maximum(sink, torch.where(lo < hi, hi, 0)), sink)
    return _Seen(sink, torch.where(joined, sink, lo), torch.where(joined, sink, hi))


def _gated(counts: _Counts, lists: Tensor, pos: Tensor, seen: _Seen) -> Tensor:
    """Visible ordinary keys of rows where a block vanishes unless its last slot is seen, or it is the row's own."""
    block_k = counts.block_k
    sink, lo, hi = seen
    found = counts.gated(lists, sink) + counts.gated(lists, hi) - counts.gated(lists, lo)
    # The block in which the window begins: what lies before is hidden, but for what the sink shows.
    hidden = counts.cut_off(lists, lo) - torch.where(sink // block_k == lo // block_k, counts.cut_off(lists, sink), 0)
    found -= torch.where(lo // block_k < hi // block_k, hidden, 0)
    own = pos.clamp(min=0) // block_k
    index, is_listed = counts.find(lists, own)
    first = (own * block_k).clamp(max=counts.upto.shape[1] - 1)
    last = (first + block_k).clamp(max=counts.upto.shape[1] - 1)
    landmark = first + block_k - 1
    is_open = counts.is_open[index.clamp(max=counts.key.shape[0] - 1)]
    is_counted = is_open & ((landmark < sink) | ((landmark >= lo) & (landmark < hi)))
    within = [torch.minimum(torch.maximum(x, first), last) for x in seen]
    of_own = counts.alive(lists, first, within[0]) + counts.alive(lists, within[1], within[2])
    return found + torch.where(is_listed & ~is_counted & (pos >= 0), of_own, 0)


def _dense_pairs(call: Call) -> int:
    batch, heads, _, seq_q, seq_k = call.shape
    rule = call.rule
    bias = call.key_bias
    pos = rule.positions(seq_q, seq_k, call.q.device)
    _, end = rule.span(pos, None, seq_k)
    if bias is None:
        return int(end.sum()) * (batch // pos.shape[0]) * (heads // pos.shape[1])
    src_batch = max(pos.shape[0], bias.shape[0])
    src_heads = heads if pos.shape[1] > 1 else bias.shape[1]
    upto = _running((bias != -torch.inf).long()).repeat_interleave(src_heads // bias.shape[1], 1)
    upto = upto.expand(src_batch, src_heads, seq_k + 1)
    seen = upto.gather(-1, end.expand(src_batch, src_heads, seq_q)).sum()
    return int(seen) * (batch // src_batch) * (heads // src_heads)
