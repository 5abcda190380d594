"""Retrieval heads: those that copy from a needle in the text what the model says next.

A case is a prompt with a needle in it that the model then repeats. Where the key that a head attends to most lies in
the needle, and its token is the one that the model generates from that row, the head has copied the needle's token at
that place. A head's score is the share of the needle that it has copied, as a mean over the cases that were solved.

Source: Wu et al. 2024, *Retrieval Head Mechanistically Explains Long-Context Factuality*, section 2
(arXiv:2404.15574); code: nightdessert/Retrieval_Head. Departures: a place of the needle counts once, however often it
is copied, as in the paper's formula, so that no score is above 1; the needle's place is given instead of searched for
by its words; a case is solved by more than half of the needle's tokens, not words.

Letters: T tokens of a prompt, n tokens of a needle, L layers, H query heads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo.heads.scores.attention_rows import attention_rows
from attnzoo.surgery import new_cache
from attnzoo.surgery.capture import watched
from attnzoo.surgery.hosts.calls import AttentionCall, cache_name
from attnzoo.surgery.hosts.site import Site
from attnzoo_kernels.errors import ConfigError

RETRIEVAL = "retrieval"

SOLVED = 0.5
"""A model has solved a case where it says more than this share of the needle's tokens."""


@dataclass(frozen=True, eq=False)
class RetrievalCase:
    """A prompt whose answer stands in it.

    Attributes:
        ids: The prompt, int64 ``[T]``, up to where the answer begins.
        needle: The first token of the needle, and the first one behind it.
        new_tokens: Tokens to generate; as many as the needle has by default.

    Raises:
        ConfigError: If there is no such place in the prompt, or the prompt is no row of ids.
    """

    ids: Tensor
    needle: tuple[int, int]
    new_tokens: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.ids, Tensor) or self.ids.dim() != 1 or self.ids.dtype != torch.int64:
            got = (
                f"{self.ids.dtype} {list(self.ids.shape)}" if isinstance(self.ids, Tensor) else type(self.ids).__name__
            )
            raise ConfigError(f"ids: expected int64 [T], got {got}")
        start, end = self.needle
        if not 0 <= start < end <= len(self.ids):
            raise ConfigError(f"needle: expected a place within {len(self.ids)} tokens, got {self.needle}")
        if self.new_tokens is not None and self.new_tokens < 1:
            raise ConfigError(f"new_tokens: expected at least 1, got {self.new_tokens}")

    @property
    def tokens(self) -> list[int]:
        """The needle's tokens."""
        found: list[int] = self.needle_ids.tolist()
        return found

    @property
    def needle_ids(self) -> Tensor:
        """The needle's tokens, int64 ``[n]``."""
        start, end = self.needle
        return self.ids[start:end]


@dataclass(frozen=True, eq=False)
class CaseResult:
    """What came of a case.

    Attributes:
        generated: What the model has said.
        copied: Which places of the needle each layer's heads have copied, each bool ``[H, n]``, by layer.
        solved: Whether the model has said enough of the needle.
    """

    generated: list[int]
    copied: dict[int, Tensor]
    solved: bool


def run_case(model: Any, sites: Sequence[Site], case: RetrievalCase) -> CaseResult:
    """Lets a model go on behind a prompt, greedily, and notes what its heads copy meanwhile."""
    ids = case.ids.to(model.device)
    attended: dict[int, Tensor] = {}

    def see(site: Site, call: AttentionCall) -> None:
        # The last row is the one that the next token comes from.
        last = call.q.shape[2] - 1
        for _, weights in attention_rows(call.q, call.k, last, scale=call.scale, slot=call.geometry.first):
            attended[site.layer] = weights[0, :, 0].argmax(-1)

    count = case.new_tokens or len(case.tokens)
    tokens = len(case.tokens)
    copied = {site.layer: torch.zeros(site.heads, tokens, dtype=torch.bool, device="cpu") for site in sites}
    options = {cache_name(type(model).forward): new_cache(model), "use_cache": True, "logits_to_keep": 1}
    generated: list[int] = []
    with watched(model, see, sites=sites):
        given = ids
        for _ in range(count):
            logits = model(given.unsqueeze(0), **options).logits
            given = logits[0, -1:].argmax(-1)
            generated.append(int(given))
            for layer, slots in attended.items():
                _note(copied[layer], slots.cpu(), case, generated[-1])
    return CaseResult(generated, copied, recall(case.tokens, generated) > SOLVED)


def _note(copied: Tensor, slots: Tensor, case: RetrievalCase, token: int) -> None:
    """Notes which heads have copied a token that was just generated, from the slots that they attended to ``[H]``."""
    start, _ = case.needle
    for head, slot in enumerate(slots.tolist()):
        place = slot - start
        if 0 <= place < copied.shape[1] and case.tokens[place] == token:
            copied[head, place] = True


def recall(expected: Sequence[int], given: Sequence[int]) -> float:
    """The share of the expected tokens that were given, each as often as it came (ROUGE-1 recall)."""
    return sum((Counter(expected) & Counter(given)).values()) / len(expected)


def mean_over_cases(results: Sequence[CaseResult]) -> Tensor:
    """Scores ``[L, H]`` over the cases that were solved.

    Raises:
        ConfigError: If none was.
    """
    solved = [result for result in results if result.solved]
    if not solved:
        raise ConfigError(f"cases: expected at least one that the model solves, got none of {len(results)}")
    shares = [torch.stack([found.float().mean(1) for found in result.copied.values()]) for result in solved]
    return torch.stack(shares).mean(0)
