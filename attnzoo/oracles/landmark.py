r"""Landmark attention: a block's last token decides how much the block weighs, one query of one head at a time.

Source: Mohtashami and Jaggi 2023, *Landmark Attention: Random-Access Infinite Context Length for Transformers*
(arXiv:2305.16300); retrieval and positions are those of its published code, epfml/landmark-attention.

Letters: ``t`` a query's place among the real tokens of its sequence; a landmark token ends its block, ``b`` is a block;
``own`` the query's block; ``N`` complete blocks in the cache when the query comes, ``k* = min(top_k, N)``; ``L_b`` the
extent of a block: from the position of its first token to that of the next block's; ``w`` the block length.

Decided where the sources leave it open:

- "soft" is one call over all tokens, "topk" a call for each token: then the cache holds the complete blocks before the
  query's own. A cache read by longer calls (``calls``) is the published inference; blocks of the running call are all
  visible in it, so that it depends on the cut.
- The published positions, in blocks of w tokens: with ``prefix = (N - k* - 1) w`` a landmark b is scored at
  ``prefix + m w + w - 1``, with m = 0 before the last k* blocks and else ``b - (N - k*) + 1``; the block of rank r
  among the chosen lies at ``prefix + r w``, and w further where it is one of the last k*. For blocks of any extent the
  same is said thus: for the score a block stays where it is if it is one of the last k*, else it ends where those
  begin; for the attention the chosen blocks lie side by side up to the query's first block outside the cache, those
  before the last k* one longest extent (of the N blocks) further back. A block moves as a whole, so that tokens keep
  their distances in it, also where landmarks take no position of their own (``positions``).
- Each query head retrieves for itself, also where heads share keys. Among equal scores the earliest block wins.
- A block without an ordinary token weighs nothing; it may be chosen. A query that sees no key comes out as 0.
- ``gate_mix`` m: a block weighs as if its landmark's score were ``m g + (1 - m) lse`` of its ordinary scores. The
  retrieval score knows no mix.
- The score of a landmark and its place in the attention may disagree, as published (where a recent block is not
  chosen); that is the rule, not a quirk.
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
class Landmarks:
    """How blocks are weighted and chosen.

    Attributes:
        block: Tokens in a block, its landmark included, where no mask says which tokens are landmarks.
        mode: "soft" reads all earlier blocks, "topk" the best.
        top_k: Blocks that "topk", or a call with a cache, chooses.
        gate_mix: How much the landmark decides, one number or ``[H]``; 0 is plain attention to ordinary tokens.
        calls: Published inference: tokens of each call; replaces ``mode``.
        shared_retrieval: Published inference with blocks kept elsewhere: one choice for all tokens of a call, which
            lets later tokens decide for earlier ones.
    """

    block: int = 51
    mode: Literal["soft", "topk"] = "soft"
    top_k: int = 5
    gate_mix: float | Tensor = 1.0
    calls: tuple[int, ...] | None = None
    shared_retrieval: bool = False


@dataclass(frozen=True)
class LandmarkResult:
    """A layer's result.

    Attributes:
        out: ``[B, T, C]``.
        blocks: Of each sequence, query head and real token: the blocks chosen from the cache, ascending.
    """

    out: Tensor
    blocks: list[list[list[tuple[int, ...]]]]


class Sequence:
    """One sequence: its rotated queries and keys, its values, and where its blocks lie."""

    def __init__(self, qkv: tuple[Tensor, Tensor, Tensor], positions: Tensor, marks: list[bool], recipe: Recipe):
        q, k, self.v = qkv
        self.q = rotate(q, positions, recipe)
        self.k = rotate(k, positions, recipe)
        self.recipe = recipe
        self.marks = marks
        self.scale = 1.0 / math.sqrt(recipe.head_dim) if recipe.scale is None else recipe.scale
        self.positions = [int(p) for p in positions]
        self.block = [sum(marks[:t]) for t in range(len(marks))]

    def tokens(self, b: int) -> list[int]:
        """The places of a block, its landmark included."""
        return [t for t, block in enumerate(self.block) if block == b]

    def start(self, b: int) -> int:
        """The position of a block's first token."""
        return self.positions[self.block.index(b)]

    def extent(self, b: int) -> int:
        """How far the next block's first token lies behind this one's."""
        return self.start(b + 1) - self.start(b)

    def scores(self, h: int, t: int, places: list[int], shift: int) -> Tensor:
        """Of the query of head h at place t with some keys, moved by ``shift`` positions."""
        g = h // (self.recipe.num_heads // self.recipe.num_kv_heads)
        k = self.k[places, g]
        if shift:
            k = rotate(k[:, None], torch.full((len(places),), shift), self.recipe)[:, 0]
        return self.scale * (k @ self.q[t, h])

    def landmark(self, b: int) -> list[int]:
        """The place of a block's landmark; nothing while the block is not complete."""
        return [t for t in self.tokens(b) if self.marks[t]]

    def retrieval(self, h: int, t: int, complete: int, last: int) -> Tensor:
        """Scores ``[complete]`` of the cached blocks' landmarks, those before the ``last`` ones moved up to them."""
        found = []
        for b in range(complete):
            near = b >= complete - last
            shift = 0 if near else self.start(complete - last) - self.extent(b) - self.start(b)
            found.append(self.scores(h, t, self.landmark(b), shift)[0])
        return torch.stack(found)

    def shifts(self, chosen: tuple[int, ...], complete: int, last: int) -> dict[int, int]:
        """How far each chosen block is moved in the attention."""
        gap = max((self.extent(b) for b in range(complete)), default=0)
        moved = {}
        end = self.start(complete)
        for b in reversed(chosen):
            end -= self.extent(b)
            moved[b] = end - (0 if b >= complete - last else gap) - self.start(b)
        return moved

    def row(self, h: int, t: int, visible: dict[int, int], mix: float | Tensor) -> Tensor:
        r"""One query of one head.

        .. math:: o = \sum_{s \in own} P(s) v_s + \sum_{b} P(b) \sum_{s \in b} softmax_{s \in b}(score_s) v_s,
                  \quad P = softmax(\{score_s\}_{own} \cup \{g_b\}_b)

        Args:
            h: Query head.
            t: The query's place.
            visible: Earlier blocks, and how far each is moved.
            mix: How much the landmark decides.
        """
        g = h // (self.recipe.num_heads // self.recipe.num_kv_heads)
        own = [s for s in self.tokens(self.block[t]) if s <= t and not self.marks[s]]
        logits = [self.scores(h, t, own, 0)]
        values = [self.v[own, g]]
        for b, shift in visible.items():
            ordinary = [s for s in self.tokens(b) if not self.marks[s]]
            if not ordinary:
                continue
            inner = self.scores(h, t, ordinary, shift)
            gate = self.scores(h, t, self.landmark(b), shift)
            logits.append(mix * gate + (1 - mix) * inner.logsumexp(0))
            values.append((torch.softmax(inner, 0) @ self.v[ordinary, g])[None])
        outer = torch.cat(logits)
        return torch.softmax(outer, 0) @ torch.cat(values) if len(outer) else self.v.new_zeros(self.v.shape[-1])


