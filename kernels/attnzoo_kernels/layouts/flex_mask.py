"""The token rule of a FlexAttention mask: causality, positions, window and sink that leave exactly what the mask shows.

Letters: B batch, H heads, M/N query/key blocks, F full blocks, P partial ones, T rows, S slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo_kernels.layouts.build import Sizes

PAIRS_AT_ONCE = 1 << 21
"""(row, slot) pairs that are looked at together."""


@dataclass(frozen=True)
class Listed:
    """The blocks that a mask lists, and what it shows of them.

    Attributes:
        sizes: ``block_q, block_k, seq_q, seq_k``.
        shape: ``B, H``.
        full: Row block ``[F]``, flat in ``[B, H, M]``, and key block ``[F]`` of those that are seen whole.
        partial: The same of the others.
        seen: bool ``[P, block_q, block_k]``, false beyond rows and slots.
    """

    sizes: Sizes
    shape: tuple[int, int]
    full: tuple[Tensor, Tensor]
    partial: tuple[Tensor, Tensor]
    seen: Tensor

    def chunks(self) -> Iterator[PairChunk]:
        """The partial blocks, some at a time."""
        block_q, block_k, _, _ = self.sizes
        most = max(1, PAIRS_AT_ONCE // (block_q * block_k))
        for row, col, seen in zip(*(x.split(most) for x in (*self.partial, self.seen)), strict=True):
            if len(row) == 0:
                return
            yield PairChunk.of(self, row, col, seen)


@dataclass(frozen=True)
class PairChunk:
    """Some partial blocks: of each its item, head, rows ``[p, block_q]`` and slots ``[p, block_k]``."""

    item: Tensor
    head: Tensor
    rows: Tensor
    slots: Tensor
    seen: Tensor
    real: Tensor

    @classmethod
    def of(cls, listed: Listed, row: Tensor, col: Tensor, seen: Tensor) -> PairChunk:
        """The chunk of some row and key blocks."""
        block_q, block_k, seq_q, seq_k = listed.sizes
        blocks_q = -(-seq_q // block_q)
        heads = listed.shape[1]
        item = row // (blocks_q * heads)
        head = row // blocks_q % heads
        block = row % blocks_q
        rows = block.unsqueeze(1) * block_q + torch.arange(block_q, device=row.device)
        slots = col.unsqueeze(1) * block_k + torch.arange(block_k, device=row.device)
        real = (rows < seq_q).unsqueeze(2) & (slots < seq_k).unsqueeze(1)
        return cls(item, head, rows, slots, seen, real)


@dataclass(frozen=True)
class Found:
    """A token rule.

    Attributes:
        causal: Whether rows see only slots up to their positions.
        q_pos: int32 ``[B|1, H|1, T]``, or ``None`` for the last T slots.
        window: An int, int32 ``[H]`` or ``None``.
        sink: An int or int32 ``[H]``.
    """

    causal: bool
    q_pos: Tensor | None = None
    window: int | Tensor | None = None
    sink: int | Tensor = 0

    @property
    def is_bare(self) -> bool:
        """Whether causality says all."""
        return self.q_pos is None and self.window is None


def find_rule(listed: Listed, *, prefer_causal: bool = True) -> Found | None:
    """The first of the simplest rules that leaves exactly what is seen; ``None`` where none does."""
    _, _, seq_q, seq_k = listed.sizes
    device = listed.seen.device
    from_first = torch.arange(seq_q, dtype=torch.int32, device=device).view(1, 1, -1)
    from_last = from_first + (seq_k - seq_q)
    for causal in (prefer_causal, not prefer_causal):
        found = _fit(listed, from_last, causal=causal, given=False)
        if found is not None and found.is_bare:
            return found
    candidates = [(from_last, False)] if seq_q == seq_k else [(from_last, False), (from_first, True)]
    for causal in (True, False):
        for pos, given in candidates:
            found = _fit(listed, pos, causal=causal, given=given)
            if found is not None:
                return found
    # Each row's last visible slot is its position.
    return _fit(listed, _last_seen(listed), causal=True, given=True)


def _last_seen(listed: Listed) -> Tensor:
    """The last slot that each row sees, int32 ``[B|1, H|1, T]``; -1 where it sees none."""
    block_q, block_k, seq_q, seq_k = listed.sizes
    blocks_q = -(-seq_q // block_q)
    last = torch.full((listed.shape[0] * listed.shape[1], blocks_q * block_q), -1, device=listed.seen.device)
    row, col = listed.full
    whole = last.new_full((last.shape[0] * blocks_q,), -1)
    whole.scatter_reduce_(0, row, ((col + 1) * block_k).clamp(max=seq_k) - 1, "amax")
    last = torch.maximum(last, whole.repeat_interleave(block_q).view(last.shape))
    for part in listed.chunks():
        most = torch.where(part.seen, part.slots.unsqueeze(1), -1).amax(2)
        index = ((part.item * listed.shape[1] + part.head) * last.shape[1]).unsqueeze(1) + part.rows
        last.view(-1).scatter_reduce_(0, index.reshape(-1), most.reshape(-1), "amax")
    q_pos = last[:, :seq_q].to(torch.int32).view(*listed.shape, seq_q)
    for dim in (0, 1):
        first = q_pos.narrow(dim, 0, 1)
        q_pos = first if bool((q_pos == first).all()) else q_pos
    return q_pos


def _fit(listed: Listed, pos: Tensor, *, causal: bool, given: bool) -> Found | None:
    """The widest window and sink that show nothing hidden, where they show all that is seen.

    Args:
        listed: What is seen.
        pos: Positions ``[B|1, H|1, T]``.
        causal: Of the rule.
        given: Whether the positions have to be given, and -1 is an absent row.
    """
    heads = listed.shape[1]
    far = listed.sizes[2] + listed.sizes[3] + 1
    window, sink = (torch.full((heads,), far, device=pos.device) for _ in range(2))
    for part in listed.chunks():
        distance, allowed = _distances(part, pos, causal=causal, given=given)
        if bool((part.seen & ~allowed).any()):
            return None
        hidden = allowed & ~part.seen
        for least, value in ((window, distance), (sink, part.slots.unsqueeze(1).expand_as(distance))):
            least.scatter_reduce_(0, part.head, torch.where(hidden, value, far).amin((1, 2)), "amin")
    if not _full_fits(listed, pos, (torch.full_like(window, far), torch.zeros_like(sink)), causal=causal, given=given):
        return None
    q_pos = pos if given else None
    if bool((window == far).all()):
        return Found(causal, q_pos)
    for try_sink in (torch.zeros_like(sink), sink.masked_fill(window == far, 0)):
        fits = all(_is_shown(part, pos, (window, try_sink), causal=causal, given=given) for part in listed.chunks())
        if (
            fits
            and _full_fits(listed, pos, (window, try_sink), causal=causal, given=given)
            and bool((window > 0).all())
        ):
            return Found(causal, q_pos, _one_or_each(window), _one_or_each(try_sink))
    return None


def _one_or_each(values: Tensor) -> int | Tensor:
    return int(values[0]) if bool((values == values[0]).all()) else values.to(torch.int32)


def _distances(part: PairChunk, pos: Tensor, *, causal: bool, given: bool) -> tuple[Tensor, Tensor]:
    """Distances of slots from rows' positions, and which pairs positions and causality allow."""
    item = part.item.unsqueeze(1) if pos.shape[0] > 1 else 0
    head = part.head.unsqueeze(1) if pos.shape[1] > 1 else 0
    at = pos[item, head, part.rows.clamp(max=pos.shape[2] - 1)].long().unsqueeze(2)
    slots = part.slots.unsqueeze(1)
    allowed = part.real & (slots <= at) if causal else part.real
    return (at - slots).abs(), allowed & (at >= 0) if given else allowed


