r"""The operation once more for edited heads, and what takes the place of their outputs.

An edited head is computed by itself, with its own keys and values, over the same layout and by the same token rule, so
that

.. math:: o = \mathrm{where}(rows,\; \mathrm{attention}(q, k, v, bias),\; o_{plain})

holds whatever a layer reads. No other head is computed again.

Letters: B batch, T rows, S key slots, H query heads, G KV heads, g query heads of a KV head, n heads that are read
once more, D head width, Dv value width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnzoo.base.editing.reads import CallEdits, HeadRead
from attnzoo_kernels import BlockLayout, Extras, block_sparse_attention, block_sparse_attention_with_lse
from attnzoo_kernels.errors import UnsupportedError


@dataclass(frozen=True, eq=False, kw_only=True)
class OperationCall:
    """A call of the operation, to be made as it is and again for some heads.

    Attributes:
        q: ``[B, H, T, D]``.
        k: ``[B, G, S, D]``.
        v: ``[B, G, S, Dv]``.
        layout: Which blocks are read.
        extras: The token rule beside it.
        scale: The factor on scores.
        impl: Which implementation runs.
        causal: Whether a row reads no later slot.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    layout: BlockLayout
    extras: Extras
    scale: float | None
    impl: str
    causal: bool = True

    def run(self) -> Tensor:
        """``[B, H, T, Dv]``."""
        return block_sparse_attention(self.q, self.k, self.v, self.layout, **self._rule)

    def run_with_lse(self) -> tuple[Tensor, Tensor]:
        """The same, and log-sum-exps ``[B, H, T]``, natural logarithms."""
        return block_sparse_attention_with_lse(self.q, self.k, self.v, self.layout, **self._rule)

    @property
    def _rule(self) -> dict[str, Any]:
        return {"causal": self.causal, "scale": self.scale, "extras": self.extras, "impl": self.impl}

    def of_heads(self, heads: Sequence[int], bias: Tensor) -> OperationCall:
        """The same for some query heads, each with a KV head of its own and a bias more.

        Args:
            heads: Numbers of query heads; one may come several times.
            bias: Added to the scaled scores ``[B|1, n, S]``.
        """
        groups = self.k.shape[1]
        each = self.q.shape[1] // groups
        own = torch.tensor(heads, device=self.q.device)
        group = own // each
        by_head = _PickHeads(own, group, self.q.shape[1], groups)
        extras = self.extras
        if extras.key_bias is not None:
            bias = bias + by_head.pick(extras.key_bias)
        if extras.aux is not None:
            extras = replace(extras, aux=(by_head.pick(extras.aux[0]), by_head.pick(extras.aux[1])))
        window = extras.window[own] if isinstance(extras.window, Tensor) else extras.window
        sink = extras.sink[own] if isinstance(extras.sink, Tensor) else extras.sink
        q_pos = None if extras.q_pos is None else by_head.pick(extras.q_pos)
        layout = self.layout
        if layout.start.shape[1] > 1:
            start, count = (by_head.pick(x).contiguous() for x in (layout.start, layout.count))
            sizes = (layout.block_q, layout.block_k, layout.seq_q, layout.seq_k)
            layout = BlockLayout(*sizes, start, count, layout.col, layout.origin)
        return replace(
            self,
            q=self.q.index_select(1, own),
            k=self.k.index_select(1, group),
            v=self.v.index_select(1, group),
            layout=layout,
            extras=replace(extras, key_bias=bias, window=window, sink=sink, q_pos=q_pos),
        )

    def unasked(self, heads: Tensor) -> OperationCall:
        """The same where queries of some heads, bool ``[n]``, ask for nothing: every score is its bias."""
        nothing = heads.view(1, -1, 1, 1)
        extras = self.extras
        if extras.aux is not None:
            extras = replace(extras, aux=(extras.aux[0].masked_fill(nothing, 0), extras.aux[1]))
        return replace(self, q=self.q.masked_fill(nothing, 0), extras=extras)


