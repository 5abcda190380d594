"""What is edited of what heads read, for the calls of one layer.

Rows and keys are said by their tokens: the n-th real token of an item's sequence, whatever slots padding takes and
wherever a cache has put it. So the same edit holds in a prompt, in any split of it, and in decoding.

Letters: B batch, T tokens of a call, S key slots, N tokens that something is said of, H query heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from attnzoo.base.editing.by_token import ByToken, all_tokens
from attnzoo_kernels.errors import ConfigError


@dataclass(frozen=True, eq=False)
class TwoStates:
    """Attention to some keys that counts less than it would, the rest taking its part.

    Attributes:
        sinks: The set of these keys' tokens.
        beta: What is left of their share.
    """

    sinks: ByToken
    beta: float


@dataclass(frozen=True, eq=False)
class ReadEdit:
    """One edit of what one query head reads.

    Attributes:
        head: Among the layer's query heads.
        rows: The set of the rows' tokens; ``None`` for all.
        bias: Added to the scores of keys, by their tokens.
        states: What is left of attention to some keys, once biases are added.
        uniform: Whether rows take the plain mean of the values that the head can see, in place of all else.
    """

    head: int
    rows: ByToken | None = None
    bias: ByToken | None = None
    states: TwoStates | None = None
    uniform: bool = False


@dataclass(frozen=True, eq=False)
class HeadRead:
    """How a head reads in some of its rows, all of its edits taken together.

    Attributes:
        head: Among the layer's query heads.
        rows: The set of the rows' tokens; of one head, sets have no token in common.
        bias: The sum of all biases, or ``None``.
        states: See :class:`ReadEdit`; ``None`` beside ``uniform``.
        uniform: Likewise.
    """

    head: int
    rows: ByToken
    bias: ByToken | None = None
    states: TwoStates | None = None
    uniform: bool = False


@dataclass(frozen=True, eq=False)
class CallRows:
    """The rows of a call, as its caller has them.

    Attributes:
        token: Which token of its item's sequence each row is, int64 ``[B|1, T]``; -1 at padding.
        batch: Items B.
        heads: Query heads H of the layer.
    """

    token: Tensor
    batch: int
    heads: int

    @property
    def is_padded(self) -> bool:
        """Whether there is padding among the rows."""
        return bool((self.token < 0).any())


@dataclass(frozen=True, eq=False)
class CallEdits:
    """What is edited in one call of a layer.

    Attributes:
        edits: In the order in which they were made.
        heads: Query heads H of the layer.
        tokens: Which token lies in each slot that the call reads, int64 ``[B|1, S]``, -1 for none; ``None`` where slot
            s holds token s.
        honoured: Heads whose reads were edited, noted where that is done.
    """

    edits: tuple[ReadEdit, ...]
    heads: int
    tokens: Tensor | None = None
    honoured: set[int] = field(default_factory=set)

    @cached_property
    def reads(self) -> tuple[HeadRead, ...]:
        """How each edited head reads, in rows that have no token in common.

        Raises:
            ConfigError: If two calibrations of one head meet in a row.
        """
        by_head: dict[int, list[ReadEdit]] = {}
        for edit in self.edits:
            by_head.setdefault(edit.head, []).append(edit)
        return tuple(read for head, edits in by_head.items() for read in _reads_of(head, edits))

    @property
    def weighs_keys(self) -> bool:
        """Whether single keys count otherwise than they would."""
        return any(read.bias is not None or read.states is not None for read in self.reads)

    def missed(self) -> list[int]:
        """Heads that were to be edited, and were not."""
        return sorted({read.head for read in self.reads} - self.honoured)


@runtime_checkable
class ReadEditor(Protocol):
    """Says what is edited in each call of a layer."""

    def for_call(self, rows: CallRows) -> Sequence[ReadEdit]:
        """The edits of a call; none where it reads as ever."""


def edits_of_call(editors: Sequence[ReadEditor], rows: CallRows) -> CallEdits | None:
    """What editors say of a call, one after the other; ``None`` where none of them says anything."""
    edits = tuple(edit for editor in editors for edit in editor.for_call(rows))
    return CallEdits(edits, rows.heads) if edits else None


def edits_among(edits: tuple[ReadEdit, ...], q: Tensor, tokens: Tensor | None = None) -> CallEdits | None:
    """Edits for a call with queries ``[B, H, T, D]``; ``None`` where there are none; see :class:`CallEdits`."""
    return CallEdits(edits, q.shape[1], tokens) if edits else None


def _reads_of(head: int, edits: Sequence[ReadEdit]) -> list[HeadRead]:
    """Rows of one head by what is edited there: an edit of some rows divides those that were alike before."""
    reads = [HeadRead(head, all_tokens())]
    # Biases come first, then calibrations, then what takes the place of all.
    for edit in (x for x in edits if x.bias is not None):
        reads = [part for read in reads for part in _divided(read, edit)]
    for edit in (x for x in edits if x.states is not None):
        reads = [part for read in reads for part in _divided(read, edit)]
    for edit in (x for x in edits if x.uniform):
        reads = [part for read in reads for part in _divided(read, edit)]
    return [read for read in reads if read.bias is not None or read.states is not None or read.uniform]


def _divided(read: HeadRead, edit: ReadEdit) -> list[HeadRead]:
    """The rows of a read that an edit reaches, and the others."""
    reached = read.rows if edit.rows is None else read.rows & edit.rows
    others = None if edit.rows is None else read.rows.without(edit.rows)
    parts: list[HeadRead] = []
    if not reached.is_empty:
        if edit.states is not None and read.states is not None:
            raise ConfigError(f"post: expected one for each row of head {read.head}, got two that meet")
        bias = read.bias
        if edit.bias is not None:
            bias = edit.bias if bias is None else bias + edit.bias
        states = None if edit.uniform else edit.states or read.states
        parts.append(HeadRead(read.head, reached, bias, states, read.uniform or edit.uniform))
    if others is not None and not others.is_empty:
        parts.append(HeadRead(read.head, others, read.bias, read.states, read.uniform))
    return parts


def token_set(member: Tensor, token: Tensor) -> ByToken:
    """The set of those tokens, int64 ``[B|1, T]`` with -1 for none, for which ``member [B|1, T]`` is true."""
    batch = max(member.shape[0], token.shape[0])
    token = token.expand(batch, -1)
    count = int(token.max()) + 1 if token.numel() else 0
    values = torch.zeros(batch, count + 1, dtype=torch.bool, device=token.device)
    # Where there is no token, it is written behind all of them, and left there.
    values.scatter_(1, torch.where(token < 0, count, token), member.expand(batch, -1))
    return ByToken(values[:, :count])
