"""What a landmark replacement remembers in the cache of transformers: landmarks are there, the host counts none.

Letters: B batch, S slots that the host counts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnzoo.cache.kv_cache import KVCache
from attnzoo.surgery.hosts.caches.cache_layer import ReplacementCacheLayer, replacement_layer
from attnzoo.variants.landmark.tokens import length_with_landmarks
from attnzoo_kernels.errors import ShapeError


class LandmarkCacheLayer(ReplacementCacheLayer):  # type: ignore[no-untyped-call]
    """A replacement's memory with two counts: ``seen`` and ``real`` are those of the replacement, with landmarks.

    Attributes:
        block_size: Tokens in a block, the landmark included.
        given: Slots that the host counts, without landmarks.
        given_real: Which of them hold tokens, bool ``[B, S]``; ``None`` where all do.
    """

    def __init__(self, block_size: int) -> None:
        super().__init__()
        self.block_size = block_size
        self.given = 0
        self.given_real: Tensor | None = None

    @property
    def given_tokens(self) -> int | Tensor:
        """Tokens of each item, landmarks not counted: an int where all have as many as there are slots."""
        return self.given if self.given_real is None else self.given_real.sum(1)

    def count(self, tokens: int, real: Tensor | None) -> None:
        """Counts the host's slots of a call that has been made; ``real`` is of all slots."""
        self.given += tokens
        self.given_real = real

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Slots that a call's mask has for the host, and where they begin."""
        return self.given + query_length, 0

    def get_seq_length(self) -> int:
        """Slots held for the host, padding among them."""
        return self.given

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self.given = 0
        self.given_real = None

    def keep(self, memory: KVCache, left: int) -> None:
        """Keeps the first slots that the host counts, and the landmarks of what they hold."""
        self.given = left
        if self.given_real is not None:
            self.given_real = self.given_real[:, :left] if left else None
        tokens = self.given_tokens
        # Where padding stood among what is left matters to nobody: each item's tokens count from the left.
        if isinstance(tokens, Tensor):
            kept = length_with_landmarks(tokens, self.block_size)
            memory.crop(kept)
            self.seen = int(kept.max()) if len(kept) else 0
            self.real = torch.arange(self.seen, device=kept.device) < kept.unsqueeze(1) if self.seen else None
        else:
            self.seen = length_with_landmarks(tokens, self.block_size)
            self.real = None
            memory.crop(self.seen)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Takes the items of the chosen beams."""
        super().reorder_cache(beam_idx)
        if self.given_real is not None:
            self.given_real = self.given_real.index_select(0, beam_idx.to(self.given_real.device))


def landmark_layer(cache: Any, index: int, block_size: int) -> LandmarkCacheLayer:
    """The place of a landmark replacement in the host's cache.

    Raises:
        UnsupportedError: If the cache is none that grows, or moves its layers away.
        ShapeError: If keys and values of another model lie there.
    """
    found = replacement_layer(cache, index, lambda: LandmarkCacheLayer(block_size))
    if not isinstance(found, LandmarkCacheLayer) or found.block_size != block_size:
        raise ShapeError("past_key_values: expected an empty cache, or one that this model has filled")
    return found
