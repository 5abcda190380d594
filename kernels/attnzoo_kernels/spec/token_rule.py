"""Which keys a row may see beside the layout, as plain data: the token rule of one call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

FARTHEST = 1 << 40
"""Slots beyond which nothing lies: larger windows and sinks would overflow when a position is added."""


def bounded(value: Any) -> Any:
    """A window or sink, cut where it is beyond every slot; tensors are int32 and need no bound."""
    return min(value, FARTHEST) if type(value) is int else value


class PackedGQA(NamedTuple):
    """Query heads of a group laid along the rows: ``[.., M, heads, block, ..]`` in this order.

    Attributes:
        heads: Heads of a group.
        block: Tokens in a query block.
        tokens: T of the call; the rows behind it repeat the last one.
    """

    heads: int
    block: int
    tokens: int


@dataclass(frozen=True)
class TokenRule:
    """The token rule: causality, row positions, window and sink.

    Attributes:
        causal: Whether a row may read only slots up to its position.
        q_pos: int32 ``[B|1, H|1, T]``, or ``None`` for ``t + S - T``; a negative entry is an absent row.
        window: Keys seen, own key included; an int or int32 ``[H]``; ``None`` means all.
        sink: Slots below it stay visible beside the window; an int or int32 ``[H]``.
        packed: How the query heads of a group were laid along the rows, or ``None``.
    """

    causal: bool
    q_pos: Tensor | None = None
    window: int | Tensor | None = None
    sink: int | Tensor = 0
    packed: PackedGQA | None = None

    @property
    def is_static(self) -> bool:
        """Whether the rule holds no tensors, so that what follows from it may outlive the call."""
        return self.q_pos is None and not isinstance(self.window, Tensor) and not isinstance(self.sink, Tensor)

    @property
    def is_per_head(self) -> bool:
        """Whether heads differ in window, sink or positions."""
        per_head = isinstance(self.window, Tensor) or isinstance(self.sink, Tensor)
        return per_head or (self.q_pos is not None and self.q_pos.shape[1] > 1)

    def positions(self, seq_q: int, seq_k: int, device: torch.device) -> Tensor:
        """The position of each row, int64 ``[B|1, H|1, T]``."""
        if self.q_pos is not None:
            return self.q_pos.long()
        if self.packed is None:
            return (torch.arange(seq_q, device=device) + (seq_k - seq_q)).view(1, 1, seq_q)
        heads, block, tokens = self.packed
        token = torch.arange(seq_q // heads, device=device).clamp_(max=tokens - 1) + (seq_k - tokens)
        return token.view(-1, 1, block).expand(-1, heads, -1).reshape(1, 1, seq_q)

    def span(self, pos: Tensor, window: int | Tensor | None, seq_k: int) -> tuple[Tensor, Tensor]:
        """The half-open interval ``[lo, hi)`` of slots that the window and causality leave to rows at ``pos``.

        Absent rows have an empty interval. ``window`` must broadcast against ``pos``.
        """
        unbounded = torch.full_like(pos, seq_k)
        hi = pos + 1 if self.causal else unbounded if window is None else pos + window
        lo = torch.zeros_like(pos) if window is None else pos - window + 1
        hi = hi.clamp(min=0, max=seq_k)
        if self.q_pos is not None:
            hi = torch.where(pos < 0, 0, hi)
        return lo.clamp(min=0), hi

    def sink_end(self, pos: Tensor, sink: int | Tensor, seq_k: int) -> Tensor:
        """The end of the sink's interval ``[0, end)`` for rows at ``pos``; ``sink`` must broadcast against ``pos``."""
        end = torch.zeros_like(pos) + sink
        end = torch.minimum(end, pos + 1) if self.causal else end
        end = end.clamp(min=0, max=seq_k)
        return torch.where(pos < 0, 0, end) if self.q_pos is not None else end


def token_mask(rule: TokenRule, heads: int, seq_q: int, seq_k: int, device: torch.device) -> Tensor:
    """The rule as a mask, bool ``[B|1, H|1, T, S]``: the definition, at O(T S) memory."""
    pos = rule.positions(seq_q, seq_k, device)

    def of_head(value: int | Tensor) -> int | Tensor:
        return value.long().view(1, heads, 1) if isinstance(value, Tensor) else value

    lo, hi = rule.span(pos, None if rule.window is None else of_head(rule.window), seq_k)
    slot = torch.arange(seq_k, device=device)
    seen = (slot >= lo.unsqueeze(-1)) & (slot < hi.unsqueeze(-1))
    if rule.window is None:
        return seen
    return seen | (slot < rule.sink_end(pos, of_head(rule.sink), seq_k).unsqueeze(-1))
