"""What the steps of a layer hand to each other.

Letters: B batch, T query tokens, S key tokens, C model width, H query heads, G KV heads, D head width, Dv value width.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from attnzoo.base.editing.operation import OperationCall
from attnzoo.base.editing.reads import CallEdits, CallRows
from attnzoo.base.padding import add_front, front_positions
from attnzoo.cache.evicting.regions import of_heads
from attnzoo.cache.held import HeldCache
from attnzoo.cache.kv_cache import KVCache
from attnzoo.cache.lengths import Lengths
from attnzoo_kernels import BlockLayout, Extras, visible_pairs
from attnzoo_kernels.errors import UnsupportedError


@dataclass(frozen=True, eq=False, kw_only=True)
class Step:
    """One call of a layer, its rows left-aligned: token t of an item is its t-th real one in this call.

    ``offset`` and ``lengths`` are ints where it is known that all items share them, else int64 ``[B]``.

    Attributes:
        x: Tokens ``[B, T, C]``, zeros where an item has no token.
        positions: What the rotation uses, int64 ``[B|1, T]``.
        lengths: Real tokens in this call.
        offset: Tokens that the cache held before this call.
        cache: The cache that ``remember`` appends to.
        context: Tokens ``[B, S, C]`` that the keys come from instead of x, zeros at padding.
        padding: The caller's ``key_padding``, bool ``[B, T]`` (with a context: ``[B, S]``).
        row_index: Of each of the caller's tokens, its row in x, int64 ``[B, T]``; ``None`` where nothing moved.
        first: Position of the first row, where rows follow one another for all items alike and it is known without
            reading a tensor.
    """

    x: Tensor
    positions: Tensor
    lengths: int | Tensor
    offset: int | Tensor = 0
    cache: KVCache | None = None
    context: Tensor | None = None
    padding: Tensor | None = None
    row_index: Tensor | None = None
    first: int | None = None

    def call_rows(self, heads: int) -> CallRows:
        """Which tokens the rows are, as the caller has them, of a layer with so many query heads.

        Raises:
            UnsupportedError: If keys are of another sequence.
        """
        if self.context is not None:
            reason = "keys are of another sequence, whose tokens edits do not count"
            raise UnsupportedError(f"context: reads cannot be edited: {reason}", (reason,))
        token = torch.arange(self.x.shape[1], device=self.x.device).unsqueeze(0)
        if self.row_index is not None:
            token = self.row_index
        token = token + Lengths(self.offset).column()
        if self.padding is not None:
            token = token.masked_fill(self.padding, -1)
        return CallRows(token, self.x.shape[0], heads)

    def row_buffers(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What the cache has room for in keys and values, ``[B, G, n, D]``, once this call's are written."""
        if self.cache is None:
            raise AssertionError("buffers are those of a call with a cache")
        return self.cache.row_buffer("k").to(dtype), self.cache.row_buffer("v").to(dtype)


@dataclass(frozen=True, eq=False)
class Heads:
    """This call's queries ``[B, H, T, D]``, keys ``[B, G, T, D]`` and values ``[B, G, T, Dv]``, not rotated."""

    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True, eq=False)
