"""Finding attention blocks in a model and converting them: look, build, check, and only then cut.

Letters: C model width, H query heads, G KV heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from attnzoo.base.config import AttentionConfig
from attnzoo.base.layer import AttentionLayer
from attnzoo.factory import create, get_config
from attnzoo.reporting.choices import check_known
from attnzoo.reporting.versions import check_transformers
from attnzoo.reporting.warn import warn_caller
from attnzoo.surgery.hosts import attention_function, llama, weights
from attnzoo.surgery.hosts.projections import LatentProjections
from attnzoo.surgery.hosts.site import Site
from attnzoo.surgery.lookalikes import refuse_unknown
from attnzoo.surgery.lowrank import factor
from attnzoo.surgery.lowrank.calibration import Progress, Statistics
from attnzoo.surgery.options import READ_DEFAULTS, READ_VARIANTS, options_of
from attnzoo.surgery.replacements import SEATS
from attnzoo.surgery.replacements import spec as seats
from attnzoo.surgery.replacements.replacement import LayerSeat
from attnzoo.surgery.replacements.spec import ModelChange
from attnzoo.surgery.report import ConversionReport, SiteReport
from attnzoo.surgery.sites import find, places_of
from attnzoo.surgery.transaction import Cut, make_cuts
from attnzoo_kernels.errors import ConfigError, ConversionError, UnsupportedError


def convert(
    model: nn.Module,
    variant: str,
    *,
    where: Callable[[Site], bool] | None = None,
    calibration: Iterable[Any] | Statistics | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> ConversionReport:
    """Converts a model's attention blocks in place.

    "mha" (identity, or ``window`` and ``sink``) and "s2" (its configuration's fields; ``sink_blocks`` is 1 here) change
    what is read, and no weight. "lowrank_gqa" changes weights: ``method`` "commuting" or "mean" with fewer
    ``num_kv_heads``, "expand" with more, "latent" with ``latent_dim``; "commuting" and "latent" need calibration, and
    take ``refit`` and ``gradients``, see :class:`attnzoo.surgery.lowrank.factor.Request`. The variants of
    :data:`attnzoo.surgery.replacements.SEATS` put a layer of theirs in the block's place, round the block's own
    projections; their options are their configuration's fields.

    Args:
        model: A model of the Llama family.
        variant: What to convert to.
        where: Which sites; all by default.
        calibration: Token ids int64 ``[B, T]`` or mappings for ``model(**batch)``, or statistics collected before.
        progress: Told how far it is.
        **options: Of the variant.

    Returns:
        What was done, with ``undo()``.

    Raises:
        ConfigError: If no site matches, or an option is unknown or does not fit. The model is unchanged.
        UnsupportedError: If a site cannot be converted so, or transformers is too old. The model is unchanged.
    """
    # Weights made in inference mode could never be trained.
    check_transformers()
    with torch.inference_mode(False):
        return _convert(model, variant, where, calibration, progress, options)


def _convert(
    model: nn.Module,
    variant: str,
    where: Callable[[Site], bool] | None,
    calibration: Iterable[Any] | Statistics | None,
    progress: Progress | None,
    options: dict[str, Any],
) -> ConversionReport:
    sites = _choose(model, where)
    if variant in READ_VARIANTS:
        _refuse(model, sites, "read")
        _no_calibration(variant, calibration)
        options = {**READ_DEFAULTS[variant], **options}
        return make_cuts(model, _reading_cuts(model, sites, variant, options), variant, options)
    if variant != "lowrank_gqa":
        return convert_to_seats(model, sites, variant, calibration, options)
    _refuse(model, sites, "weights")
    request = _request(options)
    _refuse_shared(model, sites, request)
    return make_cuts(model, _weight_cuts(model, sites, request, calibration, progress), variant, options)


def _refuse(
    model: nn.Module, sites: list[Site], to: Literal["read", "weights", "seat"], *, weights_come: bool = False
) -> None:
    """Raises unless blocks can be converted so; weights that a file brings afterwards need not be there."""
    for site in sites:
        module = model.get_submodule(site.path)
        reasons = llama.reasons_against(module, to=to)
        if to != "read" and not reasons and not weights_come:
            reasons = weights.reasons_against(module)
        if reasons:
            raise UnsupportedError(f"{site.path}: cannot be converted: {'; '.join(reasons)}", reasons)


def _no_calibration(variant: str, calibration: Iterable[Any] | Statistics | None) -> None:
    if calibration is not None:
        raise ConfigError(f"calibration: expected None, {variant!r} has no use for it")


def convert_to_seats(
    model: nn.Module,
    sites: list[Site],
    variant: str,
    calibration: Iterable[Any] | Statistics | None,
    options: dict[str, Any],
) -> ConversionReport:
    """Puts layers of a variant in the places of blocks; see :mod:`attnzoo.surgery.replacements`."""
    spec = seats.spec_of(variant, SEATS, (*READ_VARIANTS, "lowrank_gqa"))
    if spec.whole_model and len(sites) < len(everywhere := find(model)):
        raise ConfigError(f"where: expected all {len(everywhere)} sites, which {variant!r} needs, got {len(sites)}")
    _refuse(model, sites, "seat")
    if spec.model_change is not None:
        weights.check_embedding(model)
    _no_calibration(variant, calibration)
    modules = {site.path: model.get_submodule(site.path) for site in sites}
    configs = {site.path: seats.site_config(site, modules[site.path], variant, spec, options) for site in sites}
    seats.warn_of(configs.values(), spec)
    with seats.own_random_numbers(model):
        cuts = [_seat_cut(site, modules[site.path], configs[site.path], spec) for site in sites]
    cuts[0] = replace(cuts[0], change=_model_change(model, configs[sites[0].path], spec))
    return make_cuts(model, cuts, variant, options)


def _seat_cut(site: Site, module: nn.Module, config: AttentionConfig, spec: seats.SeatSpec) -> Cut:
    new = seats.build_seat(module, config, spec)
    recipe = {"path": site.path, "kind": "seat", "variant": config.kind, "config": config.to_dict()}
    return Cut(site, SiteReport(site, _values(module, site), _values(new, site)), recipe, module=new)


def _model_change(model: nn.Module, config: AttentionConfig, spec: seats.SeatSpec) -> ModelChange | None:
    """What a variant does to the model itself, unless its seats have done it before."""
    variants = {module.variant for module in model.modules() if isinstance(module, LayerSeat)}
    if spec.model_change is None or config.kind in variants:
        return None
    return spec.model_change(model, config)


def _refuse_shared(model: nn.Module, sites: list[Site], request: factor.Request) -> None:
    """A block that runs twice in a pass has two sets of inputs, which one set of statistics does not describe."""
    for site in sites:
        places = places_of(model, model.get_submodule(site.path))
        if request.needs_calibration and len(places) > 1:
            reason = f"it is applied at {', '.join(places)}, and method {request.method!r} calibrates one place"
            raise UnsupportedError(f"{site.path}: cannot be converted: {reason}", (reason,))


def _choose(model: nn.Module, where: Callable[[Site], bool] | None) -> list[Site]:
    found = find(model)
    sites = [site for site in found if where is None or where(site)]
    if not found:
        refuse_unknown(model)
    if not sites:
        raise ConfigError(f"where: expected at least one of the {len(found)} sites of find(model), got none")
    return sites


def _request(options: dict[str, Any]) -> factor.Request:
    for name in options:
        check_known(name, options_of("lowrank_gqa"), "options for 'lowrank_gqa'")
    if "method" not in options:
        raise ConfigError(f"method: expected one of {', '.join(factor.METHODS)}, got none")
    if options["method"] == "mean":
        warn_caller("method 'mean' is a baseline that ruins most models; 'commuting' is the conversion")
    return factor.Request(**options)


def _reading_cuts(model: nn.Module, sites: list[Site], variant: str, options: dict[str, Any]) -> list[Cut]:
    """Rules for sites that keep their weights."""
    for name in options:
        check_known(name, options_of(variant), f"options for {variant!r}")
    if (variant == "mha" and options.get("window") and not options.get("sink")) or (
        variant == "s2" and options["sink_blocks"] == 0
    ):
        warn_caller(f"{variant} without a sink: models that were trained without it lose the token they lean on")
    cuts = []
    for site in sites:
        layer = reading_layer(model.get_submodule(site.path), site, variant, options)
        values = _values(model.get_submodule(site.path), site)
        recipe = {"path": site.path, "kind": "read", "variant": variant, "options": options}
        cuts.append(Cut(site, SiteReport(site, values, values), recipe, rule=attention_function.Rule(layer)))
    return cuts


def reading_layer(module: nn.Module, site: Site, variant: str, options: dict[str, Any]) -> AttentionLayer:
    """A layer without weights whose plans a site will follow."""
    config = get_config(variant)(
        dim=site.width,
        num_heads=site.heads,
        num_kv_heads=site.kv_heads,
        head_dim=site.head_dim,
        rotary=None,
        scale=llama.scale_of(module),
        **options,
    )
    with torch.device("meta"):
        return create(config)


def _values(module: nn.Module, site: Site) -> int:
    if isinstance(module, llama.LatentSeat):
        return module.kv_down.out_features
    if isinstance(module, LayerSeat):
        return -(-module.bytes_per_token // module.q_proj.weight.element_size())
    return 2 * site.kv_heads * site.head_dim


def _weight_cuts(
    model: nn.Module,
    sites: list[Site],
    request: factor.Request,
    calibration: Iterable[Any] | Statistics | None,
    progress: Progress | None,
) -> list[Cut]:
    """New modules for sites that get other weights."""

    def build(site: Site, projections: Any) -> nn.Module:
        return llama.build(model.get_submodule(site.path), projections)

    solutions = factor.solve(
        model, sites, request, read=llama.read, build=build, calibration=calibration, progress=progress
    )
    cuts = []
    for site in sites:
        old, solution = model.get_submodule(site.path), solutions[site.path]
        found = solution.projections
        recipe: dict[str, Any] = {"path": site.path, "variant": "lowrank_gqa"}
        if isinstance(found, LatentProjections):
            llama.warn_of_lengths(old)
            module: nn.Module = llama.LatentSeat(old, found)
            recipe |= {"kind": "latent", "latent_dim": found.down.shape[0]}
            after = found.down.shape[0]
        else:
            module = llama.build(old, found)
            recipe |= {"kind": "weights", "num_kv_heads": found.num_kv_heads}
            after = 2 * found.num_kv_heads * site.head_dim
        report = SiteReport(site, _values(old, site), after, solution.kept, solution.error)
        cuts.append(Cut(site, report, recipe, module=module))
    return cuts


def apply_recipe(model: nn.Module, recipe: list[dict[str, Any]]) -> Callable[[], None]:
    """Gives a model the structure that a recipe describes; weights of changed blocks are to be loaded afterwards.

    Returns:
        The way back.

    Raises:
        ConversionError: If the recipe does not fit the model, which is left as it was.
    """
    check_transformers()
    done: list[ConversionReport] = []

    def undo() -> None:
        for report in reversed(done):
            report.undo()

    try:
        # One after the other: an entry builds on the block that the one before it has left.
        for entry in recipe:
            done.append(make_cuts(model, [_cut_again(model, entry)], "recipe", {}))
        _check_whole(model)
    except Exception:
        undo()
        raise
    return undo


def _check_whole(model: nn.Module) -> None:
    """Raises if a variant that needs all blocks has not got them."""
    blocks = [model.get_submodule(site.path) for site in find(model)]
    for variant in sorted({block.variant for block in blocks if isinstance(block, LayerSeat)} & set(SEATS)):
        seated = sum(isinstance(block, LayerSeat) and block.variant == variant for block in blocks)
        if SEATS[variant].whole_model and seated < len(blocks):
            raise ConversionError(f"recipe: expected seats of {variant!r} in all {len(blocks)} blocks, got {seated}")


def _cut_again(model: nn.Module, entry: dict[str, Any]) -> Cut:
    """The change that an entry of a recipe describes, with weights still to come."""
    path, kind = entry.get("path"), entry.get("kind")
    site = next((site for site in find(model) if site.path == path), None)
    if site is None:
        raise ConversionError(f"recipe: expected the path of an attention block, got {path!r}")
    old = model.get_submodule(site.path)
    values = _values(old, site)
    if kind == "read":
        rule = attention_function.Rule(reading_layer(old, site, entry["variant"], entry["options"]))
        return Cut(site, SiteReport(site, values, values), entry, rule=rule)
    if kind == "latent":
        width = _whole(entry, "latent_dim", [n + 1 for n in range(values)])
        seat = llama.LatentSeat(old, llama.latent_like(old, width))
        return Cut(site, SiteReport(site, values, width), entry, module=seat)
    if kind == "weights":
        heads = _whole(entry, "num_kv_heads", [n for n in range(1, site.heads + 1) if site.heads % n == 0])
        module = llama.build(old, llama.with_kv_heads(llama.read(old), heads))
        return Cut(site, SiteReport(site, values, values), entry, module=module)
    if kind == "seat":
        return _seat_again(model, site, entry)
    raise ConversionError(f"recipe: expected kind read, latent, weights or seat, got {kind!r}")


def _seat_again(model: nn.Module, site: Site, entry: dict[str, Any]) -> Cut:
    config = get_config(entry["variant"]).from_dict({**entry["config"], "kind": entry["variant"]})
    spec = seats.spec_of(config.kind, SEATS, (*READ_VARIANTS, "lowrank_gqa"))
    seats.check_fit(site, config)
    _refuse(model, [site], "seat", weights_come=True)
    with seats.own_random_numbers(model):
        cut = _seat_cut(site, model.get_submodule(site.path), config, spec)
    return replace(cut, change=_model_change(model, config, spec))


def _whole(entry: dict[str, Any], name: str, allowed: Sequence[int]) -> int:
    value = entry.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value not in allowed:
        raise ConversionError(
            f"recipe: {name}: expected an int that fits {entry['path']}, at most {allowed[-1]}, got {value!r}"
        )
    return value


def cache_bytes(model: nn.Module) -> int:
    """Bytes that the model's cache holds for each token, all attention blocks together.

    Raises:
        ConfigError: If the model has no attention blocks that are known.
    """
    sites = find(model)
    if not sites:
        refuse_unknown(model)
    values = sum(_values(model.get_submodule(site.path), site) for site in sites)
    return values * next(model.parameters()).element_size()


def recipe_of(model: nn.Module) -> list[dict[str, Any]]:
    """What has been done to a model and stands, in order; of seats, as they are set now."""
    entries = []
    for entry in model.__dict__.get("attnzoo_recipe", []):
        block = model.get_submodule(entry["path"])
        if entry["kind"] == "read" and attention_function.rule_of(block) is None:
            raise ConversionError(
                f"model: {entry['path']}: expected the rule of {entry['variant']!r} that was put there, got a "
                f"{weights.type_name(block)} without one"
            )
        seat = block if entry["kind"] == "seat" else None
        entries.append({**entry, "config": seat.current_config.to_dict()} if isinstance(seat, LayerSeat) else entry)
    return entries
