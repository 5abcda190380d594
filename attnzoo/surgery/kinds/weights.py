"""Low-rank conversions: other weights in blocks of the host's own class, or latents in their place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from torch import Tensor, nn

from attnzoo.reporting.choices import check_known
from attnzoo.reporting.warn import warn_caller
from attnzoo.surgery.hosts.block import Need, warn_of_lengths
from attnzoo.surgery.hosts.families.known import block_of, weights_of, with_weights
from attnzoo.surgery.hosts.projections import LatentProjections, Projections, latent_like, with_kv_heads
from attnzoo.surgery.hosts.site import Site
from attnzoo.surgery.kinds.kind import Kind, Order, default_of
from attnzoo.surgery.lowrank import factor
from attnzoo.surgery.replacements.latent import LatentReplacement
from attnzoo.surgery.report import SiteReport
from attnzoo.surgery.sites import places_of
from attnzoo.surgery.transaction import Change
from attnzoo_kernels.errors import ConfigError, ConversionError, UnsupportedError

VARIANT = "lowrank_gqa"


class Weights(Kind):
    """Blocks of the host's own class with other weights: merged, repeated or averaged KV heads."""

    word = "weights"
    need = Need.WEIGHTS
    keeps_class = True

    def takes(self, variant: str, options: dict[str, Any]) -> bool:
        """Whether a variant changes weights alone."""
        return variant == VARIANT

    def options(self, variant: str) -> dict[str, Any]:
        """The options of a low-rank conversion, by name, with their defaults."""
        return {field.name: default_of(field) for field in fields(factor.Request)}

    def prepare(self, order: Order) -> list[Change]:
        """New modules for sites that get other weights, solved from the calibration text where the method reads one."""
        request = self.request(order)

        def build(site: Site, projections: Projections) -> nn.Module:
            return with_weights(order.module(site), projections)

        solutions = factor.solve(
            order.model,
            order.sites,
            request,
            read=weights_of,
            build=build,
            calibration=order.calibration,
            progress=order.progress,
        )
        return [self.change(site, order.module(site), solutions[site.path]) for site in order.sites]

    def request(self, order: Order, *, weights_come: bool = False) -> factor.Request:
        """What is asked, once it is sure that it can be done.

        Args:
            order: Of a caller.
            weights_come: Whether the model's weights are still in their files.

        Raises:
            ConfigError: If an option is unknown or does not fit.
            UnsupportedError: If a site cannot be converted so.
        """
        self.refuse(order.model, order.sites, order.variant, weights_come=weights_come)
        for name in order.options:
            check_known(name, self.options(order.variant), f"options for {order.variant!r}")
        if "method" not in order.options:
            raise ConfigError(f"method: expected one of {', '.join(factor.METHODS)}, got none")
        if order.options["method"] == "mean":
            warn_caller("method 'mean' is a baseline that ruins most models; 'commuting' is the conversion")
        request = factor.Request(**order.options)
        _refuse_shared(order, request)
        for site in order.sites:
            request.check(site)
        return _without_refit(order, request)

    def change(self, site: Site, old: nn.Module, solution: factor.Solution) -> Change:
        """The change that gives a block solved weights."""
        module, sizes = self._module(old, solution.projections)
        entry = {"path": site.path, "variant": VARIANT, "kind": self.word, **sizes}
        report = SiteReport(
            site=site,
            values_before=self.values(old),
            values_after=self.values(module),
            kept=solution.kept,
            error=solution.error,
        )
        return Change(report, entry, module=module)

    def _module(self, old: nn.Module, found: Any) -> tuple[nn.Module, dict[str, int]]:
        """A block with these weights, and what a recipe says about its sizes."""
        return with_weights(old, found), {"num_kv_heads": found.num_kv_heads}

    def rebuild(self, model: nn.Module, site: Site, entry: dict[str, Any], beside: Mapping[str, Tensor]) -> Change:
        """A block of as many KV heads as an entry of a recipe says."""
        old = model.get_submodule(site.path)
        heads = _whole(entry, "num_kv_heads", [n for n in range(1, site.heads + 1) if site.heads % n == 0])
        module = with_weights(old, with_kv_heads(weights_of(old), heads))
        values = self.values(old)
        return Change(SiteReport(site, values, values), entry, module=module)


class Latents(Weights):
    """Replacements that cache one latent a token, from which keys and values of all heads are expanded."""

    word = "latent"
    keeps_class = False

    def takes(self, variant: str, options: dict[str, Any]) -> bool:
        """Whether latents are asked for."""
        return variant == VARIANT and options.get("method") == "latent"

    def _module(self, old: nn.Module, found: LatentProjections) -> tuple[nn.Module, dict[str, int]]:
        warn_of_lengths(block_of(old))
        return LatentReplacement(old, found), {"latent_dim": found.down.shape[0]}

    def rebuild(self, model: nn.Module, site: Site, entry: dict[str, Any], beside: Mapping[str, Tensor]) -> Change:
        """A latent of the width that an entry of a recipe says."""
        old = model.get_submodule(site.path)
        values = self.values(old)
        block = block_of(old)
        most = block.kv_heads * (block.head_dim + block.value_dim)
        width = _whole(entry, "latent_dim", [n + 1 for n in range(most)])
        module = LatentReplacement(old, latent_like(weights_of(old), width))
        return Change(SiteReport(site, values, self.values(module)), entry, module=module)


def _refuse_shared(order: Order, request: factor.Request) -> None:
    """A block that runs twice in a pass has two sets of inputs, which one set of statistics does not describe."""
    for site in order.sites:
        places = places_of(order.model, order.module(site))
        if request.needs_calibration and len(places) > 1:
            reason = f"it is applied at {', '.join(places)}, and method {request.method!r} calibrates one place"
            raise UnsupportedError(f"{site.path}: cannot be converted: {reason}", (reason,))


def _without_refit(order: Order, request: factor.Request) -> factor.Request:
    """A request that fits blocks that are not causal: sites there are not corrected one after the other.

    Raises:
        UnsupportedError: If that was asked for.
    """
    ahead = [site for site in order.sites if not block_of(order.module(site)).causal]
    if not ahead or not request.needs_calibration:
        return request
    if order.options.get("refit"):
        reason = "it is not causal, and 'refit' follows the layers of a decoder"
        raise UnsupportedError(f"{ahead[0].path}: cannot be converted: {reason}; use refit=False", (reason,))
    return replace(request, refit=False)


def _whole(entry: dict[str, Any], name: str, allowed: Sequence[int]) -> int:
    value = entry.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value not in allowed:
        raise ConversionError(
            f"recipe: {name}: expected an int that fits {entry['path']}, at most {allowed[-1]}, got {value!r}"
        )
    return value
