"""The caches of a layer: what they hold for each token, and making one that the layer takes for its own."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from attnzoo.base.config import AttentionConfig
from attnzoo.base.projections import COMPUTED
from attnzoo.base.weights import WeightedModule
from attnzoo.cache.kv_cache import KVCache, Stream
from attnzoo.cache.owner import Identity
from attnzoo.cache.policies.protocol import Policy
from attnzoo_kernels.errors import ConfigError, UnsupportedError


class CachingModule(WeightedModule):
    """A module that makes caches for its calls, and tells them from those of others."""

    cache_class: ClassVar[type[KVCache]] = KVCache

    config: AttentionConfig

    def __init__(self) -> None:
        super().__init__()
        self._identity = Identity()
        self._identity.taken = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._identity.taken = True

    def streams(self) -> dict[str, Stream]:
        """What a cache holds for each token."""
        width = self.config.head_width
        groups = self.config.kv_heads
        return {name: Stream(self.heads_held(f"{name}_proj", groups), width) for name in ("k", "v")}

    def new_cache(
        self,
        batch: int,
        max_length: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        policy: Policy | None = None,
    ) -> KVCache:
        """An empty cache for this layer.

        Args:
            batch: Items B.
            max_length: Tokens that fit, for each item.
            device: Where it lies; ``None`` means with the weights.
            dtype: Of its values, to which a call's values are rounded; ``None`` means the weights', and rounds nothing.
            policy: What the KV heads remember, for layers that take one; ``None`` remembers everything.

        Raises:
            UnsupportedError: If the layer is not causal: earlier outputs would depend on later tokens. Or if it takes
                no policy.
            TypeError: If ``policy`` is none.
            ConfigError: If values of the dtype cannot be attended to.
        """
        self.check_policy(policy)
        return self.make_cache(self.streams(), batch, max_length, device=device, dtype=dtype)

    def why_no_policy(self) -> str | None:
        """Why caches of this layer follow no policy; ``None`` where they may."""
        return "it remembers or reads otherwise than key by key"

    def check_policy(self, policy: Policy | None) -> None:
        """Raises if a cache of this layer cannot follow a policy.

        Raises:
            TypeError: If it is none.
            UnsupportedError: If the layer takes none.
        """
        if policy is None:
            return
        if not isinstance(policy, Policy):
            raise TypeError(f"policy: expected a Policy or None, got {type(policy).__name__}")
        reason = self.why_no_policy()
        if reason is not None:
            raise UnsupportedError(
                f"policy: expected None for {self.config.kind!r}, since {reason}; got {policy}", (reason,)
            )

    def make_cache(
        self,
        streams: dict[str, Stream],
        batch: int,
        max_length: int,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> KVCache:
        """An empty cache of given streams that this layer takes for its own; see :meth:`new_cache`."""
        if not self.config.causal:
            raise UnsupportedError("cache: expected a causal layer, got causal=False")
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype: expected a torch.dtype or None, got {type(dtype).__name__}")
        if dtype is not None and dtype not in COMPUTED:
            raise ConfigError(f"dtype: expected one of {', '.join(map(str, COMPUTED))}, got {dtype}")
        return self.cache_class(
            streams,
            batch=batch,
            max_length=max_length,
            device=self.compute_device if device is None else device,
            dtype=dtype or self.compute_dtype,
            owner=(self._identity, self.config),
            rounds=dtype is not None,
        )