@dataclass(frozen=True, eq=False)
class _PickHeads:
    """Picks what some query heads have of tensors ``[B|1, h, ...]``, where h is 1, G or H."""

    own: Tensor
    group: Tensor
    heads: int
    groups: int

    def pick(self, x: Tensor) -> Tensor:
        if x.shape[1] == 1:
            return x
        return x.index_select(1, self.own if x.shape[1] == self.heads else self.group)


@dataclass(frozen=True, eq=False)
class HeldKeys:
    """Whose keys an operation reads, and which tokens they are.

    Attributes:
        heads: KV heads of the layer among them, ascending; ``None`` for all.
        token: Tokens in slots, int64 ``[B|1, h|1, S]``, -1 for none; ``None`` where slot s holds token s. A row's own
            token lies in a slot.
    """

    heads: tuple[int, ...] | None = None
    token: Tensor | None = None


ALL_KEYS = HeldKeys()
"""All KV heads, whose keys lie in order."""


def attend(operation: OperationCall, edits: CallEdits | None, held: HeldKeys = ALL_KEYS) -> Tensor:
    """What an operation gives ``[B, H, T, Dv]``, with its edits where there are some; see :func:`edited`."""
    out = operation.run()
    return out if edits is None else edited(out, operation, edits, held)


def check_honoured(edits: CallEdits | None, what: str) -> None:
    """Raises unless all edits of a call were made.

    Raises:
        UnsupportedError: If something attends by itself and knows nothing of them.
    """
    if edits is not None and (missed := edits.missed()):
        reason = f"{what} attends by itself and knows nothing of edits"
        raise UnsupportedError(f"edits: reads of heads {missed} cannot be edited: {reason}", (reason,))


def edited(out: Tensor, operation: OperationCall, edits: CallEdits, held: HeldKeys = ALL_KEYS) -> Tensor:
    """The outputs of an operation, with those of edited heads in their edited rows.

    Args:
        out: What the operation gave ``[B, H, T, Dv]``.
        operation: The operation.
        edits: What is edited.
        held: Whose keys were read.

    Raises:
        UnsupportedError: If blocks are gated, or not all query heads are here.
    """
    reads = _reads_here(operation, edits, held)
    if not reads:
        return out
    if operation.extras.gate is not None:
        reason = "gates weigh blocks of keys before keys are weighed"
        raise UnsupportedError(f"edits: reads cannot be edited: {reason}", (reason,))
    token = held.token if held.token is not None or edits.tokens is None else edits.tokens.unsqueeze(1)
    found = _read(operation, reads, token)
    row = _row_tokens(operation, token)
    columns: dict[int, Tensor] = {}
    for number, (head, read) in enumerate(reads):
        rows = read.rows.at(row if row.shape[1] == 1 else row[:, head : head + 1])  # [B|1, 1, T]
        plain = columns.get(head, out[:, head])
        columns[head] = torch.where(rows.transpose(1, 2), found[:, number].to(out.dtype), plain)
        edits.honoured.add(read.head)
    where = torch.tensor(list(columns), device=out.device)
    return out.index_copy(1, where, torch.stack(list(columns.values()), 1))


