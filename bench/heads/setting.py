"""The model whose heads are looked at, what it reads, and heads that several experiments ask for."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from attnzoo import heads
from attnzoo.cli.models import encode, load_model, text_tokens
from attnzoo.evaluation.two_phase.tasks import Encode
from bench.heads.outcome import Head
from bench.policies.setting import tiny_model


@dataclass(frozen=True, eq=False)
class HeadSetting:
    """A model and what it reads.

    Attributes:
        model: A causal language model.
        name: What it is called.
        encode: From text to tokens, int64 ``[any]``, without special ones.
        text: Tokens of a text, int64 ``[any]``.
        quick: Whether the model is a tiny one with random weights, of which nothing can be found.
    """

    model: Any
    name: str
    encode: Encode
    text: Tensor
    quick: bool

    @property
    def few(self) -> int:
        """How many heads are few: ten of SmolLM2's 270."""
        return 2 if self.quick else 10

    @cached_property
    def sizes(self) -> tuple[int, int]:
        """Layers, and query heads of each."""
        places = heads.sites(self.model)
        return len(places), places[0].heads

    @cached_property
    def repeated(self) -> heads.HeadScores:
        """Induction and echo scores, of random tokens."""
        length = 20 if self.quick else 100
        return heads.score_heads(self.model, length=length)

    @property
    def induction(self) -> list[Head]:
        """The few best heads by induction, found without data."""
        return pairs(self.repeated.top("induction", self.few))

    def others(self, count: int, seed: int, without: Iterable[Head] = ()) -> list[Head]:
        """Random heads that are not among those that are to be told from them."""
        kept = set(without)
        layers, width = self.sizes
        free = [(layer, head) for layer in range(layers) for head in range(width) if (layer, head) not in kept]
        return sorted(random.Random(seed).sample(free, count))


def pairs(ranked: Iterable[heads.RankedHead]) -> list[Head]:
    """(layer, head) of ranked heads, in order."""
    return [(one.layer, one.head) for one in ranked]


def best(table: Tensor, count: int, *, largest: bool = True) -> list[Head]:
    """The heads of the largest figures of ``[L, H]``, or the smallest, best first."""
    order = table.flatten().argsort(descending=largest)[:count].tolist()
    return [divmod(place, table.shape[1]) for place in order]


def scaled(found: Sequence[Head], scale: float) -> list[heads.HeadEdit]:
    """Edits that scale heads."""
    return [heads.HeadEdit(layer, head, scale=scale) for layer, head in found]


def zeroed(found: Sequence[Head]) -> list[heads.HeadEdit]:
    """Edits that take heads away."""
    return [heads.HeadEdit(layer, head, ablate="zero") for layer, head in found]


def quick_setting() -> HeadSetting:
    """Two layers with random weights that read bytes."""
    text = torch.randint(97, 123, (600,), generator=torch.Generator().manual_seed(0))
    return HeadSetting(tiny_model(), "random weights", _bytes, text, True)


def full_setting() -> HeadSetting:
    """SmolLM2-135M-Instruct as shipped, in fp32."""
    model, tokenizer = load_model("smollm2", dtype="fp32")
    text = text_tokens(tokenizer, "botchan")
    return HeadSetting(model, "SmolLM2-135M-Instruct", partial(encode, tokenizer), text, False)


def _bytes(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.int64, device="cpu")
