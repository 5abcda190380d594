"""Conversions of attnzoo's own layers, in anybody's model: another layer of the zoo round the same projections.

Nothing is called through an interface here: a layer plans and remembers by itself, so that another layer takes its
place in every case. Variants without weights of their own leave all names of the model's weights as they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from attnzoo.base.config import AttentionConfig
from attnzoo.base.layer import AttentionLayer
from attnzoo.cache.policies.known import Policy, policy_from
from attnzoo.factory import get_config
from attnzoo.reporting.choices import check_known
from attnzoo.reporting.warn import warn_caller
from attnzoo.surgery.hosts.block import Need
from attnzoo.surgery.hosts.families.known import block_of, weights_of
from attnzoo.surgery.hosts.projections import latent_like, with_kv_heads
from attnzoo.surgery.hosts.site import Site
from attnzoo.surgery.hosts.weights import type_name
from attnzoo.surgery.kinds.kind import REQUIRED, Kind, Order
from attnzoo.surgery.kinds.policy import NO_CACHE, policy_of
from attnzoo.surgery.kinds.policy import VARIANT as POLICY
from attnzoo.surgery.kinds.reading import READ_DEFAULTS
from attnzoo.surgery.kinds.replacing import options_in_place
from attnzoo.surgery.kinds.weights import VARIANT as LOW_RANK
from attnzoo.surgery.kinds.weights import Weights
from attnzoo.surgery.replacements import REPLACEMENTS, own_layers, spec
from attnzoo.surgery.report import SiteReport
from attnzoo.surgery.sites import find
from attnzoo.surgery.transaction import Change
from attnzoo_kernels.errors import AttnzooError, ConversionError, UnsupportedError


class OwnLayers(Kind):
    """Layers with weights of their own beside the projections.

    Attributes:
        variants: Which it converts to.
    """

    word = "own-layer"
    need = Need.REPLACING
    variants: ClassVar[tuple[str, ...]] = ("moh", "rcmha")

    def takes(self, variant: str, options: dict[str, Any]) -> bool:
        """False: in other hosts the same variants are converted to otherwise."""
        return False

    def options(self, variant: str) -> dict[str, Any]:
        """The options of a variant, by name, with their defaults."""
        return options_in_place(variant)

    def reasons(self, module: nn.Module, site: Site, variant: str) -> tuple[str, ...]:
        """As the layer says it, and whether the variant can read ahead where it must."""
        against = () if variant == POLICY else spec.against_causality(module, variant)
        return (*super().reasons(module, site, variant), *against)

    def prepare(self, order: Order) -> list[Change]:
        """Layers for sites."""
        known = self.options(order.variant)
        self.refuse(order.model, order.sites, order.variant)
        order.refuse_calibration()
        for name in order.options:
            check_known(name, known, f"options for {order.variant!r}")
        configs = [_config(order, site) for site in order.sites]
        _warn(configs)
        with spec.own_random_numbers(order.model):
            return [
                self._change(site, order.module(site), config)
                for site, config in zip(order.sites, configs, strict=True)
            ]

    def _change(self, site: Site, old: nn.Module, config: AttentionConfig) -> Change:
        new = own_layers.in_place_of(cast(AttentionLayer, old), config)
        if config.kind in REPLACEMENTS:
            REPLACEMENTS[config.kind].start(new)
        theirs = {id(p) for p in old.parameters()}
        trainable = any(p.requires_grad for p in old.parameters())
        for parameter in new.parameters():
            if id(parameter) not in theirs:
                parameter.requires_grad_(trainable)
        entry = {"path": site.path, "kind": self.word, "variant": config.kind, "config": config.to_dict()}
        return Change(SiteReport(site, self.values(old), self.values(new)), entry, module=new)

    def rebuild(self, model: nn.Module, site: Site, entry: dict[str, Any], beside: Mapping[str, Tensor]) -> Change:
        """The layer that an entry of a recipe describes."""
        self.refuse(model, [site], str(entry.get("variant")), weights_come=True)
        config = _stored_config(site, model.get_submodule(site.path), entry)
        with spec.own_random_numbers(model):
            return self._change(site, model.get_submodule(site.path), config)

    def current(self, module: nn.Module, entry: dict[str, Any]) -> dict[str, Any]:
        """The entry, with the layer's configuration as it is set now.

        Raises:
            ConversionError: If another layer stands there.
        """
        _refuse_other(module, entry)
        return {**entry, "config": getattr(module, "current_config", cast(Any, module.config)).to_dict()}


class OwnReading(OwnLayers):
    """Layers without weights of their own."""

    word = "own-read"
    changes_weights = False
    variants = ("mha", "s2", "longheads", "landmark")


class OwnPolicy(OwnLayers):
    """Layers whose caches follow a policy."""

    word = "own-policy"
    changes_weights = False
    variants = ("policy",)

    def options(self, variant: str) -> dict[str, Any]:
        """The policy, which has no default."""
        return {"policy": REQUIRED}

    def reasons(self, module: nn.Module, site: Site, variant: str) -> tuple[str, ...]:
        """As the layer says it; there must be a cache."""
        found = super().reasons(module, site, variant)
        return found if block_of(module).causal else (*found, NO_CACHE)

    def told(self, options: dict[str, Any]) -> dict[str, Any]:
        """The policy in words."""
        return {"policy": str(options["policy"])}

    def prepare(self, order: Order) -> list[Change]:
        """Layers for sites, each with the policy of its place."""
        policy = policy_of(self, order)
        self.refuse(order.model, order.sites, order.variant)
        for site in order.sites:
            policy.check(len(find(order.model)), site.kv_heads)
        return [self._follow(site, order.module(site), policy.of_layer(site.layer)) for site in order.sites]

    def _follow(self, site: Site, old: nn.Module, policy: Policy) -> Change:
        new = own_layers.remembering(cast(AttentionLayer, old), policy)
        entry = {"path": site.path, "kind": self.word, "variant": "policy", "policy": policy.settings()}
        return Change(SiteReport(site, self.values(old), self.values(new)), entry, module=new)

    def rebuild(self, model: nn.Module, site: Site, entry: dict[str, Any], beside: Mapping[str, Tensor]) -> Change:
        """The layer that an entry of a recipe describes, with the policy's weights beside it."""
        settings = entry.get("policy")
        if not isinstance(settings, Mapping):
            raise ConversionError(f"recipe: policy: expected its settings at {site.path}, got {settings!r}")
        return self._follow(site, model.get_submodule(site.path), policy_from(settings, beside))

    def current(self, module: nn.Module, entry: dict[str, Any]) -> dict[str, Any]:
        """The entry, once it is sure that its policy stands.

        Raises:
            ConversionError: If it does not.
        """
        if not isinstance(module, own_layers.RememberingAttention):
            _refuse_other(None, entry)
        return entry

    def beside(self, module: nn.Module) -> dict[str, Tensor]:
        """The policy's weights."""
        return module.policy.weights() if isinstance(module, own_layers.RememberingAttention) else {}


