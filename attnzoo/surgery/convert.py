"""Converting a model's attention blocks: look, check, prepare, and only then change anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from attnzoo.reporting.versions import check_transformers
from attnzoo.surgery.hosts.families.known import WITHOUT_TRANSFORMERS, block_of
from attnzoo.surgery.hosts.site import Site
from attnzoo.surgery.hosts.weights import type_name
from attnzoo.surgery.kinds import kind_for
from attnzoo.surgery.kinds.kind import Kind, Order
from attnzoo.surgery.lookalikes import refuse_unknown
from attnzoo.surgery.lowrank.calibration import Progress, Statistics
from attnzoo.surgery.report import ConversionReport
from attnzoo.surgery.sites import find
from attnzoo.surgery.transaction import make_changes
from attnzoo_kernels.errors import ConfigError


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
    :data:`attnzoo.surgery.replacements.REPLACEMENTS` put a layer of theirs in the block's place, round the block's own
    projections; their options are their configuration's fields.

    "heads" edits heads for good: ``edits`` are of :class:`attnzoo.heads.HeadEdit`; with ``fold=True`` they become part
    of the outputs' projections, which get a bias where an offset needs one.

    attnzoo's own layers, in anybody's model, become other layers of the zoo round the same projections: "mha", "s2",
    "moh", "longheads", "landmark", "rcmha", "lowrank_gqa", or "policy", whose ``new_cache`` follows the policy. What
    they read and remember is the new layer's alone.

    Of torch's own ``nn.MultiheadAttention``, wherever it stands, every conversion is to a
    :class:`attnzoo.MultiheadAttention` round the same weights: "mha", "s2", "longheads", "moh" or "rcmha"; ``dropout``
    is an option too, since only plain attention drops.

    Args:
        model: A model of a family that is known, see :func:`attnzoo.surgery.find`.
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
    sites = choose_sites(model, where)
    hosts = {site.host for site in sites}
    if not hosts <= WITHOUT_TRANSFORMERS:
        check_transformers()
    # Weights made in inference mode could never be trained.
    with torch.inference_mode(False):
        order = Order(
            model=model,
            sites=sites,
            variant=variant,
            options=options,
            calibration=calibration,
            progress=progress,
        )
        return convert_as(kind_for(variant, options, hosts), order)


def convert_as(kind: Kind, order: Order) -> ConversionReport:
    """Converts as a kind does it: all is prepared before anything is changed."""
    options = kind.completed(order.variant, order.options)
    changes = kind.prepare(replace(order, options=options))
    return make_changes(order.model, changes, order.variant, kind.told(options))


def choose_sites(model: nn.Module, where: Callable[[Site], bool] | None) -> list[Site]:
    """The attention blocks of a model that a caller wants.

    Raises:
        ConfigError: If there are none.
    """
    found = find(model)
    sites = [site for site in found if where is None or where(site)]
    if not found:
        refuse_unknown(model)
    if not sites:
        raise ConfigError(f"where: expected at least one of the {len(found)} sites of find(model), got none")
    return sites


def cache_bytes(model: nn.Module) -> int:
    """Bytes that the model's cache holds for each token, all attention blocks together.

    Raises:
        ConfigError: If the model has no attention blocks that are known.
    """
    sites = find(model)
    if not sites:
        refuse_unknown(model)
    values = sum(block_of(model.get_submodule(site.path)).cached_values() for site in sites)
    return values * next(model.parameters()).element_size()


def new_cache(model: nn.Module) -> Any:
    """An empty cache for a model of transformers, converted or not, that copies nothing when a token is added.

    The host's own growing cache joins all keys and values anew in every step. In this one they lie in buffers with
    room for a sixteenth more (32 tokens at least). It is a ``DynamicCache``, for ``generate(past_key_values=...)`` or
    calls of the model: cropping, beams and assisted decoding are as ever, and so are gradients, for which it copies.
    Layers with sliding windows are the host's own. Converted blocks take such layers by themselves.

    Args:
        model: A model of transformers that decodes with a ``DynamicCache``.

    Raises:
        ConfigError: If it has no configuration of transformers, or is an encoder with a decoder, which take two caches.
        UnsupportedError: If transformers is too old.
    """
    config = getattr(model, "config", None)
    if not callable(getattr(config, "get_text_config", None)):
        raise ConfigError(f"model: expected a model of transformers, got {type_name(model)}")
    check_transformers()
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(f"model: expected a decoder, got {type_name(model)}, an encoder with a decoder")
    # Importing the host's library is for callers who have one of its models.
    from attnzoo.surgery.hosts.caches.growing import growing_cache

    return growing_cache(config)
