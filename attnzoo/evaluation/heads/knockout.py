"""What a model still does without some of its heads: beside as many others, drawn at random.

Passkeys ask whether the model can copy what stands far back; a text, whether it can still speak. A set of heads that
matters for one and not for the other is told from any set of heads by the random ones.

Source: Wu et al. 2024, *Retrieval Head Mechanistically Explains Long-Context Factuality*, section 4 (arXiv:2404.15574).
Departures: outputs of heads are 0; random heads are never among those that were chosen.

Letters: T tokens, L layers, H query heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo.heads import HeadEdit, HeadScores, RetrievalCase, edited
from attnzoo.surgery.lowrank.calibration import evaluating
from attnzoo_kernels.errors import ConfigError

Head = tuple[int, int]
Progress = Callable[[str, int, int], None]

CONTROLS = 3
"""Sets of random heads."""


@dataclass(frozen=True)
class Knockout:
    """What a model does without some heads.

    Attributes:
        name: Which these are.
        heads: Each (layer, head).
        key_nll: Mean negative log-likelihood of passkeys' tokens, in nats.
        solved: Passkeys whose tokens are all the likeliest.
        asked: Passkeys.
        text_nll: Mean negative log-likelihood of a text's tokens, in nats.
    """

    name: str
    heads: tuple[Head, ...]
    key_nll: float
    solved: int
    asked: int
    text_nll: float


def read_ablate(text: str) -> int:
    """How many heads ``top:COUNT`` says.

    Raises:
        ConfigError: If it says something else.
    """
    word, _, number = text.partition(":")
    if word != "top" or not number.isdecimal() or int(number) < 1:
        raise ConfigError(f"ablate: expected top:COUNT, such as top:10, got {text!r}")
    return int(number)


def head_sets(scores: HeadScores, kind: str, count: int, *, seed: int = 0) -> dict[str, tuple[Head, ...]]:
    """No heads, those of the highest scores, and random sets of the others.

    Args:
        scores: Of all heads.
        kind: Which of them.
        count: Heads of a set.
        seed: Of the random ones; global random numbers are untouched.

    Raises:
        ConfigError: If there are not so many others.
    """
    best = tuple((one.layer, one.head) for one in scores.top(kind, min(count, scores.layers * scores.heads)))
    rest = [(layer, head) for layer in range(scores.layers) for head in range(scores.heads)]
    rest = [head for head in rest if head not in best]
    if len(rest) < count:
        raise ConfigError(
            f"ablate: expected at most {(len(rest) + len(best)) // 2} heads, so many again to compare with, got {count}"
        )
    found: dict[str, tuple[Head, ...]] = {"all heads": (), f"without the {count} best by {kind}": best}
    generator = torch.Generator().manual_seed(seed)
    for number in range(CONTROLS):
        drawn = torch.randperm(len(rest), generator=generator, device="cpu")[:count].tolist()
        found[f"without {count} others, set {number + 1}"] = tuple(rest[place] for place in sorted(drawn))
    return found


def knock_out(
    model: Any,
    sets: dict[str, tuple[Head, ...]],
    cases: Sequence[RetrievalCase],
    text: Tensor,
    progress: Progress | None = None,
) -> list[Knockout]:
    """What a model does without each set of heads.

    Args:
        model: It is left as it was.
        sets: Heads by the set's name.
        cases: Passkeys.
        text: A text, int64 ``[T]``.
        progress: Told of each set.
    """
    found = []
    with torch.no_grad(), evaluating(model):
        for done, (name, chosen) in enumerate(sets.items()):
            with edited(model, [HeadEdit(layer, head, ablate="zero") for layer, head in chosen]):
                answers = [
                    _said(model, torch.cat([case.ids, torch.tensor(case.tokens, device="cpu")]), len(case.ids))
                    for case in cases
                ]
                spoken = _said(model, text, 1)
            solved = sum(right for _, right in answers)
            key_nll = sum(nll for nll, _ in answers) / len(answers)
            found.append(Knockout(name, chosen, key_nll, solved, len(cases), spoken[0]))
            if progress is not None:
                progress("knock-outs", done + 1, len(sets))
    return found


def _said(model: Any, ids: Tensor, first: int) -> tuple[float, bool]:
    """The mean negative log-likelihood of the tokens from ``first`` on, and whether each is the likeliest."""
    ids = ids.to(model.device)
    logits = model(ids[None], use_cache=False).logits[0, first - 1 : -1].float()
    asked = ids[first:]
    nll = torch.nn.functional.cross_entropy(logits, asked)
    return float(nll), bool((logits.argmax(-1) == asked).all())