class OwnWeights(Weights):
    """Layers of fewer KV heads, or with a latent."""

    word = "own-weights"
    keeps_class = False
    variants: ClassVar[tuple[str, ...]] = (LOW_RANK,)

    def takes(self, variant: str, options: dict[str, Any]) -> bool:
        """False: in other hosts the same variant is converted to otherwise."""
        return False

    def prepare(self, order: Order) -> list[Change]:
        """New layers for sites, solved from the calibration text where the method reads one."""
        if order.options.get("refit"):
            reason = "'refit' follows the layers of a decoder of transformers"
            raise UnsupportedError(f"refit: expected False for attnzoo's own layers, got True; {reason}", (reason,))
        return super().prepare(replace(order, options={**order.options, "refit": False}))

    def _module(self, old: nn.Module, found: Any) -> tuple[nn.Module, dict[str, Any]]:
        layer = cast(AttentionLayer, old)
        latent = getattr(found, "down", None)
        config = get_config(LOW_RANK)(
            **{
                **own_layers.site_fields(layer),
                "num_kv_heads": found.num_kv_heads,
                "latent_dim": None if latent is None else latent.shape[0],
            }
        )
        return own_layers.with_projections(layer, config, found), {"config": config.to_dict()}

    def rebuild(self, model: nn.Module, site: Site, entry: dict[str, Any], beside: Mapping[str, Tensor]) -> Change:
        """A layer of the sizes that an entry of a recipe says."""
        old = model.get_submodule(site.path)
        config: Any = _stored_config(site, old, {**entry, "variant": LOW_RANK}, kv_heads_change=True)
        weights = weights_of(old)
        rank = config.latent_dim
        found = with_kv_heads(weights, config.kv_heads) if rank is None else latent_like(weights, rank)
        module, _ = self._module(old, found)
        return Change(SiteReport(site, self.values(old), self.values(module)), entry, module=module)

    def current(self, module: nn.Module, entry: dict[str, Any]) -> dict[str, Any]:
        """The entry, once it is sure that its layer stands.

        Raises:
            ConversionError: If it does not.
        """
        _refuse_other(module, entry)
        return entry


