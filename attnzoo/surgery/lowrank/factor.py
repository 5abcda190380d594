"""Low-rank conversion of a model's attention sites: new weights for each, from calibration where a method needs it.

Letters: B batch, T tokens, C model width, H query heads, D head width, G KV heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from attnzoo.base.config import check_bool
from attnzoo.reporting.choices import check_choice
from attnzoo.surgery.hosts.projections import LatentProjections, Projections
from attnzoo.surgery.hosts.site import Site
from attnzoo.surgery.lowrank import merge_heads
from attnzoo.surgery.lowrank.calibration import Progress, SiteStatistics, Statistics, as_batches, collect, has_biases
from attnzoo.surgery.lowrank.grouping import consecutive
from attnzoo.surgery.lowrank.one_site import announce, collect_by_turns
from attnzoo.surgery.lowrank.refit import refit_sites
from attnzoo_kernels.errors import ConfigError

METHODS = ("commuting", "latent", "mean", "expand")
CALIBRATED = ("commuting", "latent")
"""Methods that read a calibration text."""


@dataclass(frozen=True, eq=False)
class Solution:
    """New weights for one site.

    Attributes:
        projections: The weights.
        kept: Share of the energy of keys and values that is kept, as the calibration text weighs it; ``None`` where
            nothing was promised.
        error: Relative error of the attention block's output on the calibration text, where it was measured.
    """

    projections: Projections | LatentProjections
    kept: float | None = None
    error: float | None = None


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of a low-rank conversion.

    Attributes:
        method: "commuting": merged KV heads whose rotation commutes with the merge, an ordinary grouped model;
            "latent": keys and values expanded from cached latents; "mean": averaged KV heads, a baseline that ruins
            most models; "expand": repeated KV heads, the same function.
        num_kv_heads: KV heads afterwards; all methods but "latent".
        latent_dim: Values cached for each token; "latent" alone.
        refit: Whether "commuting" corrects each site for the errors of those before it.
        gradients: Whether calibration runs backward too, which weighs errors by their effect on the loss.
        one_site_at_a_time: Whether calibration holds the statistics of one site at a time, and runs the text once for
            each; see :func:`attnzoo.surgery.statistics_bytes`.
    """

    method: str
    num_kv_heads: int | None = None
    latent_dim: int | None = None
    refit: bool = True
    gradients: bool = True
    one_site_at_a_time: bool = False

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)
        wanted, other = ("latent_dim", "num_kv_heads") if self.method == "latent" else ("num_kv_heads", "latent_dim")
        value = getattr(self, wanted)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{wanted}: expected an int from 1 with method {self.method!r}, got {value!r}")
        for name in ("refit", "gradients", "one_site_at_a_time"):
            check_bool(name, getattr(self, name))
        if self.one_site_at_a_time and not self.needs_calibration:
            raise ConfigError(
                f"one_site_at_a_time: expected False with method {self.method!r}, which has no calibration"
            )
        if getattr(self, other) is not None:
            raise ConfigError(f"{other}: expected None with method {self.method!r}, got {getattr(self, other)!r}")

    @property
    def needs_calibration(self) -> bool:
        """Whether the method reads a calibration text."""
        return self.method in CALIBRATED

    @property
    def refits(self) -> bool:
        """Whether each site is corrected for those before it."""
        return self.method == "commuting" and self.refit

    def check(self, site: Site) -> None:
        """Raises unless a site can be converted so.

        Raises:
            ConfigError: If the sizes do not divide, or do not shrink or grow as the method says.
        """
        heads = site.heads
        groups = site.kv_heads
        count = self.num_kv_heads
        if self.method == "latent":
            most = 2 * groups * site.head_dim
            if self.latent_dim is not None and self.latent_dim > most:
                raise ConfigError(
                    f"latent_dim: expected at most {most}, the values of {site.path}, got {self.latent_dim}"
                )
        elif count is not None and self.method == "expand":
            if count % groups or heads % count:
                raise ConfigError(f"num_kv_heads: expected a multiple of {groups} that divides {heads}, got {count}")
        elif count is not None and groups % count:
            raise ConfigError(f"num_kv_heads: expected a divisor of {groups}, the KV heads of {site.path}, got {count}")


