"""One row that reads slots which are known beforehand: a decoding step, without a layout and without a schedule.

Where the slots of a row follow one another they are read where they lie; elsewhere they are gathered once. Slots that
are not read are never touched, so that they may hold anything.

Letters: B batch, H query heads, G KV heads, S slots, D head width, Dv value width, n slots that a row reads, h heads
that read slots of their own: 1, G or H.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from attnzoo_kernels.cpu.gather import gather_slots
from attnzoo_kernels.layouts.layout import BlockLayout
from attnzoo_kernels.layouts.memo import Lists
from attnzoo_kernels.layouts.runs import ListedRuns, Run, Seen, listed_runs
from attnzoo_kernels.runtime.plain import is_readable

MOST_RUNS = 6
"""Runs that are joined where they lie; more are gathered."""

WORK_SET = 1 << 20
"""Bytes of gathered keys and values that stay in a core's cache until they are multiplied."""

LONG_RUNS = 1 << 17
"""Numbers in the keys of several runs from which they are multiplied run by run, and not joined before."""

_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default

PRECISE = (torch.float32, torch.float64)
"""What scores may be kept in between two products."""


@dataclass(frozen=True, eq=False)
class Slots:
    """What the row of a decoding step reads, for all items of a batch.

    Attributes:
        runs: Runs that all heads read, ascending and apart, beside ``index`` or alone; ``None`` where there are none.
        index: Slots that heads read of their own, int64 ``[h, n]``; one with fewer repeats one that it reads.
        shown: Which of ``index`` count, bool ``[h, n]``; ``None`` where all do.
        shares: What neighbouring heads read, all of them in order; ``None`` where all read the same or ``index``.
        blocks: Whole key blocks that each line of the index begins with, int64 ``[h, m]``: they are gathered at once.
        block: Slots in one of them.
    """

    runs: tuple[Run, ...] | None
    index: Tensor | None = None
    shown: Tensor | None = None
    shares: tuple[Share, ...] | None = None
    blocks: Tensor | None = None
    block: int = 1

    @classmethod
    def of_runs(cls, runs: Sequence[Run], device: torch.device | None = None) -> Slots:
        """The same runs for all heads; there must be a slot in one of them."""
        joined: list[Run] = []
        for first, last in runs:
            if first >= last:
                continue
            if joined and joined[-1][1] == first:
                joined[-1] = (joined[-1][0], last)
            else:
                joined.append((first, last))
        if not joined:
            raise ValueError("runs: expected a slot to read, got none")
        if len(joined) <= MOST_RUNS:
            return cls(tuple(joined))
        return cls(None, _listed(joined, device).unsqueeze(0))

    @classmethod
    def of_lists(cls, lists: Sequence[Sequence[Run]], device: torch.device | None = None) -> Slots:
        """Runs of each KV head or of each query head; each must have a slot."""
        heads: list[Slots] = []
        before: tuple[Run, ...] | None = None
        for runs in lists:
            same = heads and tuple(runs) == before
            before = tuple(runs)
            heads.append(heads[-1] if same else cls.of_runs(runs, device))
        return cls.of_heads(heads)

    @classmethod
    def of_heads(cls, heads: Sequence[Slots]) -> Slots:
        """What each KV head or each query head reads; neighbours that read the same are given as the same object."""
        shares: list[Share] = []
        for _, same in groupby(heads, key=id):
            alike = list(same)
            first = shares[-1].last if shares else 0
            shares.append(Share(first, first + len(alike), alike[0]))
        if len(shares) == 1:
            return shares[0].slots
        apart = all(slots.runs is None and slots.shown is None for slots in heads)
        index = _stacked([slots.index for slots in heads]) if apart else None
        if index is not None:
            return cls(None, index, blocks=_stacked([slots.blocks for slots in heads]), block=heads[0].block)
        return cls(None, shares=tuple(shares))

    @classmethod
    def of_layout(cls, layout: BlockLayout, *, window: int | None = None, sink: int = 0) -> Slots | None:
        """What a layout of a single row lists and its rule leaves to it, the row being that of the last slot.

        What follows from the lists is remembered with them: a layout that grows by a token and keeps their tensors
        costs next to nothing. Reads values.

        Returns:
            ``None`` where it has no such form: lists of their own for each item of a batch, a head that reads nothing,
            rotary origins, more rows than one, or values that cannot be read without synchronising.
        """
        if layout.seq_q != 1 or layout.origin is not None or layout.start.shape[0] != 1 or not is_readable(layout.col):
            return None
        found = slots_of(layout, seen_by_last(layout.seq_k, window=window, sink=sink))
        return None if found is None else found[0]


