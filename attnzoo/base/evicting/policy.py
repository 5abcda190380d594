"""A layer that reads what a policy lets caches hold: the rule that a block of somebody else's model follows.

Letters: G KV heads.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from attnzoo.base.config import AttentionConfig
from attnzoo.base.evicting.layer import EvictingLayer, static_retention
from attnzoo.base.evicting.plans import retained_plan
from attnzoo.base.layer import AttentionInputs, Heads, Plan, Step
from attnzoo.cache.held import HeldCache
from attnzoo.cache.kv_cache import Stream
from attnzoo.cache.pages.cache import PagedCache
from attnzoo.cache.policies.protocol import Policy
from attnzoo.cache.retention import Retention


class PolicyAttention(EvictingLayer):
    """Plain attention over what a policy holds; its plan is for queries, keys and values that something else made.

    Args:
        config: Its sizes.
        policy: Of one layer.

    Raises:
        ConfigError: If the policy does not fit the KV heads.

    Attributes:
        policy: Of one layer.
    """

    def __init__(self, config: AttentionConfig, policy: Policy) -> None:
        policy.check(1, config.kv_heads)
        super().__init__(config)
        self.policy = policy

    @classmethod
    def without_weights(cls, config: AttentionConfig, policy: Policy) -> PolicyAttention:
        """The same, whose weights take no memory."""
        with torch.device("meta"):
            return cls(config, policy)

    def with_kv_heads(self, groups: int) -> PolicyAttention:
        """The same policy, without weights, for another number of KV heads.

        Raises:
            ConfigError: If it does not fit them.
        """
        return self.without_weights(replace(self.config, num_kv_heads=groups), self.policy)

    def plan(self, step: Step, heads: Heads, inputs: AttentionInputs) -> Plan:
        """What the policy holds by place; everything where it has no such rule."""
        retention = self.policy.retention(inputs.k.shape[1])
        if retention is None:
            return super().plan(step, heads, inputs)
        return retained_plan(retention, inputs, step.offset)

    def retention(self, heads: int) -> Retention:
        """What the policy holds."""
        return static_retention(self.policy, heads)

    def held_cache(self, streams: dict[str, Stream], *, margin: int, **sizes: Any) -> HeldCache:
        """A cache that follows the policy: in place if it is static and nothing is offloaded, else in pages."""
        if self.policy.is_static and not streams["k"].offloaded:
            return super().held_cache(streams, margin=margin, **sizes)
        return PagedCache(streams, policy=self.policy, **sizes)

    @property
    def evicts(self) -> bool:
        """True: a policy's cache is made as it says, whatever it holds."""
        return True

    @property
    def margin(self) -> int:
        """The policy's slack."""
        return self.policy.slack

    def reads_as(self, other: EvictingLayer) -> bool:
        """Whether another layer follows the same policy."""
        if not isinstance(other, PolicyAttention):
            return False
        return other is self or (other.config == self.config and other.policy.equals(self.policy))