def solve(
    model: nn.Module,
    sites: Sequence[Site],
    request: Request,
    *,
    read: Callable[[nn.Module], Projections],
    build: Callable[[Site, Projections], nn.Module],
    calibration: Iterable[Any] | Statistics | None = None,
    progress: Progress | None = None,
) -> dict[str, Solution]:
    """New weights for each site; the model is left as it was.

    Args:
        model: A causal language model.
        sites: Which of its attention blocks.
        request: What to make of them.
        read: Reads a module's weights.
        build: Makes a module of the host's kind, for running corrected sites before those after them are solved.
        calibration: Ids or batches, see :func:`~attnzoo.surgery.lowrank.calibration.as_batches`, or statistics
            collected before.
        progress: Told how far it is.

    Returns:
        By site path.

    Raises:
        ConfigError: If the request does not fit a site, or calibration is missing.
    """
    for site in sites:
        request.check(site)
    weights = {site.path: read(model.get_submodule(site.path)) for site in sites}
    if not request.needs_calibration:
        return {site.path: solve_site(weights[site.path], request) for site in sites}
    if calibration is None:
        raise ConfigError(f"calibration: expected token ids, which method {request.method!r} needs, got None")
    statistics = _statistics(model, sites, calibration, request, progress)
    if request.refits and request.num_kv_heads is not None:
        found = refit_sites(model, sites, request.num_kv_heads, statistics, read=read, build=build, progress=progress)
        return {path: Solution(*result) for path, result in found.items()}
    solutions = {}
    for done, site in enumerate(sites):
        solutions[site.path] = solve_site(weights[site.path], request, statistics.sites[site.path])
        if progress is not None:
            progress("solving", done + 1, len(sites))
    return solutions


def _statistics(
    model: nn.Module,
    sites: Sequence[Site],
    calibration: Iterable[Any] | Statistics,
    request: Request,
    progress: Progress | None,
) -> Statistics:
    if not isinstance(calibration, Statistics):
        batches = as_batches(calibration)
        by_turns = request.one_site_at_a_time
        announce(model, sites, gradients=request.gradients, one_site_at_a_time=by_turns, progress=progress)
        gather = collect_by_turns if by_turns else collect
        return gather(model, sites, batches, gradients=request.gradients, progress=progress)
    if request.one_site_at_a_time:
        raise ConfigError("one_site_at_a_time: expected False with statistics, which hold all sites already")
    for site in sites:
        calibration.check(site, biases=has_biases(model.get_submodule(site.path)))
    return calibration if request.gradients else calibration.without_gradients()


def solve_site(projections: Projections, request: Request, known: SiteStatistics | None = None) -> Solution:
    """New weights for one site by itself.

    Args:
        projections: Its weights.
        request: What to make of them; it is not asked whether it fits.
        known: Statistics of the site, for methods that read a calibration text.
    """
    count = request.num_kv_heads or projections.num_kv_heads
    if known is None:
        if request.method == "expand":
            return Solution(merge_heads.expand_site(projections, count))
        return Solution(merge_heads.mean_site(projections, consecutive(projections.num_kv_heads, count)))
    moment = known.loss_moment()
    fisher = known.mean_fisher()
    if request.method == "latent" and request.latent_dim is not None:
        return Solution(*merge_heads.latent_site(projections, moment, fisher, request.latent_dim))
    if count == projections.num_kv_heads:
        return Solution(projections, 1.0)
    groups = merge_heads.choose_groups(projections, moment, fisher, count)
    weights = merge_heads.HeadWeights.of(projections)
    return Solution(*merge_heads.merge_site(projections, weights, moment, fisher, groups))