def _is_shown(part: PairChunk, pos: Tensor, limits: tuple[Tensor, Tensor], *, causal: bool, given: bool) -> bool:
    """Whether window and sink show all that is seen of partial blocks."""
    window, sink = (x[part.head].view(-1, 1, 1) for x in limits)
    distance, _ = _distances(part, pos, causal=causal, given=given)
    return not bool((part.seen & (distance >= window) & (part.slots.unsqueeze(1) >= sink)).any())


def _full_fits(listed: Listed, pos: Tensor, limits: tuple[Tensor, Tensor], *, causal: bool, given: bool) -> bool:
    """Whether the rule shows full blocks whole: their corners decide."""
    block_q, block_k, seq_q, seq_k = listed.sizes
    batch, heads = listed.shape
    row, col = listed.full
    blocks_q = -(-seq_q // block_q)
    tail = torch.arange(blocks_q * block_q, device=pos.device).clamp(max=max(seq_q - 1, 0))
    tiles = pos[..., tail].long().view(*pos.shape[:2], blocks_q, block_q).expand(batch, heads, -1, -1)
    least, most = (x.reshape(-1)[row] for x in (tiles.amin(-1), tiles.amax(-1)))
    window, sink = (x[row // blocks_q % heads] for x in limits)
    last = ((col + 1) * block_k).clamp(max=seq_k) - 1
    # The first slot that the sink does not show.
    first = torch.maximum(col * block_k, sink)
    fits = (first > last) | ((most - first < window) & (causal | (last - least < window)))
    fits &= (last <= least) if causal else torch.ones_like(fits)
    return bool((fits & (least >= 0) if given else fits).all())
