"""Conversions that put a variant's layer in a block's place, round the block's own projections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from torch import Tensor, nn

from attnzoo.base.config import AttentionConfig
from attnzoo.factory import get_config
from attnzoo.surgery.hosts import weights
from attnzoo.surgery.hosts.block import Need
from attnzoo.surgery.hosts.site import GLOBAL, Site
from attnzoo.surgery.kinds.kind import Kind, Order, own_options
from attnzoo.surgery.kinds.reading import READ_DEFAULTS, READ_VARIANTS
from attnzoo.surgery.kinds.weights import VARIANT as LOW_RANK
from attnzoo.surgery.replacements import REPLACEMENTS, spec
from attnzoo.surgery.replacements.replacement import Replacement
from attnzoo.surgery.replacements.spec import ModelChange, ReplacementSpec
from attnzoo.surgery.report import SiteReport
from attnzoo.surgery.sites import find
from attnzoo.surgery.transaction import Change
from attnzoo_kernels.errors import ConfigError, ConversionError

_READ_BY_LAYERS = {"s2": ReplacementSpec(defaults=lambda site: {"sink_blocks": 1})}
"""What is read by a layer where a host has no interface through which its blocks could be told what to read."""

_SOME_SITE = Site("", "", 0, heads=8, kv_heads=8, head_dim=16, width=128)


def options_in_place(variant: str, **more: Any) -> dict[str, Any]:
    """The options of a variant whose layer is all that a site has: its own, what surgery starts from, and more."""
    refused = REPLACEMENTS[variant].refused if variant in REPLACEMENTS else frozenset()
    taken = {**own_options(variant), **READ_DEFAULTS.get(variant, {}), **more}
    return {name: default for name, default in taken.items() if name not in refused}


class Replacing(Kind):
    """Layers of a variant in the places of blocks; see :mod:`attnzoo.surgery.replacements`."""

    # The word that recipes have had from the first.
    word = "seat"
    need = Need.REPLACING

    def takes(self, variant: str, options: dict[str, Any]) -> bool:
        """True: this kind is asked last, and refuses by name what cannot replace blocks."""
        return True

    def options(self, variant: str) -> dict[str, Any]:
        """The options of a variant, by name, with their defaults."""
        found = _spec_of(variant)
        taken = own_options(variant) | found.defaults(_SOME_SITE)
        return {name: default for name, default in taken.items() if name not in found.refused}

    def prepare(self, order: Order) -> list[Change]:
        """Replacements for sites, and what the variant does to the model itself."""
        found = _spec_of(order.variant)
        if found.whole_model and len(order.sites) < len(everywhere := find(order.model)):
            raise ConfigError(
                f"where: expected all {len(everywhere)} sites, which {order.variant!r} needs, got {len(order.sites)}"
            )
        self.refuse(order.model, order.sites, order.variant)
        if found.model_change is not None:
            weights.check_embedding(order.model)
        order.refuse_calibration()
        configs = [
            spec.site_config(site, order.module(site), order.variant, found, order.options) for site in order.sites
        ]
        spec.warn_of([_beside_own(site, config) for site, config in zip(order.sites, configs, strict=True)], found)
        with spec.own_random_numbers(order.model):
            changes = [
                self._change(site, order.module(site), config, found)
                for site, config in zip(order.sites, configs, strict=True)
            ]
        changes[0] = replace(changes[0], model_change=_model_change(order.model, configs[0], found))
        return changes

    def reasons(self, module: nn.Module, site: Site, variant: str) -> tuple[str, ...]:
        """As the block says it; a block's own window is kept by variants that have one."""
        found = [*super().reasons(module, site, variant), *spec.against_causality(module, variant)]
        if site.window is not None and "window" not in {field.name for field in fields(get_config(variant))}:
            own = f"it has a sliding window of its own ({site.window} tokens)"
            found.append(f"{own}, which needs a variant that has one; {GLOBAL}")
        return tuple(found)

    def _change(self, site: Site, module: nn.Module, config: AttentionConfig, found: ReplacementSpec) -> Change:
        new = spec.build_replacement(module, config, found)
        entry = {"path": site.path, "kind": self.word, "variant": config.kind, "config": config.to_dict()}
        return Change(SiteReport(site, self.values(module), self.values(new)), entry, module=new)

    def rebuild(self, model: nn.Module, site: Site, entry: dict[str, Any], beside: Mapping[str, Tensor]) -> Change:
        """The replacement that an entry of a recipe describes."""
        config = get_config(entry["variant"]).from_dict({**entry["config"], "kind": entry["variant"]})
        found = _spec_of(config.kind)
        spec.check_fit(site, model.get_submodule(site.path), config)
        self.refuse(model, [site], config.kind, weights_come=True)
        with spec.own_random_numbers(model):
            change = self._change(site, model.get_submodule(site.path), config, found)
        return replace(change, model_change=_model_change(model, config, found))

    def current(self, module: nn.Module, entry: dict[str, Any]) -> dict[str, Any]:
        """The entry, with the layer's configuration as it is set now."""
        return {**entry, "config": module.current_config.to_dict()} if isinstance(module, Replacement) else entry

    def model_state(self, entry: dict[str, Any]) -> tuple[str, ...]:
        """Prefixes of what a variant adds to the model beside its blocks."""
        variant = entry.get("variant")
        return REPLACEMENTS[variant].model_state if variant in REPLACEMENTS else ()

    def check_model(self, model: nn.Module) -> None:
        """Raises if a variant that needs all blocks has not got them.

        Raises:
            ConversionError: If it has not.
        """
        blocks = [model.get_submodule(site.path) for site in find(model)]
        replaced = [block.variant for block in blocks if isinstance(block, Replacement)]
        for variant in sorted(set(replaced) & set(REPLACEMENTS)):
            count = replaced.count(variant)
            if REPLACEMENTS[variant].whole_model and count < len(blocks):
                raise ConversionError(
                    f"recipe: expected replacements by {variant!r} in all {len(blocks)} blocks, got {count}"
                )


def _beside_own(site: Site, config: AttentionConfig) -> AttentionConfig:
    """A configuration without the window that the block had before."""
    same = site.window is not None and getattr(config, "window", None) == site.window
    without: dict[str, Any] = {"window": None}
    return replace(config, **without) if same else config


def _spec_of(variant: str) -> ReplacementSpec:
    return spec.spec_of(variant, REPLACEMENTS | _READ_BY_LAYERS, (*READ_VARIANTS, LOW_RANK))


def _model_change(model: nn.Module, config: AttentionConfig, found: ReplacementSpec) -> ModelChange | None:
    """What a variant does to the model itself, unless its replacements have done it before."""
    variants = {module.variant for module in model.modules() if isinstance(module, Replacement)}
    if found.model_change is None or config.kind in variants:
        return None
    return found.model_change(model, config)
