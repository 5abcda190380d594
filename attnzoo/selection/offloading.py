"""A layer whose cache may keep keys and values in CPU memory, because its calls read chosen blocks alone."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attnzoo.base.config import check_flag
from attnzoo.base.layer import AttentionInputs, AttentionLayer, Plan
from attnzoo.cache.kv_cache import KVCache, Stream
from attnzoo.cache.policies.protocol import Policy
from attnzoo.selection.offloaded_blocks import fetch_blocks
from attnzoo_kernels.errors import UnsupportedError


class OffloadingLayer(AttentionLayer):
    """A variant whose calls fetch the blocks that they read from where the cache keeps them."""

    def operate(self, inputs: AttentionInputs, plan: Plan) -> Tensor:
        """The operation, on the listed blocks alone where keys and values are offloaded.

        Raises:
            UnsupportedError: If what a head reads is edited there: fetched blocks have other slots.
        """
        if inputs.offloaded:
            if inputs.edits is not None:
                reason = "keys lie in CPU memory, from where blocks alone are fetched; use a cache without offload"
                raise UnsupportedError(f"edits: reads cannot be edited: {reason}", (reason,))
            inputs, plan = fetch_blocks(inputs, plan)
        return super().operate(inputs, plan)

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
        """An empty cache for this layer; see :meth:`AttentionLayer.new_cache`.

        Args:
            batch: Items B.
            max_length: Tokens that fit, for each item.
            device: Where it lies; ``None`` means with the weights.
            dtype: Of its values; ``None`` means the weights'.
            policy: None: these layers choose by themselves what is read.
            offload: Whether keys and values stay in CPU memory. What the choice goes by lies on the device, and a call
                fetches the blocks that its rows read; the variant's page says how many those are. Not for training.

        Raises:
            TypeError: If ``offload`` is no bool, or ``policy`` no policy.
            UnsupportedError: If there is a policy.
        """
        self.check_policy(policy)
        check_flag("offload", offload)
        streams = self.streams()
        if offload:
            streams |= {name: replace(streams[name], offloaded=True) for name in ("k", "v")}
            streams |= self.streams_beside_offloaded(streams["k"])
        return self.make_cache(streams, batch, max_length, device=device, dtype=dtype)

    def streams_beside_offloaded(self, keys: Stream) -> dict[str, Stream]:
        """What stays on the device for each token or block because the keys do not."""
        return {}
