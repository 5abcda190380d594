"""Layers whose caches may hold less than everything: by a policy, or no more than the layer's own rule can read."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnzoo.base.config import check_flag
from attnzoo.base.decoding.step import TokenRow
from attnzoo.base.evicting.calls import EvictingInputs, attend_evicting
from attnzoo.base.evicting.plans import retained_plan
from attnzoo.base.layer import AttentionInputs, AttentionLayer, Heads, Plan, Step, finalise
from attnzoo.base.steps import HeldInputs
from attnzoo.cache.evicting.cache import EvictingCache
from attnzoo.cache.held import HeldCache
from attnzoo.cache.kv_cache import KVCache, Stream
from attnzoo.cache.policies.protocol import Policy
from attnzoo.cache.retention import Retention
from attnzoo_kernels.errors import ConfigError, UnsupportedError


class PolicyLayer(AttentionLayer):
    """A layer with ``new_cache(..., policy=...)``: what the cache holds is then what rows read."""

    def why_no_policy(self) -> str | None:
        """Nothing is against one."""
        return None

    def held_inputs(
        self, inputs: AttentionInputs, cache: HeldCache, lengths: int | Tensor, score: Tensor | None = None
    ) -> HeldInputs:
        """A call's own queries, keys and values, whose past stays in a cache, and which the cache takes note of.

        Args:
            inputs: Rotated, left-aligned.
            cache: That cache.
            lengths: Rows of each item that are tokens.
            score: The score of each row ``[B, G, T]``, where the cache's policy needs one.
        """
        cache.stage({"k": inputs.k, "v": inputs.v}, lengths, score=score)
        if isinstance(cache, EvictingCache):
            return EvictingInputs(**vars(inputs), cache=cache, lengths=lengths)
        # Who has no pages need not import what reads them.
        from attnzoo.base.paged.calls import paged_inputs

        return paged_inputs(inputs, cache, lengths)

    def remember(self, step: Step, heads: Heads) -> AttentionInputs:
        """As every layer; a cache that evicts gives nothing back, and is written when the call has succeeded."""
        cache = step.cache
        if not isinstance(cache, HeldCache):
            return super().remember(step, heads)
        score = cache.scores_of(heads.q, heads.k, heads.v)
        q, k = self.rotate_rows(step, heads.q, heads.k)
        return self.held_inputs(self.attention_inputs(step, q, k, heads.v), cache, step.lengths, score)

    def plan_call(self, step: Step, heads: Heads, inputs: AttentionInputs) -> Plan:
        """As every layer; with a policy's cache, what that holds by place."""
        retention = step.cache.rule if isinstance(step.cache, HeldCache) else None
        if retention is None:
            return super().plan_call(step, heads, inputs)
        return finalise(retained_plan(retention, inputs, step.offset), inputs)

    def operate(self, inputs: AttentionInputs, plan: Plan) -> Tensor:
        """The operation; where keys stayed in a cache that evicts, over what it holds and what this call brings."""
        if isinstance(inputs, HeldInputs) and (inputs.cache.bound or not isinstance(inputs, EvictingInputs)):
            return self.attend_held(inputs)
        return super().operate(inputs, plan)

    def attend_held(self, inputs: HeldInputs) -> Tensor:
        """Attention over what a cache holds and over a call's own tokens ``[B, H, T, Dv]``, which takes no plan."""
        if isinstance(inputs, EvictingInputs):
            return attend_evicting(inputs, self.config.scale, self.impl)
        from attnzoo.base.paged.calls import attend_paged

        return attend_paged(inputs, self.config.scale, self.impl)

    def attend_row(self, row: TokenRow) -> Tensor | None:
        """As every layer; a cache that evicts is read where it lies."""
        if not isinstance(row.cache, EvictingCache):
            return super().attend_row(row)
        q, k, v = self.project_row(row)
        return row.cache.attend_row(q, k, v, self.row_scale)

    def may_compile_row(self, x: Tensor, cache: KVCache) -> bool:
        """As every layer; what a cache that evicts holds is no sequence that slots could be read from."""
        return not isinstance(cache, HeldCache) and super().may_compile_row(x, cache)

    def combine(self, step: Step, out: Tensor, plan: Plan) -> Tensor:
        """As every layer; then nothing can fail any more, and a cache that evicts is written."""
        result = super().combine(step, out, plan)
        if isinstance(step.cache, HeldCache):
            step.cache.commit()
        return result

    def new_cache(
        self,
        batch: int,
        max_length: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        policy: Policy | None = None,
        offload: bool = False,
    ) -> KVCache:
        """An empty cache for this layer.

        Args:
            batch: Items B.
            max_length: Tokens that fit, for each item.
            device: Where it lies; ``None`` means with the weights.
            dtype: Of its values, to which a call's values are rounded; ``None`` means the weights', and rounds nothing.
            policy: What the KV heads of this layer remember, and so what rows read; ``None`` remembers everything. As
                many tokens can be taken back as its ``slack`` says.
            offload: Whether keys and values that a policy holds stay in CPU memory. What it chooses by lies on the
                device; a decoding row fetches the pages that the policy reads, every other call all that is held.

        Raises:
            UnsupportedError: If the layer is not causal: earlier outputs would depend on later tokens. Or if it takes
                no policy.
            TypeError: If a number is no int, ``offload`` no bool, or ``policy`` is none.
            ShapeError: If a number is out of range.
            ConfigError: If values of the dtype cannot be attended to, the policy does not fit the KV heads, or
                there is none that says what an offloaded cache holds.
        """
        self.check_policy(policy)
        check_flag("offload", offload)
        if policy is None:
            if offload:
                raise ConfigError(
                    "offload: expected False without a policy, since every call would fetch all, got True"
                )
            return super().new_cache(batch, max_length, device=device, dtype=dtype)
        groups = self.streams()["k"].heads
        policy.check(1, groups)
        make: Callable[..., HeldCache]
        if policy.is_static and not offload:
            made = static_retention(policy, groups)
            make = partial(EvictingCache, retention=made, margin=policy.slack, rules=True)
        else:
            from attnzoo.cache.pages.cache import PagedCache

            make = partial(PagedCache, policy=policy)
        streams = {name: replace(stream, offloaded=offload) for name, stream in self.streams().items()}
        return self._held_cache(partial(make, streams), batch, max_length, device, dtype)

    def _held_cache(
        self,
        make: Callable[..., HeldCache],
        batch: int,
        max_length: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> HeldCache:
        """A cache that holds less than everything, once a plain one could be made."""
        super().new_cache(batch, max_length, device="meta", dtype=dtype)
        return make(
            batch=batch,
            max_length=max_length,
            device=self.compute_device if device is None else device,
            dtype=dtype or self.compute_dtype,
            owner=(self._identity, self.config),
            rounds=dtype is not None,
        )


def static_retention(policy: Policy, kv_heads: int) -> Retention:
    """What a policy of one layer holds by place.

    Raises:
        UnsupportedError: If what it holds does not follow from place alone.
    """
    if not policy.is_static:
        raise UnsupportedError(f"policy: expected one that holds by place, got {policy}")
    found = policy.retention(kv_heads)
    return Retention(block=policy.page, local=1, full=(True,) * kv_heads) if found is None else found


class EvictingLayer(PolicyLayer):
    """A layer with ``new_cache(..., evict=True)``: its own rule says what no later row reads."""

    @abstractmethod
    def retention(self, heads: int) -> Retention:
        """What rows can read, for the KV heads that are held here, of which there are ``heads``."""

    @property
    def evicts(self) -> bool:
        """Whether there is anything that rows can read no more."""
        return not all(self.retention(self.config.kv_heads).full)

    @property
    def margin(self) -> int | None:
        """Tokens that can be taken back from caches of this layer's rule; ``None`` leaves that to who makes them."""
        return None

    def reads_as(self, other: EvictingLayer) -> bool:
        """Whether another layer's rule is this one's."""
        return other is self or (type(other) is type(self) and other.config == self.config)

    def new_cache(
        self,
        batch: int,
        max_length: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        policy: Policy | None = None,
        offload: bool = False,
        evict: bool = False,
    ) -> KVCache:
        """An empty cache for this layer.

        Args:
            batch: Items B.
            max_length: Tokens that fit, for each item.
            device: Where it lies; ``None`` means with the weights.
            dtype: Of its values, to which a call's values are rounded; ``None`` means the weights', and rounds nothing.
            policy: See :meth:`PolicyLayer.new_cache`.
            offload: Likewise; beside a policy alone.
            evict: Whether to hold no more than can still be read: near tokens, a sink, the blocks that a head keeps,
                and everything for heads that read everything. Such a cache cannot be cropped.

        Raises:
            UnsupportedError: If the layer is not causal: earlier outputs would depend on later tokens. Or if it takes
                no policy.
            TypeError: If a number is no int, ``evict`` or ``offload`` no bool, or ``policy`` none.
            ShapeError: If a number is out of range.
            ConfigError: If values of the dtype cannot be attended to, or a policy does not fit.
        """
        check_flag("evict", evict)
        if not evict:
            return super().new_cache(batch, max_length, device=device, dtype=dtype, policy=policy, offload=offload)
        check_flag("offload", offload)
        if offload:
            raise ConfigError("offload: expected False beside evict=True, which holds little, got True")
        if policy is not None:
            raise ConfigError(f"evict: expected False beside a policy, which says what is held, got True and {policy}")
        streams = self.streams()
        make = partial(EvictingCache, streams, retention=self.retention(streams["k"].heads))
        return self._held_cache(make, batch, max_length, device, dtype)

    def held_cache(self, streams: dict[str, Stream], *, margin: int, **sizes: Any) -> HeldCache:
        """A cache for queries, keys and values that something else makes, which holds what this layer's rule reads.

        Args:
            streams: Keys "k" and values "v".
            margin: Tokens that may be taken back.
            **sizes: Of the cache.
        """
        return EvictingCache(streams, retention=self.retention(streams["k"].heads), margin=margin, **sizes)