def _reads_here(operation: OperationCall, edits: CallEdits, held: HeldKeys) -> list[tuple[int, HeadRead]]:
    """The reads of heads that an operation computes, each with the number that its head has there."""
    heads = operation.q.shape[1]
    groups = operation.k.shape[1]
    each = heads // groups
    if held.heads is None:
        if heads != edits.heads:
            reason = f"{heads} of {edits.heads} query heads are here"
            raise UnsupportedError(f"edits: reads cannot be edited: {reason}", (reason,))
        return [(read.head, read) for read in edits.reads]
    local = {head: number for number, head in enumerate(held.heads)}
    here = [read for read in edits.reads if read.head // each in local]
    return [(local[read.head // each] * each + read.head % each, read) for read in here]


def _row_tokens(operation: OperationCall, token: Tensor | None) -> Tensor:
    """The token of each row, int64 ``[B|1, H|1, T]``; -1 for rows without one."""
    slots = operation.k.shape[2]
    rows = operation.q.shape[2]
    if operation.extras.q_pos is None:
        slot = (torch.arange(rows, device=operation.q.device) + (slots - rows)).view(1, 1, -1)
    else:
        slot = operation.extras.q_pos.long()
    if token is None:
        return slot.clamp(min=-1)
    # Slots of a call's own tokens are the same for all heads.
    own = token[:, :1]
    batch = max(own.shape[0], slot.shape[0])
    index = slot.clamp(0, max(slots - 1, 0)).expand(batch, -1, -1)
    found = own.expand(batch, index.shape[1], -1).gather(2, index)
    return torch.where(slot < 0, -1, found)


def _read(operation: OperationCall, reads: Sequence[tuple[int, HeadRead]], token: Tensor | None) -> Tensor:
    """What edited heads give in all of their rows, ``[B, n, T, Dv]``."""
    each = operation.q.shape[1] // operation.k.shape[1]
    k = operation.k
    if token is None:
        token = torch.arange(k.shape[2], device=k.device).view(1, 1, -1)
    precise = torch.promote_types(operation.q.dtype, torch.float32)
    heads: list[int] = []
    biases: list[Tensor] = []
    means: list[bool] = []
    for head, read in reads:
        own = token if token.shape[1] == 1 else token[:, head // each : head // each + 1]
        bias = _key_bias(read, own[:, 0], precise)
        for part in [bias] if read.states is None else _apart(bias, read.states.sinks.at(own[:, 0])):
            heads.append(head)
            biases.append(part)
            means.append(read.uniform)
    batch = max(x.shape[0] for x in biases)
    call = operation.of_heads(heads, torch.stack([x.expand(batch, -1) for x in biases], 1))
    if any(means):
        call = call.unasked(torch.tensor(means, device=k.device))
    if all(read.states is None for _, read in reads):
        return call.run()
    return _joined(*call.run_with_lse(), [read for _, read in reads])


def _key_bias(read: HeadRead, token: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of keys ``[B|1, S]``, by their tokens ``[B|1, S]``."""
    if read.bias is None:
        return torch.zeros(1, token.shape[1], dtype=dtype, device=token.device)
    bias = read.bias.at(token).to(dtype)
    if not read.uniform:
        return bias
    # A plain mean knows what is hidden, and no weights.
    return torch.zeros_like(bias).masked_fill(bias == -torch.inf, -torch.inf)


def _apart(bias: Tensor, sinks: Tensor) -> list[Tensor]:
    """Biases of a read of sinks, bool ``[B|1, S]``, alone, and of one of all other keys."""
    return [bias.masked_fill(~sinks, -torch.inf), bias.masked_fill(sinks, -torch.inf)]


def _joined(out: Tensor, lse: Tensor, reads: Sequence[HeadRead]) -> Tensor:
    r"""Reads in their order, of those with two states both joined: :math:`\beta P o_S + (1 - \beta P) o_N`."""
    parts = []
    next_read = 0
    for read in reads:
        if read.states is None:
            parts.append(out[:, next_read])
            next_read += 1
            continue
        sinks = out[:, next_read]
        others = out[:, next_read + 1]
        sink_lse, other_lse = (x.unsqueeze(-1) for x in (lse[:, next_read], lse[:, next_read + 1]))
        next_read += 2
        # The share of sinks P is a sigmoid of the difference of log-sum-exps, where there are both.
        alone = other_lse == -torch.inf
        single = alone | (sink_lse == -torch.inf)
        share = (sink_lse.masked_fill(single, 0) - other_lse.masked_fill(single, 0)).sigmoid()
        weight = torch.where(single, alone.to(share.dtype), share * read.states.beta)
        parts.append((weight * sinks + (1 - weight) * others).to(out.dtype))
    return torch.stack(parts, 1)