class AttentionInputs:
    """What the operation sees: everything that may be read, rotated.

    Attributes:
        q: ``[B, H, T, D]``.
        k: ``[B, G, S, D]``; slot s of an item is its s-th token.
        v: ``[B, G, S, Dv]``.
        q_pos: The slot of each row, int32 ``[B|1, H|1, T]``, -1 where there is no token; ``None`` means that the rows
            are the last T slots.
        key_bias: Added to the scaled scores, ``[B|1, G|H|1, S]``; -inf hides a slot.
        offloaded: Whether k and v lie in CPU memory, from where the blocks that a plan lists are fetched.
        edits: What is edited of what heads read, or ``None``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_pos: Tensor | None = None
    key_bias: Tensor | None = None
    offloaded: bool = False
    edits: CallEdits | None = None

    @property
    def slots(self) -> int:
        """Slots S that rows may read: those of k, and those that stayed in a cache."""
        return self.k.shape[2]

    @property
    def in_cache(self) -> bool:
        """Whether earlier tokens' keys and values stayed in a cache, so that k and v are this call's alone."""
        return False


@dataclass(frozen=True, eq=False)
class HeldInputs(AttentionInputs):
    """A call's own tokens and rows, ``[B, G|H, T, D]``; what is remembered stays in a cache that holds less than all.

    Attributes:
        cache: That cache; the call's tokens are staged there.
        lengths: Rows of each item that are tokens.
    """

    cache: HeldCache = field(kw_only=True)
    lengths: int | Tensor = field(kw_only=True)

    @property
    def slots(self) -> int:
        """Of the call's tokens and of all before it, kept or not."""
        return min(self.cache.bound + self.k.shape[2], self.cache.max_length)

    @property
    def in_cache(self) -> bool:
        """True."""
        return True

    def own_of(self, heads: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """The call's queries ``[B, h * H / G, T, D]``, keys and values ``[B, h, T, D]`` for some KV heads."""
        groups = self.k.shape[1]
        q = of_heads(self.q.unflatten(1, (groups, -1)), heads).flatten(1, 2)
        return q, of_heads(self.k, heads), of_heads(self.v, heads)

    def row_slots(self, first: int | Tensor) -> Tensor:
        """The slots of rows that begin at ``first``, int32 ``[B|1, 1, T]``; -1 where there is no token."""
        token = torch.arange(self.q.shape[2], device=self.q.device)
        real = Lengths(self.lengths).holds(token)
        return torch.where(real, token + Lengths(first).column(), -1).to(torch.int32).view(-1, 1, token.shape[0])


@dataclass(frozen=True)
class Way:
    """How the operation is run over what is held: the factor on scores, and the implementation."""

    scale: float
    impl: str


@dataclass(frozen=True, eq=False)
class Plan:
    """What a layer decided to read, and how.

    Attributes:
        layout: Which key blocks each query block reads. Its rows begin with ``front`` absent ones.
        extras: The token rule beside the layout.
        causal: Whether a row reads only slots up to its own.
        front: Absent rows before each item's first, so that query blocks lie on the sequence's own block grid: an int,
            or int64 ``[B]``.
        head_weight: Factors on the heads' outputs, ``[B, H, T, 1]``.
        aux_loss: An unweighted scalar to add to the training loss.
        info: What else the variant wants to show.
        batch: B of the call.
        heads: H of the call.
    """

    layout: BlockLayout
    extras: Extras
    causal: bool
    front: int | Tensor = 0
    head_weight: Tensor | None = None
    aux_loss: Tensor | None = None
    info: dict[str, Any] = field(default_factory=dict)
    batch: int = 1
    heads: int = 1

    def apart(self) -> Self:
        """With copies of its weights and of what it shows, for a record of a compiled call.

        Views of what a program computes would make that an output of it, whose gradient its backward then waits for.
        """
        weight = None if self.head_weight is None else self.head_weight.clone()
        info = {name: x.clone() if isinstance(x, Tensor) else x for name, x in self.info.items()}
        return replace(self, head_weight=weight, info=info)

    @cached_property
    def density(self) -> float:
        """Visible (query, key) pairs by the whole rule over those of the dense call; 1 where there are none."""
        extras = self.extras
        if extras.q_pos is None and Lengths(self.front).shared:
            # The operation computes the front's rows and drops them; they are no queries.
            rows = torch.arange(self.layout.seq_q, dtype=torch.int32, device=self.layout.col.device)
            q_pos = torch.where(rows < self.front, -1, rows + (self.layout.seq_k - self.layout.seq_q))
            extras = replace(extras, q_pos=q_pos.to(torch.int32).view(1, 1, -1))
        visible, dense = visible_pairs(
            self.layout, causal=self.causal, extras=extras, batch=self.batch, heads=self.heads
        )
        return visible / dense if dense else 1.0


@dataclass(frozen=True, eq=False)
class AttentionOutput:
    """What a call gives: ``out [B, T, C]``, and the plan it followed. The plan keeps its layout alive."""

    out: Tensor
    plan: Plan


def finalise(plan: Plan, inputs: AttentionInputs) -> Plan:
    """A variant's plan with what the call itself says: rows, their slots, and hidden keys."""
    q_pos = front_positions(inputs.q_pos, plan.front, plan.layout.seq_q)
    extras = plan.extras
    if q_pos is not None or inputs.key_bias is not None:
        extras = replace(extras, q_pos=q_pos, key_bias=inputs.key_bias)
    return replace(plan, extras=extras, batch=inputs.q.shape[0], heads=inputs.q.shape[1])


def operation_of(inputs: AttentionInputs, plan: Plan, scale: float | None, impl: str) -> OperationCall:
    """The operation of a call: a plan over its inputs, whose rows begin with the plan's absent ones."""
    return OperationCall(
        q=add_front(inputs.q, plan.front, plan.layout.seq_q),
        k=inputs.k,
        v=inputs.v,
        layout=plan.layout,
        extras=plan.extras,
        scale=scale,
        impl=impl,
        causal=plan.causal,
    )


def is_training(*tensors: Tensor) -> bool:
    """Whether gradients are wanted of one."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
