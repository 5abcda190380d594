"""Layers that read no more than near tokens and those that a head keeps for ever, so that their caches may evict."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from attnzoo.base.config import check_flag
from attnzoo.base.decoding.step import TokenRow
from attnzoo.base.evicting.calls import EvictingInputs, attend_evicting
from attnzoo.base.layer import AttentionInputs, AttentionLayer, Heads, Plan, Step
from attnzoo.cache.evicting.cache import EvictingCache
from attnzoo.cache.evicting.retention import Retention
from attnzoo.cache.kv_cache import KVCache


class EvictingLayer(AttentionLayer):
    """A layer with ``new_cache(..., evict=True)``."""

    @abstractmethod
    def retention(self, heads: int) -> Retention:
        """What rows can read, for the KV heads that are held here, of which there are ``heads``."""

    @property
    def evicts(self) -> bool:
        """Whether there is anything that rows can read no more."""
        return not all(self.retention(self.config.kv_heads).full)

    def remember(self, step: Step, heads: Heads) -> AttentionInputs:
        """As every layer; a cache that evicts gives nothing back, and is written when the call has succeeded."""
        cache = step.cache
        if not isinstance(cache, EvictingCache):
            return super().remember(step, heads)
        q, k = self.rotate_rows(step, heads.q, heads.k)
        cache.stage({"k": k, "v": heads.v}, step.lengths)
        made = self.attention_inputs(step, q, k, heads.v)
        return EvictingInputs(**vars(made), cache=cache, lengths=step.lengths)

    def operate(self, inputs: AttentionInputs, plan: Plan) -> Tensor:
        """The operation; where keys stayed in a cache that evicts, over what it holds and what this call brings."""
        if not isinstance(inputs, EvictingInputs) or inputs.cache.bound == 0:
            return super().operate(inputs, plan)
        return attend_evicting(inputs, self.config.scale, self.impl)

    def attend_row(self, row: TokenRow) -> Tensor | None:
        """As every layer; a cache that evicts is read where it lies."""
        if not isinstance(row.cache, EvictingCache):
            return super().attend_row(row)
        q, k, v = self.project_row(row)
        return row.cache.attend_row(q, k, v, self.row_scale)

    def combine(self, step: Step, out: Tensor, plan: Plan) -> Tensor:
        """As every layer; then nothing can fail any more, and a cache that evicts is written."""
        result = super().combine(step, out, plan)
        if isinstance(step.cache, EvictingCache):
            step.cache.commit()
        return result

    def new_cache(
        self,
        batch: int,
        max_length: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        evict: bool = False,
    ) -> KVCache:
        """An empty cache for this layer.

        Args:
            batch: Items B.
            max_length: Tokens that fit, for each item.
            device: Where it lies; ``None`` means with the weights.
            dtype: Of its values, to which a call's values are rounded; ``None`` means the weights', and rounds nothing.
            evict: Whether to hold no more than can still be read: near tokens, a sink, the blocks that a head keeps,
                and everything for heads that read everything. Such a cache cannot be cropped.

        Raises:
            UnsupportedError: If the layer is not causal: earlier outputs would depend on later tokens.
            TypeError: If a number is no int, or ``evict`` no bool.
            ShapeError: If a number is out of range.
            ConfigError: If values of the dtype cannot be attended to.
        """
        check_flag("evict", evict)
        plain = super().new_cache(batch, max_length, device="meta" if evict else device, dtype=dtype)
        if not evict:
            return plain
        streams = self.streams()
        return EvictingCache(
            streams,
            retention=self.retention(streams["k"].heads),
            batch=batch,
            max_length=max_length,
            device=self.compute_device if device is None else device,
            dtype=dtype or self.compute_dtype,
            owner=(self._identity, self.config),
            rounds=dtype is not None,
        )
