"""Conversions of what is remembered by the caches of a model: a policy, and no weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from attnzoo.base.config import AttentionConfig
from attnzoo.base.evicting.policy import PolicyAttention
from attnzoo.cache.policies.known import Policy, policy_from
from attnzoo.reporting.choices import check_known
from attnzoo.reporting.warn import warn_caller
from attnzoo.surgery.hosts.attention_function import ReadPattern, pattern_of
from attnzoo.surgery.hosts.block import Need
from attnzoo.surgery.hosts.families.known import block_of
from attnzoo.surgery.hosts.site import GLOBAL, Site
from attnzoo.surgery.hosts.weights import type_name
from attnzoo.surgery.kinds.kind import REQUIRED, Kind, Order
from attnzoo.surgery.report import SiteReport
from attnzoo.surgery.sites import find
from attnzoo.surgery.transaction import Change
from attnzoo_kernels.errors import ConfigError, ConversionError

VARIANT = "policy"

NO_CACHE = "it is not causal, so that it has no cache, which a policy needs to rule its memory"


def policy_of(kind: Kind, order: Order) -> Policy:
    """The policy of an order, which has no other option and no calibration.

    Raises:
        ConfigError: If it is no policy, or there is another option.
    """
    order.refuse_calibration()
    for name in order.options:
        check_known(name, kind.options(order.variant), f"options for {order.variant!r}")
    policy = order.options.get("policy")
    if not isinstance(policy, Policy):
        raise ConfigError(f"policy: expected one of attnzoo.policies, got {type(policy).__name__}")
    return policy


class Remembering(Kind):
    """Blocks keep their weights; caches of the model remember what a policy says, and rows read what they remember."""

    word = "policy"
    need = Need.READING
    changes_weights = False

    def takes(self, variant: str, options: dict[str, Any]) -> bool:
        """Whether a policy is asked for."""
        return variant == VARIANT

    def options(self, variant: str) -> dict[str, Any]:
        """The policy, which has no default."""
        return {"policy": REQUIRED}

    def reasons(self, module: nn.Module, site: Site, variant: str) -> tuple[str, ...]:
        """As every reading; a policy stands beside no other rule, the block's own window among them."""
        found = list(super().reasons(module, site, variant))
        if not block_of(module).causal:
            found.append(NO_CACHE)
        if site.window is not None:
            own = f"it has a sliding window of its own ({site.window} tokens)"
            found.append(f"{own}, which needs a policy that holds what lies within it; {GLOBAL}")
        if pattern_of(module) is not None and not found:
            found.append("it follows a read pattern, which a policy would not; undo that conversion first")
        return tuple(found)

    def told(self, options: dict[str, Any]) -> dict[str, Any]:
        """The policy in words."""
        return {"policy": str(options["policy"])}

    def prepare(self, order: Order) -> list[Change]:
        """Patterns for sites, each with the policy of its layer."""
        policy = policy_of(self, order)
        self.refuse(order.model, order.sites, order.variant)
        layers = len(find(order.model))
        for site in order.sites:
            policy.check(layers, site.kv_heads)
        changes = [self._change(site, order.module(site), policy.of_layer(site.layer)) for site in order.sites]
        if any(_drops_the_sink(policy.of_layer(site.layer), site) for site in order.sites):
            warn_caller(f"{policy} without a sink: models that were trained without it lose the token they lean on")
        return changes

    def _change(self, site: Site, module: nn.Module, policy: Policy) -> Change:
        """The pattern of a site that follows the policy of its layer."""
        block = block_of(module)
        config = AttentionConfig(
            dim=site.width,
            num_heads=site.heads,
            num_kv_heads=site.kv_heads,
            head_dim=site.head_dim,
            rotary=None,
            scale=block.asked_scale,
        )
        pattern = ReadPattern(PolicyAttention.without_weights(config, policy), planes=block.planes, tables=block.tables)
        values = self.values(module)
        entry = {"path": site.path, "kind": self.word, "variant": VARIANT, "policy": policy.settings()}
        return Change(SiteReport(site, values, values), entry, pattern=pattern)

    def rebuild(self, model: nn.Module, site: Site, entry: dict[str, Any], beside: Mapping[str, Tensor]) -> Change:
        """The pattern that an entry of a recipe describes, with the policy's weights beside it."""
        module = model.get_submodule(site.path)
        self.refuse(model, [site], VARIANT)
        settings = entry.get("policy")
        if not isinstance(settings, Mapping):
            raise ConversionError(f"recipe: policy: expected its settings at {site.path}, got {settings!r}")
        return self._change(site, module, policy_from(settings, beside))

    def current(self, module: nn.Module, entry: dict[str, Any]) -> dict[str, Any]:
        """The entry, once it is sure that its policy stands.

        Raises:
            ConversionError: If it does not.
        """
        if _policy_of(module) is None:
            raise ConversionError(
                f"model: {entry['path']}: expected the policy that was put there, got a {type_name(module)} without one"
            )
        return entry

    def beside(self, module: nn.Module) -> dict[str, Tensor]:
        """The policy's weights."""
        policy = _policy_of(module)
        return {} if policy is None else policy.weights()


def _policy_of(module: nn.Module) -> Policy | None:
    pattern = pattern_of(module)
    return pattern.layer.policy if pattern is not None and isinstance(pattern.layer, PolicyAttention) else None


def _drops_the_sink(policy: Policy, site: Site) -> bool:
    found = policy.retention(site.kv_heads)
    return found is not None and not all(found.full) and found.sink == 0 and not policy.folds
