"""MiniLM read by a window and by shards: how far its embeddings move, and whose neighbours stay neighbours.

Beside each pattern stands a control: every token reads itself, the first token, and as many others at random as the
pattern has, in the model as it was, under a mask.

Letters: B batch, T tokens, n texts, C width.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from attnzoo import data, surgery

BATCH = 20
MOST = 254
"""Tokens of a text, but for the two that the tokenizer adds."""
NEAR = 10

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Pattern:
    """What is read.

    Attributes:
        name: Of the row.
        variant: Of the conversion.
        options: Of the conversion.
        visible: The same as a rule, ``[T, T]``, for the control.
    """

    name: str
    variant: str
    options: dict[str, Any]
    visible: Callable[[int], Tensor]


def _window(width: int) -> Callable[[int], Tensor]:
    def visible(tokens: int) -> Tensor:
        place = torch.arange(tokens)
        return ((place[:, None] - place).abs() < width) | (place < 1)

    return visible


def _shards(block: int, local: int, stride: int) -> Callable[[int], Tensor]:
    def visible(tokens: int) -> Tensor:
        place = torch.arange(tokens) // block
        beyond = ((place[:, None] - place).abs() - local + 1).clamp(min=0)
        return (beyond % stride == 0) | (place < 1)

    return visible


PATTERNS = (
    Pattern("window 32", "mha", {"window": 32, "sink": 1, "block_size": 16}, _window(32)),
    Pattern("window 8", "mha", {"window": 8, "sink": 1, "block_size": 16}, _window(8)),
    Pattern(
        "s2",
        "s2",
        {"block_size": 8, "local_blocks": 1, "vert_stride": 4, "sink_blocks": 1},
        _shards(8, 1, 4),
    ),
)


@dataclass(frozen=True)
class EmbeddingRow:
    """How one pattern does on one set of texts.

    Attributes:
        name: Of the pattern, or of the control beside it.
        texts: Which set.
        density: Pairs of tokens that are read, over all.
        cosine: Mean cosine to the embeddings of the model as it was.
        nearest: Share of texts whose nearest neighbour is the same.
        near: Share of the ten nearest neighbours that are the same, on average.
    """

    name: str
    texts: str
    density: float
    cosine: float
    nearest: float
    near: float


def sentences(count: int) -> list[str]:
    """The longest sentences of the two texts that ship."""
    found = [one for name in data.TEXTS for one in _sentences(data.text(name))]
    return sorted(sorted(set(found)), key=len, reverse=True)[:count]


def passages(tokenizer: Any, count: int, least: int = 100) -> list[str]:
    """Sentences one after the other, until a passage has so many tokens."""
    found: list[str] = []
    for name in data.TEXTS:
        held: list[str] = []
        for sentence in _sentences(data.text(name)):
            held.append(sentence)
            if len(tokenizer(" ".join(held)).input_ids) >= least:
                found.append(" ".join(held))
                held = []
    return found[:: max(1, len(found) // count)][:count]


def _sentences(text: str) -> list[str]:
    whole = re.sub(r"\s+", " ", text)
    return [one.strip() for one in re.split(r"(?<=[.!?])\s+", whole) if one.strip()]


@torch.no_grad()
def embed(model: Any, ids: Sequence[list[int]], visible: Callable[[int], Tensor] | None = None) -> Tensor:
    """Embeddings of texts ``[n, C]``: means over tokens, of length 1.

    Args:
        model: MiniLM, converted or not.
        ids: Of each text.
        visible: Which tokens read which, ``[T, T]``, under a mask of the model's own; everything by default.
    """
    found = torch.empty(len(ids), model.config.hidden_size)
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        longest = max(len(ids[index]) for index in chosen)
        tokens = torch.zeros(len(chosen), longest, dtype=torch.int64)
        real = torch.zeros(len(chosen), longest, dtype=torch.bool)
        for row, index in enumerate(chosen):
            tokens[row, : len(ids[index])] = torch.tensor(ids[index])
            real[row, : len(ids[index])] = True
        mask: Tensor = real.long()
        if visible is not None:
            mask = torch.stack([_padded(visible(len(ids[index])), longest) for index in chosen]).unsqueeze(1)
        hidden = model(input_ids=tokens, attention_mask=mask).last_hidden_state
        weight = real.unsqueeze(-1).to(hidden.dtype)
        found[chosen] = normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)
    return found


def _padded(visible: Tensor, length: int) -> Tensor:
    """A mask of more tokens, which read themselves alone."""
    whole = torch.eye(length, dtype=torch.bool)
    whole[: visible.shape[0], : visible.shape[1]] = visible
    return whole


def at_random(visible: Callable[[int], Tensor], seed: int) -> Callable[[int], Tensor]:
    """As many tokens for each row as a rule lets it read: itself, the first, and others at random."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(tokens: int) -> Tensor:
        counts = visible(tokens).sum(1)
        chance = torch.rand(tokens, tokens, generator=generator)
        chance[:, 0] = 2.0
        chance.fill_diagonal_(3.0)
        rank = chance.argsort(1, descending=True).argsort(1)
        return rank < counts[:, None]

    return drawn


def measure(model: Any, tokenizer: Any, count: int, progress: Progress) -> list[EmbeddingRow]:
    """All patterns and their controls, on sentences and on passages."""
    rows = []
    sets = {"sentences": sentences(count), "passages": passages(tokenizer, count)}
    for name, texts in sets.items():
        ids = [tokenizer(text, truncation=True, max_length=MOST + 2).input_ids for text in texts]
        before = embed(model, ids)
        for done, pattern in enumerate(PATTERNS):
            progress(name, done, len(PATTERNS))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                report = surgery.convert(model, pattern.variant, **pattern.options)
            after = embed(model, ids)
            report.undo()
            rows.append(_row(pattern.name, name, before, after, pattern.visible, ids))
            control = embed(model, ids, at_random(pattern.visible, done))
            rows.append(_row(f"{pattern.name}: at random", name, before, control, pattern.visible, ids))
        progress(name, len(PATTERNS), len(PATTERNS))
    return rows


def _row(
    name: str, texts: str, before: Tensor, after: Tensor, visible: Callable[[int], Tensor], ids: Sequence[list[int]]
) -> EmbeddingRow:
    seen = sum(int(visible(len(one)).sum()) for one in ids)
    every = sum(len(one) ** 2 for one in ids)
    old, new = (_nearest(x) for x in (before, after))
    same = [len(set(a) & set(b)) / NEAR for a, b in zip(old.tolist(), new.tolist(), strict=True)]
    return EmbeddingRow(
        name=name,
        texts=texts,
        density=seen / every,
        cosine=float((before * after).sum(-1).mean()),
        nearest=float((old[:, 0] == new[:, 0]).double().mean()),
        near=sum(same) / len(same),
    )


def _nearest(x: Tensor) -> Tensor:
    """The nearest other texts of each, ``[n, 10]``."""
    cosines = x @ x.T
    cosines.fill_diagonal_(-2.0)
    return cosines.topk(NEAR, dim=1).indices