OWN_KINDS: tuple[OwnLayers | OwnWeights, ...] = (OwnLayers(), OwnReading(), OwnPolicy(), OwnWeights())


def own_kind(variant: str) -> Kind:
    """The kind that converts layers to a variant.

    Raises:
        ConfigError: If no variant has this name.
        UnsupportedError: If layers are not converted to it.
    """
    for kind in OWN_KINDS:
        if variant in kind.variants:
            return kind
    get_config(variant)
    known = ", ".join(name for kind in OWN_KINDS for name in kind.variants)
    raise UnsupportedError(f"variant: expected one of {known}, got {variant!r}; it is not convertible")


def _config(order: Order, site: Site) -> AttentionConfig:
    """The configuration of a layer that takes another's place."""
    module = order.module(site)
    spec.refuse_causality(site, module, order.variant)
    found = REPLACEMENTS.get(order.variant)
    defaults = READ_DEFAULTS.get(order.variant, found.defaults(site) if found is not None else {})
    fields_of_site = own_layers.site_fields(cast(AttentionLayer, module))
    try:
        return get_config(order.variant)(**{**fields_of_site, **defaults, **order.options})
    except AttnzooError as error:
        raise type(error)(f"{site.path}: {error}") from error


def _stored_config(
    site: Site, module: nn.Module, entry: dict[str, Any], *, kv_heads_change: bool = False
) -> AttentionConfig:
    """The configuration of an entry of a recipe, once it is sure that it fits its place.

    Raises:
        ConversionError: If it does not.
    """
    stored = entry.get("config")
    if not isinstance(stored, Mapping):
        raise ConversionError(f"recipe: config: expected a configuration at {site.path}, got {stored!r}")
    config = get_config(entry["variant"]).from_dict({**stored, "kind": entry["variant"]})
    wanted = own_layers.site_fields(cast(AttentionLayer, module))
    got = {name: getattr(config, name) for name in wanted} | {"head_dim": config.head_width}
    got["num_kv_heads"] = wanted["num_kv_heads"] if kv_heads_change else config.kv_heads
    if got != wanted:
        raise ConversionError(f"recipe: config: expected one that fits {site.path}, got {config}")
    return config


def _refuse_other(module: nn.Module | None, entry: dict[str, Any]) -> None:
    """Raises where a layer is not the one that an entry of a recipe has put there.

    Raises:
        ConversionError: If so.
    """
    if not isinstance(module, AttentionLayer) or module.config.kind != entry["variant"]:
        raise ConversionError(
            f"model: {entry['path']}: expected the layer by {entry['variant']!r} that was put there, got a "
            f"{type_name(module)}"
        )


def _warn(configs: list[AttentionConfig]) -> None:
    """Says once what layers of these configurations lose."""
    messages: dict[str, None] = {}
    for config in configs:
        if config.kind == "landmark":
            every = getattr(config, "block_size", 0)
            messages[
                f"landmark: every {every}th token of the model's own sequence becomes a landmark, which ordinary "
                "tokens read no more; train the model so, with a token of its own in these places"
            ] = None
        elif config.kind in READ_DEFAULTS:
            messages |= dict.fromkeys(config.cautions)
        elif (message := REPLACEMENTS[config.kind].warn(config)) is not None:
            messages[message] = None
    for message in messages:
        warn_caller(message)