def best(scores: Tensor, count: int) -> tuple[int, ...]:
    """The indices of the largest scores, the lowest first among equals, ascending."""
    order = sorted(range(len(scores)), key=lambda b: (-float(scores.detach()[b]), b))
    return tuple(sorted(order[:count]))


def choices(sequence: Sequence, h: int, call: range, complete: int, landmarks: Landmarks) -> list[tuple[int, ...]]:
    """The cached blocks that each token of a call reads."""
    last = min(landmarks.top_k, complete)
    if complete == 0:
        return [()] * len(call)
    scores = [sequence.retrieval(h, t, complete, last) for t in call]
    if landmarks.shared_retrieval:
        shares = torch.stack([torch.softmax(score, 0) for score in scores])
        return [best(shares.amax(0), last)] * len(call)
    return [best(score, last) for score in scores]


def attend(
    qkv: tuple[Tensor, Tensor, Tensor], positions: Tensor, marks: list[bool], recipe: Recipe, landmarks: Landmarks
) -> tuple[Tensor, list[list[tuple[int, ...]]]]:
    """One sequence, ``[T, H, D]``, ``[T, G, D]``, ``[T, G, Dv]``, not rotated, to ``[T, H, Dv]`` and the chosen blocks.

    Raises:
        ValueError: If the calls are not as long as the sequence, or the rows are not causal.
    """
    sequence = Sequence(qkv, positions, marks, recipe)
    length = len(marks)
    calls = landmarks.calls
    if calls is None:
        calls = (length,) if landmarks.mode == "soft" else (1,) * length
    if sum(calls) != length or not recipe.causal:
        raise ValueError("landmarks need causal attention and calls that make up the sequence")
    out: list[Tensor] = []
    chosen: list[list[tuple[int, ...]]] = []
    for h in range(recipe.num_heads):
        mix = landmarks.gate_mix[h] if isinstance(landmarks.gate_mix, Tensor) else landmarks.gate_mix
        rows = [sequence.v.new_zeros(0, sequence.v.shape[-1])]
        taken = list[tuple[int, ...]]()
        first = 0
        for count in calls:
            call = range(first, first + count)
            complete = sum(marks[:first])
            found = choices(sequence, h, call, complete, landmarks)
            for t, blocks in zip(call, found, strict=True):
                visible = sequence.shifts(blocks, complete, min(landmarks.top_k, complete)) if blocks else {}
                visible |= dict.fromkeys(range(complete, sequence.block[t]), 0)
                rows.append(sequence.row(h, t, visible, mix)[None])
            taken += found
            first += count
        out.append(torch.cat(rows))
        chosen.append(taken)
    return torch.stack(out, 1), chosen


def landmark(
    x: Tensor,
    weights: Mapping[str, Tensor],
    recipe: Recipe,
    landmarks: Landmarks,
    *,
    is_landmark: Tensor | None = None,
    key_padding: Tensor | None = None,
    positions: Tensor | None = None,
) -> LandmarkResult:
    r"""Two softmaxes: inside each earlier block, and over the blocks' landmarks beside the tokens of the own block.

    Landmarks are never read as tokens; the query of a landmark reads its own block's tokens and the earlier blocks.

    Args:
        x: Tokens ``[B, T, C]``, the landmarks among them.
        weights: ``q_proj``, ``k_proj``, ``v_proj``, ``o_proj``.
        recipe: The shared numbers; causal.
        landmarks: How blocks are weighted and chosen.
        is_landmark: bool ``[B, T]``; by default every ``block``-th real token.
        key_padding: bool ``[B, T]``, true where a token is padding.
        positions: ``[T]`` or ``[B, T]``, integers, for the rotation alone.
    """
    found: list[list[list[tuple[int, ...]]]] = []
    project = separate(weights, recipe)

    def one(tokens: Tensor, places: Tensor) -> Tensor:
        marks = [t % landmarks.block == landmarks.block - 1 for t in range(len(tokens))]
        if is_landmark is not None:
            b = len(found)
            real = is_landmark[b] if key_padding is None else is_landmark[b][~key_padding[b]]
            marks = [bool(mark) for mark in real]
        out, chosen = attend(project(tokens), places, marks, recipe, landmarks)
        found.append(chosen)
        return out.flatten(1)

    out = each_sequence(x, weights, one, key_padding=key_padding, positions=positions)
    return LandmarkResult(out, found)
