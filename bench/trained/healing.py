"""A model of as many KV heads as query heads, with fewer of them or with latents, before and after further training.

The unconverted model is trained further in the same way: whatever that brings is no merit of a conversion.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

from attnzoo import surgery
from attnzoo.surgery.hosts.families.known import weights_of, with_weights
from attnzoo.surgery.lowrank import merge_heads
from bench.trained.measure import CALIBRATION, scores
from bench.trained.results import ORIGINAL, HealedRow
from bench.trained.texts import Texts
from bench.trained.training import Schedule, train

VARIANT = "lowrank_gqa"

Progress = Callable[[str, int, int], None]
Change = Callable[[Any, surgery.Statistics], None]


def ways(site: surgery.Site) -> dict[str, Change]:
    """What is done to a model, by name: nothing, and for half and a quarter of the heads each method of one cache size.

    Args:
        site: Its sizes, any block's.
    """
    found: dict[str, Change] = {ORIGINAL: lambda model, known: None}
    for share in (2, 4):
        heads = site.kv_heads // share
        values = 2 * heads * site.head_dim
        to = f"{site.kv_heads} to {heads}"
        found[f"{to}: mean"] = _by_method(method="mean", num_kv_heads=heads)
        found[f"{to}: mean, groups chosen"] = lambda model, known, heads=heads: average_chosen(model, known, heads)
        found[f"{to}: commuting"] = _by_method(method="commuting", num_kv_heads=heads)
        found[f"{to}: latent {values}"] = _by_method(method="latent", latent_dim=values)
    return found


def _by_method(**options: Any) -> Change:
    def change(model: Any, known: surgery.Statistics) -> None:
        with warnings.catch_warnings():
            # That averaging ruins a model is what is measured.
            warnings.simplefilter("ignore")
            surgery.convert(model, VARIANT, calibration=None if options["method"] == "mean" else known, **options)

    return change


def average_chosen(model: Any, known: surgery.Statistics, heads: int) -> None:
    """Averages KV heads in the groups that "commuting" would merge, where "mean" takes neighbours."""
    for site in surgery.find(model):
        module = model.get_submodule(site.path)
        weights = weights_of(module)
        statistics = known.sites[site.path]
        groups = merge_heads.choose_groups(weights, statistics.loss_moment(), statistics.mean_fisher(), heads)
        parent, _, name = site.path.rpartition(".")
        setattr(model.get_submodule(parent), name, with_weights(module, merge_heads.mean_site(weights, groups)))


class Healing:
    """Conversions of one trained model, each trained further in the same way.

    Args:
        seed: Of the model; the further training has its own.
        model: A trained model, which is left as it was.
        texts: What it was trained on, and what is held out.
        schedule: The further training, with a number of steps.
        most: Windows that are scored, at most; all by default.
    """

    def __init__(self, seed: int, model: Any, texts: Texts, schedule: Schedule, most: int | None = None) -> None:
        self.seed = seed
        self.model = model
        self.texts = texts
        self.schedule = replace(schedule, seed=1000 + seed)
        context = int(model.config.max_position_embeddings)
        self.windows = texts.windows(context, most)
        (first, *_) = surgery.find(model)
        self.ways = ways(first)
        calibration = texts.calibration(context, min(CALIBRATION, most or CALIBRATION))
        self.known = surgery.collect(model, surgery.find(model), calibration)

    def rows(self, known: set[str], progress: Progress) -> Iterator[HealedRow]:
        """A row for each way that is not known yet."""
        for name, change in self.ways.items():
            if name in known:
                continue
            model = deepcopy(self.model)
            change(model, self.known)
            values = surgery.cache_bytes(model) // next(model.parameters()).element_size()
            yield HealedRow(seed=self.seed, name=name, values=values, nll=self._healed(name, model, progress))

    def _healed(self, name: str, model: Any, progress: Progress) -> dict[int, float]:
        """NLL after so many steps."""
        nll = {0: scores(model, self.windows)}
        steps = int(self.schedule.steps or 0)
        marks = {max(1, round(steps * share)) for share in (0.25, 1)}

        def look(done: int) -> None:
            if done in marks:
                model.eval()
                nll[done] = scores(model, self.windows)
                model.train()

        told = f"{name} (seed {self.seed})"
        train(model, self.texts, self.schedule, progress=progress, name=told, after=look)
        return nll
