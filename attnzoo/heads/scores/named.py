"""One function for each kind of score, by the name of what the heads do.

Letters: L layers, H query heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attnzoo.heads.scores.head_scores import HeadScores
from attnzoo.heads.scores.repeated import DUPLICATE, ECHO, INDUCTION, PREVIOUS
from attnzoo.heads.scores.retrieval_cases import RETRIEVAL, RetrievalCase
from attnzoo.heads.scores.scoring import Progress, score_heads


def echo(
    model: Any,
    length: int = 200,
    repeats: int = 4,
    seed: int = 0,
    *,
    batch: int = 1,
    progress: Progress | None = None,
) -> HeadScores:
    """How much each head attends to the same token in earlier copies of random tokens that are repeated, ``[L, H]``.

    Arguments and errors are those of :func:`attnzoo.heads.score_heads`, like those of all scores without data.
    """
    return score_heads(model, ECHO, length=length, repeats=repeats, seed=seed, batch=batch, progress=progress)


def induction(
    model: Any,
    length: int = 200,
    repeats: int = 4,
    seed: int = 0,
    *,
    batch: int = 1,
    progress: Progress | None = None,
) -> HeadScores:
    """How much each head attends to what came next in earlier copies of random tokens that are repeated, ``[L, H]``."""
    return score_heads(model, INDUCTION, length=length, repeats=repeats, seed=seed, batch=batch, progress=progress)


def previous(
    model: Any,
    length: int = 200,
    repeats: int = 4,
    seed: int = 0,
    *,
    batch: int = 1,
    progress: Progress | None = None,
) -> HeadScores:
    """How much each head attends to the token just before, among random tokens, ``[L, H]``."""
    return score_heads(model, PREVIOUS, length=length, repeats=repeats, seed=seed, batch=batch, progress=progress)


def duplicate(
    model: Any,
    length: int = 200,
    repeats: int = 4,
    seed: int = 0,
    *,
    batch: int = 1,
    progress: Progress | None = None,
) -> HeadScores:
    """How much each head attends to the same token where random tokens come again in another order, ``[L, H]``."""
    return score_heads(model, DUPLICATE, length=length, repeats=repeats, seed=seed, batch=batch, progress=progress)


def retrieval(model: Any, cases: Sequence[RetrievalCase], *, progress: Progress | None = None) -> HeadScores:
    """How much of needles in prompts each head copies into what the model says, ``[L, H]``.

    Arguments and errors are those of :func:`attnzoo.heads.score_heads`.
    """
    return score_heads(model, RETRIEVAL, cases=cases, progress=progress)
