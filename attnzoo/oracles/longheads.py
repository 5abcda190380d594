r"""LongHeads: every head reads a few chunks of the past, moved together, one query of one head at a time.

Source: Lu et al. 2024, *LongHeads: Multi-Head Attention is Secretly a Long Context Processor* (arXiv:2402.10685); the
formulas are those of its published code, LuLuLuyi/LongHeads.

Letters: ``w`` tokens of a chunk, ``K`` slots; ``t`` a query's place among the real tokens of its sequence, ``c`` a
chunk, ``cur = t // w`` the query's own, ``u = s % w`` a key's offset in its chunk; ``R(p)`` the rotation to position p.

Decided where the sources leave it open:

- Positions are places among the real tokens; there are no other ones.
- A query that has fewer than K chunks reads them all; its own chunk is the last slot, whichever number that has, so
  that these rows are plain attention.
- Blocks of queries: ``block_q`` divides w, so that all rows of a block have the same own chunk and the same forced
  chunks {0, cur - 1, cur}. The block starts at a multiple of ``block_q`` among the sequence's places, however the
  sequence was cut into calls; its first query scores the chunks for all its rows; each row keeps its own position.
- ``chunk_rep="mean_key"`` is the mean of the chunk's keys after their rotation by the offset: the published formula
  with a chunk query of 0, whose weights are equal.
- Grouped heads: a query head has its own chunk keys (its own queries meet the group's keys) and its own choice, unless
  ``group_select`` sums the scores of the heads of a group.
- Among equal scores the earliest chunk wins.

The published code differs in two places (``official_quirks``). In a prefill a query that selects does not read itself.
A decoding step whose token completes a chunk counts this chunk as the last complete one, and uses a slot less.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attnzoo.oracles.mha import Recipe, each_sequence, rotate, separate


@dataclass(frozen=True, kw_only=True)
class Chunks:
    """Which chunks are read, and where they are moved.

    Attributes:
        size: Tokens in a chunk.
        slots: Chunks that a query reads, its own one included; at least 3.
        begin: First place whose query selects; those before it read everything. ``None`` means ``size * slots``.
        select: Whether each "token" selects, or the first one of a "block" for all of it.
        block_q: Queries in a block; divides the chunk.
        chunk_rep: "attention" is the two-step one of the paper, "mean_key" the mean of the rotated keys.
        group_select: Whether the query heads of a key head choose together.
        official_quirks: Whether to do as the published code does.
        prefilled: Published code: tokens of its one prefill, those after it being steps; ``None`` means all.
    """

    size: int = 256
    slots: int = 16
    begin: int | None = None
    select: Literal["token", "block"] = "token"
    block_q: int = 1
    chunk_rep: Literal["attention", "mean_key"] = "attention"
    group_select: bool = False
    official_quirks: bool = False
    prefilled: int | None = None


@dataclass(frozen=True)
class Selected:
    """A layer's result.

    Attributes:
        out: ``[B, T, C]``.
        chunks: Of each sequence, query head and real token: the chunks that it reads, ascending; of a query that does
            not select, all up to its own.
        chunk_keys: Of each sequence, ``[H, chunks, D]``, complete chunks alone.
    """

    out: Tensor
    chunks: list[list[list[tuple[int, ...]]]]
    chunk_keys: list[Tensor]


def chunk_key(q: Tensor, k: Tensor, v: Tensor, recipe: Recipe, chunks: Chunks) -> Tensor:
    r"""What stands for a chunk: ``q``, ``k``, ``v [w, D]`` of one head, not rotated, to ``[D]``.

    .. math:: O = softmax(\sigma R q (R k)^T) v, \quad \bar q = mean_u O_u, \quad
              \bar c = softmax(\sigma \bar q (R k)^T) R k

    with the offsets as positions, every token of the chunk seeing every other.
    """
    scale = 1.0 / math.sqrt(recipe.head_dim) if recipe.scale is None else recipe.scale
    offsets = torch.arange(len(k))
    q = rotate(q[:, None], offsets, recipe)[:, 0]
    k = rotate(k[:, None], offsets, recipe)[:, 0]
    if chunks.chunk_rep == "mean_key":
        return k.mean(0)
    outputs = torch.stack([torch.softmax(scale * (k @ q[u]), 0) @ v for u in range(len(q))])
    return torch.softmax(scale * (k @ outputs.mean(0)), 0) @ k


def select(scores: Tensor, last: int, chunks: Chunks, slots: int) -> tuple[int, ...]:
    """Chunk 0, chunk ``last`` and the best of those between them, ``slots`` in all, ascending.

    Args:
        scores: Of the chunks from 0 on, at least ``last`` many.
        last: The last complete chunk that is forced.
        chunks: The sizes; unused slots stay unused.
        slots: How many to choose.
    """
    between = sorted(range(1, last), key=lambda c: (-float(scores.detach()[c]), c))
    return tuple(sorted({0, last, *between[: slots - 2]}))


def reads(scores: Tensor, t: int, chunks: Chunks) -> tuple[tuple[int, ...], int, int]:
    """What the query at place t reads, by the scores of the complete chunks.

    Returns:
        The chunks, ascending; the query's position after the chunks were moved to slots 0, 1, ...; the first place
        that it does not read.
    """
    own, offset = divmod(t, chunks.size)
    begin = chunks.size * chunks.slots if chunks.begin is None else chunks.begin
    if t < begin:
        return tuple(range(own + 1)), t, t + 1
    step = chunks.prefilled is not None and t >= chunks.prefilled
    if chunks.official_quirks and step and offset == chunks.size - 1:
        found = select(scores, own, chunks, chunks.slots - 1)
        return found, (len(found) - 1) * chunks.size + offset, t + 1
    found = (own,)
    if own > 0:
        found = (*select(scores, own - 1, chunks, chunks.slots - 1), own)
    end = t if chunks.official_quirks and not step else t + 1
    return found, (len(found) - 1) * chunks.size + offset, end


def chosen(q: Tensor, keys: Tensor, recipe: Recipe, chunks: Chunks, h: int, t: int) -> tuple[tuple[int, ...], int, int]:
    r"""What the query of head h at place t reads; ``q [T, H, D]`` not rotated, ``keys [H, chunks, D]``.

    .. math:: score_c = q_t \cdot \bar c_c
    """
    group = recipe.num_heads // recipe.num_kv_heads
    mates = range(h // group * group, (h // group + 1) * group) if chunks.group_select else [h]
    asking = t // chunks.block_q * chunks.block_q if chunks.select == "block" else t
    scores = q.new_zeros(keys.shape[1])
    for mate in mates:
        scores = scores + keys[mate] @ q[asking, mate]
    return reads(scores, t, chunks)


def one_query(q: Tensor, k: Tensor, v: Tensor, recipe: Recipe, chunks: Chunks, read: tuple[int, int]) -> Tensor:
    """One row: ``q [D]``, and ``k``, ``v`` of the chunks that it reads, already side by side.

    Args:
        q: The query, not rotated.
        k: Keys ``[n, D]`` from slot 0 on, not rotated: the j-th lies at position j, slots being whole chunks.
        v: Values ``[n, Dv]``.
        recipe: The shared numbers.
        chunks: The sizes.
        read: The query's position, and how many keys there are.
    """
    position, count = read
    if count == 0:
        return v.new_zeros(v.shape[-1])
    scale = 1.0 / math.sqrt(recipe.head_dim) if recipe.scale is None else recipe.scale
    k = rotate(k[:, None], torch.arange(count), recipe)[:, 0]
    q = rotate(q[None, None], torch.tensor([position]), recipe)[0, 0]
    return torch.softmax(scale * (k @ q), 0) @ v


def longheads(
    x: Tensor, weights: Mapping[str, Tensor], recipe: Recipe, chunks: Chunks, *, key_padding: Tensor | None = None
) -> Selected:
    r"""Softmax attention over chosen chunks at the positions of their slots.

    From ``begin`` on a query reads chunk 0, the previous one, its own up to itself, and of the others the ``slots - 3``
    with the best scores. The chunk in slot r lies at positions ``r w + u``, the query at ``(slots - 1) w + t % w``.

    Args:
        x: Tokens ``[B, T, C]``.
        weights: ``q_proj``, ``k_proj``, ``v_proj``, ``o_proj``; values as wide as keys unless the mean key is used.
        recipe: The shared numbers; causal.
        chunks: Which chunks are read.
        key_padding: bool ``[B, T]``, true where a token is padding; chunks are counted among the real tokens.

    Raises:
        ValueError: If a block of queries does not divide the chunk, or the rows are not causal.
    """
    if not recipe.causal or (chunks.select == "block" and chunks.size % chunks.block_q):
        raise ValueError("chunks need causal attention and whole blocks of queries")
    found: list[list[list[tuple[int, ...]]]] = []
    all_keys: list[Tensor] = []
    project = separate(weights, recipe)
    size = chunks.size

    def one(tokens: Tensor, _: Tensor) -> Tensor:
        q, k, v = project(tokens)
        group = recipe.num_heads // recipe.num_kv_heads
        length = len(tokens)
        keys = q.new_zeros(recipe.num_heads, length // size, recipe.head_dim)
        spans = [slice(c * size, (c + 1) * size) for c in range(length // size)]
        if spans:
            rows = [
                [chunk_key(q[span, h], k[span, h // group], v[span, h // group], recipe, chunks) for span in spans]
                for h in range(recipe.num_heads)
            ]
            keys = torch.stack([torch.stack(row) for row in rows])
        all_keys.append(keys)
        found.append([])
        columns = []
        for h in range(recipe.num_heads):
            found[-1].append([])
            out = [v.new_zeros(0, v.shape[-1])]
            for t in range(length):
                read, position, end = chosen(q, keys, recipe, chunks, h=h, t=t)
                found[-1][-1].append(read)
                places = [s for c in read for s in range(c * size, min((c + 1) * size, end))]
                row = one_query(
                    q[t, h],
                    k[places, h // group],
                    v[places, h // group],
                    recipe=recipe,
                    chunks=chunks,
                    read=(position, len(places)),
                )
                out.append(row[None])
            columns.append(torch.cat(out))
        return torch.cat(columns, -1)

    out = each_sequence(x, weights, one, key_padding=key_padding)
    return Selected(out, found, all_keys)