class Share(NamedTuple):
    """What some neighbouring heads read.

    Attributes:
        first: The first of them.
        last: The head behind the last.
        slots: What they read; there are no shares in it.
    """

    first: int
    last: int
    slots: Slots


def attend_slots(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Slots,
    *,
    scale: float,
    bias: Tensor | None = None,
    aux: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Softmax attention of one row over the slots that it reads.

    Args:
        q: ``[B, H, 1, D]``.
        k: ``[B, G, S, D]``.
        v: ``[B, G, S, Dv]``.
        slots: What is read.
        scale: The factor on scores.
        bias: Added to the scaled scores of the slots that are read, ``[B|1, H, 1, n]`` in q's dtype; for slots without
            shares.
        aux: ``(q_aux [B, H, 1, Da], k_aux [B|1, G|1, S, Da])``, more channels of the score.

    Returns:
        ``[B, H, 1, Dv]``.
    """
    return _attend((q, k, v), slots, scale, (bias, aux), need_lse=False)[0]


def attend_slots_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Slots,
    *,
    scale: float,
    bias: Tensor | None = None,
    aux: tuple[Tensor, Tensor] | None = None,
    need_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    """As :func:`attend_slots`, with the log-sum-exp of the scores ``[B, H, 1]``, empty where it is not needed.

    It is fp64 for fp64, else fp32.
    """
    out, lse = _attend((q, k, v), slots, scale, (bias, aux), need_lse=need_lse)
    if lse is None:
        lse = out.new_empty(0, dtype=torch.float64 if out.dtype == torch.float64 else torch.float32)
    return out, lse


def seen_by_last(slots: int, *, window: int | None, sink: int) -> Seen:
    """What the token rule leaves to the row of the last slot, causal or not: ahead of it there is nothing."""
    if window is None:
        return Seen(0, slots, 0)
    return Seen(max(slots - window, 0), slots, min(sink, slots))


def slots_of(lists: Lists, seen: Seen) -> tuple[Slots, ...] | None:
    """What the single row of a layout reads, for each of its items; ``None`` where a head reads nothing."""
    listed = listed_runs(lists)
    if listed is None:
        return None
    heads = lists.start.shape[1]
    few = [gaps + 1 < MOST_RUNS for gaps in listed.gaps]
    if not any(few) and listed.of_head == tuple(range(heads)):
        # Heads that each read a list of many gaps, as after a choice by top-k.
        table = listed.table(seen)
        if table is not None and table[0].shape[1] > 0:
            return (Slots(None, table[0], blocks=table[1], block=listed.block),)
    found = [_slots_of_list(listed, number, seen, in_runs=short) for number, short in enumerate(few)]
    by_head = [found[number] for number in listed.of_head]
    there = [slots for slots in by_head if slots is not None]
    if len(there) < len(by_head):
        return None
    return tuple(Slots.of_heads(there[i : i + heads]) for i in range(0, len(there), heads))


def _slots_of_list(listed: ListedRuns, number: int, seen: Seen, *, in_runs: bool) -> Slots | None:
    if in_runs:
        runs = listed.slots(number, seen)
        return Slots.of_runs(runs) if runs else None
    index, blocks = listed.index(number, seen)
    return Slots(None, index, blocks=blocks, block=listed.block) if index.shape[1] else None


Added = tuple[Tensor | None, tuple[Tensor, Tensor] | None]
"""What is added to scores: a bias of the slots that are read, and auxiliary channels."""


def _attend(
    tensors: tuple[Tensor, Tensor, Tensor], slots: Slots, scale: float, added: Added, *, need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    q, k, v = tensors
    heads = q.shape[1]
    groups = k.shape[1]
    if slots.shares is None and slots.index is None:
        return _one_share(tensors, slots, scale, added, need_lse=need_lse)
    if slots.shares is not None and added[0] is not None:
        raise ValueError("bias: expected None where heads read slots of their own; give it as auxiliary channels")
    outs: list[Tensor] = []
    lses: list[Tensor] = []
    for here, kv, own in _work_sets(slots, heads, groups, v):
        parts = (q[:, here], k[:, kv], v[:, kv])
        out, lse = _one_share(parts, own, scale, _added_of(added, here, kv), need_lse=need_lse)
        outs.append(out)
        if lse is not None:
            lses.append(lse)
    if len(outs) == 1:
        return outs[0], lses[0] if need_lse else None
    return torch.cat(outs, 1), torch.cat(lses, 1) if need_lse else None


def _added_of(added: Added, here: slice, kv: slice) -> Added:
    """What is added to the scores of some heads."""
    bias, aux = added
    if bias is not None:
        bias = bias[:, here]
    if aux is not None:
        q_aux, k_aux = aux
        aux = (q_aux[:, here], k_aux if k_aux.shape[1] == 1 else k_aux[:, kv])
    return bias, aux


def _work_sets(slots: Slots, heads: int, groups: int, v: Tensor) -> Iterator[tuple[slice, slice, Slots]]:
    """Query heads and their KV heads that are computed at once, with what they read: whole groups, or parts of one."""
    shares = slots.shares or (Share(0, 1 if slots.index is None else slots.index.shape[0], slots),)
    counted = shares[-1].last
    if counted not in (1, groups, heads):
        raise ValueError(f"slots: expected those of one of 1, {groups}, {heads} heads, got {counted}")
    for first, last, own in shares:
        index = own.index
        at = first * heads // counted
        end = last * heads // counted
        each = heads // groups
        while at < end:
            # What is gathered is multiplied while it is in the cache; runs are not copied at all.
            rows = end - at if index is None else _heads_at_once(index.shape[1], v) * each
            # Not beyond the group that a share begins or ends within.
            stop = min(end, at + rows) // each * each
            if at % each or stop <= at:
                stop = min(end, (at // each + 1) * each)
            here = slice(at, stop)
            own_here = own
            if index is not None and index.shape[0] > 1:
                mine = slice((at * counted // heads) - first, (stop * counted - 1) // heads + 1 - first)
                shown, blocks = (None if x is None else x[mine] for x in (own.shown, own.blocks))
                own_here = Slots(own.runs, index[mine], shown, blocks=blocks, block=own.block)
            yield here, slice(at // each, (stop - 1) // each + 1), own_here
            at = stop


def _heads_at_once(slots: int, v: Tensor) -> int:
    """KV heads whose gathered keys and values make a work set."""
    fits = WORK_SET // max(2 * slots * v.shape[0] * v.shape[3] * v.element_size(), 1)
    return max(fits, torch.get_num_threads(), 1)


def _one_share(
    tensors: tuple[Tensor, Tensor, Tensor], slots: Slots, scale: float, added: Added, *, need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Heads that read the same slots, or each its own line of an index."""
    q, k, v = tensors
    batch, heads, _, width = q.shape
    groups = k.shape[1]
    bias, aux = added
    split = slots.index is not None and slots.index.shape[0] == heads != groups
    lines = heads if split else groups
    # The query heads of a group along the rows: keys and values are read once for all of them.
    rows = q if split or heads == groups else q.reshape(batch, groups, heads // groups, width)
    mask = None if bias is None else bias.reshape(-1, *rows.shape[1:3], bias.shape[3])
    if slots.shown is not None:
        hidden = torch.zeros(slots.shown.shape, dtype=q.dtype, device=q.device).masked_fill(~slots.shown, -torch.inf)
        hidden = pad(hidden, (0, sum(last - first for first, last in slots.runs or ())))
        mask = hidden[None, :, None] if mask is None else mask + hidden[None, :, None]
    if aux is not None:
        q_aux, k_aux = aux
        near = torch.cat(_read("k_aux", k_aux, slots, lines), 2).transpose(-1, -2)
        score = torch.matmul(q_aux.reshape(batch, *rows.shape[1:3], -1), near) * scale
        mask = score if mask is None else score + mask
    out, lse = _softmax(
        (rows, _read("k", k, slots, lines), _read("v", v, slots, lines)), mask, scale, need_lse=need_lse
    )
    if heads != rows.shape[1]:
        out = out.reshape(batch, heads, 1, v.shape[3])
        lse = None if lse is None else lse.reshape(batch, heads, 1)
    return out, lse


def _softmax(
    tensors: tuple[Tensor, list[Tensor], list[Tensor]], mask: Tensor | None, scale: float, *, need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Attention of rows ``[B, h, r, D]`` over the runs of keys and values that they read, every slot of them."""
    rows, ks, vs = tensors
    if len(ks) == 1 and not need_lse:
        return scaled_dot_product_attention(rows, ks[0], vs[0], attn_mask=mask, scale=scale), None
    width = rows.shape[3]
    precise = rows.dtype in PRECISE
    long = len(ks) > 1 and sum(x.numel() for x in ks) >= LONG_RUNS
    fused = vs[0].shape[3] == width and rows.device.type == "cpu"
    if precise and (long or (need_lse and not fused)):
        return _by_products((rows, ks, vs), mask, scale, need_lse=need_lse)
    k = ks[0] if len(ks) == 1 else torch.cat(ks, 2)
    v = vs[0] if len(vs) == 1 else torch.cat(vs, 2)
    if not need_lse:
        return scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale), None
    if not fused:
        wide = tuple([x.float()] for x in (k, v))
        out, lse = _by_products((rows.float(), wide[0], wide[1]), mask, scale, need_lse=True)
        return out.to(rows.dtype), lse
    rows, k, v = (x if x.stride(3) == 1 and x.stride(2) >= width else x.contiguous() for x in (rows, k, v))
    out, lse = _fused(rows, k, v, 0.0, False, attn_mask=mask, scale=scale)
    return out, lse


def _by_products(
    tensors: tuple[Tensor, list[Tensor], list[Tensor]], mask: Tensor | None, scale: float, *, need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """The same by two products for each run, which are read where they lie."""
    rows, ks, vs = tensors
    rows = rows * scale
    scores = [torch.matmul(rows, k.transpose(-1, -2)) for k in ks]
    score = scores[0] if len(scores) == 1 else torch.cat(scores, -1)
    if mask is not None:
        score = score + mask
    lse = score.logsumexp(-1) if need_lse else None
    weights = score.softmax(-1).split([x.shape[2] for x in vs], -1)
    out = torch.matmul(weights[0], vs[0])
    for weight, v in zip(weights[1:], vs[1:], strict=True):
        out = out + torch.matmul(weight, v)
    return out, lse


def _listed(runs: Sequence[Run], device: torch.device | None) -> Tensor:
    return torch.cat([torch.arange(first, last, device=device) for first, last in runs])


def _read(name: str, x: Tensor, slots: Slots, lines: int) -> list[Tensor]:
    """The slots that are read of ``x [B, h, S, D]``: one tensor gathered into scratch memory, and views of runs."""
    parts = []
    if slots.index is not None:
        whole = None if slots.blocks is None else (slots.blocks, slots.block)
        parts.append(gather_slots(name, x, slots.index, whole, lines=lines))
    for first, last in slots.runs or ():
        # All of it needs no view.
        part = x if (first, last) == (0, x.shape[2]) else x[:, :, first:last]
        parts.append(part if not parts or part.shape[1] == parts[0].shape[1] else _for_lines(part, lines))
    if not parts:
        raise ValueError("slots: expected runs, an index or shares, got none")
    return parts


def _for_lines(x: Tensor, lines: int) -> Tensor:
    """What KV heads have, for each of the lines of an index."""
    return x.repeat_interleave(lines // x.shape[1], 1)


def _stacked(lines: Sequence[Tensor | None]) -> Tensor | None:
    """Lines ``[1, m]`` as one tensor; ``None`` where one is missing or they differ in length."""
    there = [line for line in lines if line is not None]
    same = len(there) == len(lines) and len({line.shape[1] for line in there}) == 1
    return torch.cat(there) if same else None
