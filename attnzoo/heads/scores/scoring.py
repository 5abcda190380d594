"""Scoring the heads of a model, by every method.

Letters: L layers, H query heads, G KV heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attnzoo.base.config import check_int
from attnzoo.heads.scores.head_scores import HeadScores
from attnzoo.heads.scores.repeated import (
    DUPLICATE,
    ECHO,
    INDUCTION,
    PREVIOUS,
    reordered,
    repeated_scores,
    repeated_tokens,
)
from attnzoo.heads.scores.retrieval_cases import RETRIEVAL, CaseResult, RetrievalCase, mean_over_cases, run_case
from attnzoo.heads.scores.scored_sites import scored_sites
from attnzoo.reporting.choices import check_choice
from attnzoo.surgery.capture import watched
from attnzoo.surgery.hosts.calls import AttentionCall
from attnzoo.surgery.hosts.families.known import block_of
from attnzoo.surgery.hosts.site import Site
from attnzoo.surgery.lowrank.calibration import evaluating
from attnzoo_kernels.errors import ConfigError

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""

RAZOR = "razor"

METHODS: dict[str, tuple[str, ...]] = {
    RAZOR: (INDUCTION, ECHO),
    INDUCTION: (INDUCTION,),
    ECHO: (ECHO,),
    PREVIOUS: (PREVIOUS,),
    DUPLICATE: (DUPLICATE,),
    RETRIEVAL: (RETRIEVAL,),
}
"""The kinds of scores that each method gives."""


def score_heads(
    model: Any,
    method: str = RAZOR,
    *,
    cases: Sequence[RetrievalCase] | None = None,
    length: int = 200,
    repeats: int = 4,
    batch: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
) -> HeadScores:
    """Scores every query head of a model.

    "razor", the default, is "induction" and "echo" in one forward over random tokens that are repeated; like "previous"
    and "duplicate" it needs no data, see :mod:`attnzoo.heads.scores.repeated`. "retrieval" needs prompts that the model
    can answer, see :mod:`attnzoo.heads.scores.retrieval_cases`. Whether a head stands above .3 says something; the
    order far below says nothing.

    Args:
        model: A model of a known family, in any dtype, on any device. It is left as it was.
        method: One of these words.
        cases: Prompts, for "retrieval".
        length: Tokens of one copy, for the other methods.
        repeats: Copies.
        batch: Sequences of random tokens, over which scores are a mean.
        seed: Of the random tokens; global random numbers are untouched.
        progress: Told of each layer or case.

    Returns:
        Scores between 0 and 1 by kind.

    Raises:
        ConfigError: If an argument does not fit, or the model solves no case.
        UnsupportedError: If a block does not read everything, is no block of the host's own, or is applied several
            times.
    """
    check_choice("method", method, METHODS)
    sites = scored_sites(model)
    about: dict[str, Any] = {"method": method}
    if method == RETRIEVAL:
        if not cases:
            raise ConfigError(
                f"cases: expected at least one for {method!r}, got {'none' if cases is None else cases!r}"
            )
        with torch.no_grad(), evaluating(model):
            results = _run_cases(model, sites, cases, progress)
        about |= {"cases": len(results), "solved": sum(result.solved for result in results)}
        return HeadScores({RETRIEVAL: mean_over_cases(results)}, sites[0].kv_heads, about)
    if cases is not None:
        raise ConfigError(f"cases: expected None, got some for {method!r}, which needs no data")
    for name, value, least in (("length", length, 2), ("repeats", repeats, 2), ("batch", batch, 1)):
        check_int(name, value, least)
    _check_positions(model, sites, length * repeats)
    ids = repeated_tokens(model, length=length, repeats=repeats, batch=batch, seed=seed)
    about |= {"length": length, "repeats": repeats, "batch": batch, "seed": seed}
    places: Tensor | None = None
    if method == DUPLICATE:
        ids, places = reordered(ids, length, seed=seed + 1)
    with torch.no_grad(), evaluating(model):
        found = scores_on(model, sites, ids, length, METHODS[method], progress=progress, places=places)
    return HeadScores(found, sites[0].kv_heads, about)


def _check_positions(model: Any, sites: Sequence[Site], tokens: int) -> None:
    """Raises where positions are learned, and are fewer than the tokens of a sequence.

    Raises:
        ConfigError: If so.
    """
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    rotates = any(block_of(model.get_submodule(site.path)).planes is not None for site in sites)
    if most is not None and tokens > most and not rotates:
        raise ConfigError(
            f"length: expected length * repeats of at most {most}, the positions that the model has, got {tokens}"
        )


def scores_on(
    model: Any,
    sites: Sequence[Site],
    ids: Tensor,
    length: int,
    kinds: Sequence[str],
    *,
    progress: Progress | None = None,
    places: Tensor | None = None,
) -> dict[str, Tensor]:
    """Scores ``[L, H]`` by kind on sequences that repeat themselves every ``length`` tokens.

    One forward, in which each layer's rows are looked at as it is called; nothing of a layer is kept but its scores.
    """
    rows: dict[str, list[Tensor]] = {kind: [] for kind in kinds}

    def see(site: Site, call: AttentionCall) -> None:
        seen = repeated_scores(call.q, call.k, length, scale=call.scale, kinds=kinds, places=places)
        for kind, found in seen.items():
            rows[kind].append(found.cpu())
        if progress is not None:
            progress("heads", site.layer + 1, len(sites))

    with watched(model, see, sites=sites):
        # Logits are of no use here.
        model.base_model(ids.to(model.device), use_cache=False)
    return {kind: torch.stack(found) for kind, found in rows.items()}


def _run_cases(
    model: Any, sites: Sequence[Site], cases: Sequence[RetrievalCase], progress: Progress | None
) -> list[CaseResult]:
    results: list[CaseResult] = []
    for done, case in enumerate(cases):
        results.append(run_case(model, sites, case))
        if progress is not None:
            progress("heads", done + 1, len(cases))
    return results
