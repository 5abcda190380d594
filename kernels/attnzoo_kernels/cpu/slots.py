"""One row that reads slots which are known beforehand: a decoding step, without a layout and without a schedule.

Where the slots of a row follow one another they are read where they lie; elsewhere they are gathered once. Slots that
are not read are never touched, so that they may hold anything.

Letters: B batch, H query heads, G KV heads, S slots, D head width, Dv value width, n slots that a row reads, h heads
that read slots of their own: 1, G or H.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

Run = tuple[int, int]
"""A first slot, and the slot behind the last."""

MOST_RUNS = 6
"""Runs that are joined where they lie; more are gathered."""


@dataclass(frozen=True, eq=False)
class Slots:
    """What the row of a decoding step reads, for all items of a batch.

    Attributes:
        runs: Runs that all heads read, ascending and apart; ``None`` where ``index`` says it.
        index: Slots that are read, int64 ``[h, n]``; a head with fewer repeats one of its own.
        shown: Which of them count, bool ``[h, n]``; ``None`` where all do.
    """

    runs: tuple[Run, ...] | None
    index: Tensor | None = None
    shown: Tensor | None = None

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
        if len({tuple(runs) for runs in lists}) == 1:
            return cls.of_runs(lists[0], device)
        each = [_listed(runs, device) for runs in lists]
        count = torch.tensor([x.shape[0] for x in each], device=device)
        most = int(count.max())
        if int(count.min()) == 0:
            raise ValueError("lists: expected a slot to read for every head, got none for some")
        index = torch.stack([torch.cat((x, x[:1].expand(most - x.shape[0]))) for x in each])
        shown = None
        if int(count.min()) < most:
            shown = torch.arange(most, device=device) < count.unsqueeze(1)
        return cls(None, index, shown)


def attend_slots(q: Tensor, k: Tensor, v: Tensor, slots: Slots, *, scale: float, bias: Tensor | None = None) -> Tensor:
    """Softmax attention of one row over the slots that it reads.

    Args:
        q: ``[B, H, 1, D]``.
        k: ``[B, G, S, D]``.
        v: ``[B, G, S, Dv]``.
        slots: What is read.
        scale: The factor on scores.
        bias: Added to the scaled scores of the slots that are read, ``[B|1, H, 1, n]`` in q's dtype.

    Returns:
        ``[B, H, 1, Dv]``.
    """
    batch, heads, _, width = q.shape
    groups = k.shape[1]
    split = slots.index is not None and slots.index.shape[0] == heads != groups
    if slots.runs is not None:
        k, v = (_in_runs(x, slots.runs) for x in (k, v))
    elif slots.index is not None:
        index = slots.index
        k, v = (_gathered(x, index, heads if split else groups) for x in (k, v))
    # The query heads of a group along the rows: keys and values are read once for all of them.
    rows = q if split else q.reshape(batch, groups, heads // groups, width)
    mask = None if bias is None else bias.view(-1, *rows.shape[1:3], k.shape[2])
    if slots.shown is not None:
        hidden = torch.zeros(slots.shown.shape, dtype=q.dtype, device=q.device).masked_fill(~slots.shown, -torch.inf)
        mask = hidden[:, None] if mask is None else mask + hidden[:, None]
    out = scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale)
    return out.reshape(batch, heads, 1, v.shape[3])


def _listed(runs: Sequence[Run], device: torch.device | None) -> Tensor:
    return torch.cat([torch.arange(first, last, device=device) for first, last in runs])


def _in_runs(x: Tensor, runs: tuple[Run, ...]) -> Tensor:
    """The slots of runs ``[B, G, n, D]``: a view of one run, a copy of several."""
    parts = [x[:, :, first:last] for first, last in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _gathered(x: Tensor, index: Tensor, heads: int) -> Tensor:
    """The slots ``index [h, n]`` of ``x [B, G, S, D]`` for so many heads."""
    if index.shape[0] == 1:
        return x.index_select(2, index[0])
    batch, groups, _, width = x.shape
    out = x.new_empty(batch, heads, index.shape[1], width)
    for item in range(batch):
        for head in range(heads):
            torch.index_select(x[item, head * groups // heads], 0, index[head], out=out[item, head])
    return out
