"""What a variant says about replacing blocks of a pretrained model, and the building of replacements from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from attnzoo.base import registry
from attnzoo.base.config import AttentionConfig
from attnzoo.base.layer import AttentionLayer
from attnzoo.factory import create, get_config
from attnzoo.reporting.choices import check_known
from attnzoo.reporting.warn import silent, warn_caller
from attnzoo.surgery.hosts.block import warn_of_lengths
from attnzoo.surgery.hosts.families.known import block_of
from attnzoo.surgery.hosts.site import Site, within_window
from attnzoo.surgery.hosts.weights import FLOATING
from attnzoo.surgery.replacements.replacement import Replacement
from attnzoo_kernels.errors import ConversionError, UnsupportedError

OF_THE_SITE = frozenset(field.name for field in fields(AttentionConfig))
"""Fields of a configuration that the site decides: sizes, rotation, scale, causality."""


@runtime_checkable
class ModelChange(Protocol):
    """A change to a whole model that replacements by one variant need, such as tokens inserted at its input."""

    def make(self) -> None:
        """Makes the change. Everything that may fail has been checked when the object was built."""

    def undo(self) -> None:
        """Takes it back: the model is as it was, to the bit."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ReplacementSpec:
    """How a variant replaces blocks of a pretrained model.

    Attributes:
        defaults: The variant's options where the caller gives none, for a site.
        refused: Options that surgery does not take; those that the site decides are refused in any case.
        start: Gives the weights that the host does not have, and only those, their values; the layer is on the host's
            device and in its dtype, with the host's projections in place. The default leaves what building has made.
        warn: What a caller must know about a configuration, such as that it needs healing; ``None`` where it is the
            same function as the host's.
        by_slot: Whether the layer numbers tokens itself, so that the host's positions are only checked to be
            consecutive; else it rotates by the host's positions.
        slots_per_token: Slots that a replacement's cache has for each of the host's tokens.
        model_change: What happens to the model itself, built (not made) from the model and the configuration. It is
            made once, with the first replacement by this variant, and taken back with it.
        whole_model: Whether all blocks must be replaced at once, because the model's change reaches all of them.
        model_state: Prefixes of names in the model's ``state_dict`` that ``model_change`` adds; saved with adapters.
    """

    defaults: Callable[[Site], dict[str, Any]] = lambda site: {}
    refused: frozenset[str] = frozenset()
    start: Callable[[AttentionLayer], None] = lambda layer: None
    warn: Callable[[AttentionConfig], str | None] = lambda config: None
    by_slot: bool = False
    slots_per_token: Callable[[AttentionConfig], float] = lambda config: 1.0
    model_change: Callable[[nn.Module, AttentionConfig], ModelChange] | None = None
    whole_model: bool = False
    model_state: tuple[str, ...] = ()


def site_config(
    site: Site, module: nn.Module, variant: str, spec: ReplacementSpec, options: dict[str, Any]
) -> AttentionConfig:
    """The configuration of a replacement: sizes, rotation and scale of the site, options of the variant.

    Raises:
        ConfigError: If an option is unknown, refused, or does not fit.
    """
    config_class = get_config(variant)
    refuse_causality(site, module, variant)
    known = [field.name for field in fields(config_class) if field.name not in OF_THE_SITE | spec.refused]
    for name in options:
        check_known(name, known, f"options for {variant!r}")
    block = block_of(module)
    chosen = {**spec.defaults(site), **options}
    if site.window is not None:
        chosen |= within_window(site, chosen)
    return config_class(
        dim=site.width,
        num_heads=site.heads,
        num_kv_heads=site.kv_heads,
        head_dim=site.head_dim,
        causal=block.causal,
        bias=getattr(block.projections.get("q_proj"), "bias", None) is not None,
        rotary=block.rotary(),
        scale=block.scale,
        **chosen,
    )


def build_replacement(module: nn.Module, config: AttentionConfig, spec: ReplacementSpec) -> Replacement:
    """A replacement for a block, on its device, in its dtype and mode; the block is untouched."""
    warn_of_lengths(block_of(module))
    theirs = [p for p in module.parameters() if p.dtype in FLOATING]
    # What a variant deserves to have said about it in a converted model, its spec says.
    with silent():
        layer = create(config, device=theirs[0].device, dtype=theirs[0].dtype)
    replacement = Replacement(layer, module, by_slot=spec.by_slot, slots_per_token=spec.slots_per_token(config))
    spec.start(layer)
    trainable = any(p.requires_grad for p in theirs)
    for parameter in layer.parameters():
        parameter.requires_grad_(trainable)
    return replacement


def refuse_causality(site: Site, module: nn.Module, variant: str) -> None:
    """Raises where a block reads what comes behind too, and a variant cannot.

    Raises:
        UnsupportedError: If so.
    """
    reasons = against_causality(module, variant)
    if reasons:
        raise UnsupportedError(f"{site.path}: cannot be converted: {reasons[0]}", reasons)


def against_causality(module: nn.Module, variant: str) -> tuple[str, ...]:
    """Why a variant cannot take the place of a block that reads what comes behind too; empty where it can."""
    if block_of(module).causal or registry.variants[variant].causal_promise == "bidirectional-capable":
        return ()
    return (f"it is not causal, and {variant!r} chooses from the past of each token, which needs a causal block",)


def check_fit(site: Site, module: nn.Module, config: AttentionConfig) -> None:
    """Raises unless a recipe's configuration has the sizes of its site.

    Raises:
        ConversionError: If it has not.
    """
    sizes = (config.dim, config.num_heads, config.kv_heads, config.head_width)
    if sizes != (site.width, site.heads, site.kv_heads, site.head_dim) or config.causal != block_of(module).causal:
        raise ConversionError(f"recipe: config: expected one that fits {site.path}, got {config}")


def warn_of(configs: Iterable[AttentionConfig], spec: ReplacementSpec) -> None:
    """Warns the caller of what replacements of these configurations lose, once each."""
    for message in dict.fromkeys(spec.warn(config) for config in configs):
        if message is not None:
            warn_caller(message)


def spec_of(variant: str, specs: dict[str, ReplacementSpec], others: Sequence[str]) -> ReplacementSpec:
    """The spec of a variant.

    Raises:
        ConfigError: If no variant has this name.
        UnsupportedError: If it cannot replace blocks.
    """
    get_config(variant)
    if variant not in specs:
        names = ", ".join([*others, *sorted(set(specs) - set(others))])
        raise UnsupportedError(f"variant: expected one of {names}, got {variant!r}; it is not convertible")
    return specs[variant]


@contextmanager
def own_random_numbers(model: nn.Module) -> Iterator[None]:
    """Keeps what building layers draws from the caller's random numbers."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(device.index or 0 for device in devices)):
        yield
