"""Conversions of what is read: a pattern on each block, and no weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.base.config import check_bool
from attnzoo.base.evicting.layer import EvictingLayer
from attnzoo.base.layer import AttentionLayer
from attnzoo.factory import create, get_config
from attnzoo.reporting.choices import check_known
from attnzoo.reporting.warn import warn_caller
from attnzoo.surgery.hosts.attention_function import ReadPattern, pattern_of
from attnzoo.surgery.hosts.block import Need
from attnzoo.surgery.hosts.families.known import block_of
from attnzoo.surgery.hosts.site import Site, within_window
from attnzoo.surgery.hosts.weights import type_name
from attnzoo.surgery.kinds.kind import Kind, Order, own_options
from attnzoo.surgery.report import SiteReport
from attnzoo.surgery.transaction import Change
from attnzoo_kernels.errors import ConfigError, ConversionError

READ_DEFAULTS: dict[str, dict[str, Any]] = {"mha": {}, "s2": {"sink_blocks": 1}}
"""Variants that change what is read, and what surgery starts from where it is not the layer's own default."""

READ_VARIANTS = tuple(READ_DEFAULTS)


class Reading(Kind):
    """Blocks keep their weights and follow the plans of a layer without any."""

    word = "read"
    need = Need.READING
    changes_weights = False

    def takes(self, variant: str, options: dict[str, Any]) -> bool:
        """Whether a variant changes what is read alone."""
        return variant in READ_DEFAULTS

    def options(self, variant: str) -> dict[str, Any]:
        """The options of a variant, by name, with their defaults."""
        return own_options(variant) | READ_DEFAULTS[variant] | {"evict": True}

    def completed(self, variant: str, options: dict[str, Any]) -> dict[str, Any]:
        """A caller's options with those that surgery starts from."""
        return {**READ_DEFAULTS[variant], **options}

    def prepare(self, order: Order) -> list[Change]:
        """Patterns for sites that keep their weights."""
        self.refuse(order.model, order.sites, order.variant)
        order.refuse_calibration()
        for name in order.options:
            check_known(name, self.options(order.variant), f"options for {order.variant!r}")
        if _drops_the_sink(order.variant, order.options):
            warn_caller(
                f"{order.variant} without a sink: models that were trained without it lose the token they lean on"
            )
        return [self._change(site, order.module(site), order.variant, order.options) for site in order.sites]

    def _change(self, site: Site, module: nn.Module, variant: str, options: dict[str, Any]) -> Change:
        pattern = read_pattern(module, site, variant, options)
        values = self.values(module)
        entry = {"path": site.path, "kind": self.word, "variant": variant, "options": options}
        return Change(SiteReport(site, values, values), entry, pattern=pattern)

    def rebuild(self, model: nn.Module, site: Site, entry: dict[str, Any], beside: Mapping[str, Tensor]) -> Change:
        """The pattern that an entry of a recipe describes."""
        module = model.get_submodule(site.path)
        pattern = read_pattern(module, site, entry["variant"], entry["options"])
        values = self.values(module)
        return Change(SiteReport(site, values, values), entry, pattern=pattern)

    def current(self, module: nn.Module, entry: dict[str, Any]) -> dict[str, Any]:
        """The entry, once it is sure that its pattern stands.

        Raises:
            ConversionError: If it does not.
        """
        if pattern_of(module) is None:
            raise ConversionError(
                f"model: {entry['path']}: expected the read pattern of {entry['variant']!r} that was put there, got a "
                f"{type_name(module)} without one"
            )
        return entry


def _drops_the_sink(variant: str, options: dict[str, Any]) -> bool:
    if variant == "s2":
        return bool(options["sink_blocks"] == 0)
    return bool(options.get("window")) and not options.get("sink")


def read_pattern(module: nn.Module, site: Site, variant: str, options: dict[str, Any]) -> ReadPattern:
    """What a site will read, and whether caches made for it evict.

    Raises:
        ConfigError: If there is nothing to evict where that is asked for.
    """
    own = {name: value for name, value in options.items() if name != "evict"}
    if variant == "mha":
        own |= within_window(site, own)
    layer = reading_layer(module, site, variant, own)
    evict = options.get("evict", True)
    check_bool("evict", evict)
    # A rule that counts from the first slot needs all slots that lie before those within the block's own window.
    keeps_all = site.window is not None and variant != "mha"
    if keeps_all:
        if "evict" in options and evict:
            raise ConfigError(
                f"evict: expected False for {variant!r} at {site.path}, which has a sliding window of its own "
                f"({site.window} tokens), got True"
            )
        evict = False
    evicts = isinstance(layer, EvictingLayer) and layer.evicts
    if "evict" in options and evict and not (evicts and layer.config.causal):
        reads = f"{variant!r} that reads everything" if layer.config.causal else "a block that is not causal"
        raise ConfigError(f"evict: expected False, or a window or shards, got True for {reads}")
    return ReadPattern(layer, evict, keeps_all=keeps_all)


def reading_layer(module: nn.Module, site: Site, variant: str, options: dict[str, Any]) -> AttentionLayer:
    """A layer without weights whose plans a site will follow."""
    block = block_of(module)
    config = get_config(variant)(
        dim=site.width,
        num_heads=site.heads,
        num_kv_heads=site.kv_heads,
        head_dim=site.head_dim,
        causal=block.causal,
        rotary=None,
        scale=block.asked_scale,
        **options,
    )
    with torch.device("meta"):
        return create(config)
