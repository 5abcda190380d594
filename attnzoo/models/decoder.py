"""A decoder: an embedding, blocks, a norm, and the embedding once more for the logits.

Letters: B batch, T tokens, C model width, V words, N new tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from attnzoo.base.config import check_int
from attnzoo.base.recording import record
from attnzoo.cache.kv_cache import KVCache
from attnzoo.cache.policies.protocol import Policy
from attnzoo.models.block import Block
from attnzoo.models.checks import check_stop_tokens, last_tokens, real_ids
from attnzoo.models.options import layer_configs
from attnzoo.models.sampling import Sampling
from attnzoo.variants.landmark.config import LandmarkConfig
from attnzoo.variants.landmark.tokens import insert_landmarks, length_with_landmarks, mean_embedding
from attnzoo_kernels.errors import ShapeError
from attnzoo_kernels.runtime.plain import is_readable

IGNORED = -100
"""The target of a token that no other follows."""


class CausalLM(nn.Module):
    """A causal language model, with attention of any variant in each of its layers.

    Where a layer is of the variant "landmark", a landmark is put behind every ``block_size - 1`` tokens, for all
    layers, and taken out before the logits: ids, padding, logits and lengths are those of the given tokens.

    Args:
        vocab_size: Words V.
        dim: Model width C.
        num_layers: How many blocks.
        num_heads: Query heads of each.
        variant: A variant's name, or one for each layer.
        hidden_dim: The width inside SwiGLU; ``None`` means 8/3 of C.
        **options: Fields of the variants' configurations; each layer takes those that its variant has.

    Raises:
        TypeError: If a variant's name is no string.
        ConfigError: If a name or an option is unknown, or a value does not fit.

    Example:
        >>> CausalLM(vocab_size=256, dim=32, num_layers=2, num_heads=4)(torch.randint(256, (1, 10))).shape
        torch.Size([1, 10, 256])
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        dim: int,
        num_layers: int,
        num_heads: int,
        variant: str | Sequence[str] = "s2",
        hidden_dim: int | None = None,
        **options: object,
    ) -> None:
        super().__init__()
        check_int("vocab_size", vocab_size, 1)
        configs = layer_configs(variant, num_layers, {"dim": dim, "num_heads": num_heads}, options)
        self.embedding = nn.Embedding(vocab_size, dim)
        # Logits are products with rows of the last norm, of length sqrt(C): they begin with a spread of about 1.
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        self.blocks = nn.ModuleList(Block(config, hidden_dim) for config in configs)
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        sizes = [config.block_size for config in configs if isinstance(config, LandmarkConfig)]
        self.landmark_every = sizes[0] if sizes else None
        self.landmark = nn.Parameter(mean_embedding(self.embedding.weight)) if sizes else None

    def forward(self, ids: Tensor, key_padding: Tensor | None = None, cache: Sequence[KVCache] | None = None) -> Tensor:
        """Logits ``[B, T, V]`` of what follows each token; at padding they mean nothing.

        Args:
            ids: Tokens, int64 ``[B, T]``. Padding may hold anything.
            key_padding: bool ``[B, T]``, true at padding, wherever it lies.
            cache: What :meth:`new_cache` made and earlier calls filled; this call's tokens are appended.

        Raises:
            TypeError: If an argument has the wrong type.
            ShapeError: If a shape or device does not fit, a token is none of the V, or the cache is full.
            ConfigError: If the cache belongs to another model.
        """
        ids = real_ids(ids, key_padding, self.embedding.num_embeddings)
        if cache is not None and len(cache) != len(self.blocks):
            raise ShapeError(f"cache: expected one for each of {len(self.blocks)} layers, got {len(cache)}")
        x = self.embedding(ids)
        marked = None
        if self.landmark is not None and self.landmark_every is not None:
            held = 0 if cache is None else cache[0].offset  # landmarks among them
            before = held - held // self.landmark_every
            marked = insert_landmarks(
                x, self.landmark, block_size=self.landmark_every, key_padding=key_padding, offset=before
            )
            x = marked.tokens
            key_padding = marked.key_padding
        for number, block in enumerate(self.blocks):
            x = block(x, key_padding, None if cache is None else cache[number])
        if marked is not None:
            x = marked.drop(x)
        return linear(self.norm(x), self.embedding.weight)

    def loss(self, ids: Tensor, key_padding: Tensor | None = None, *, aux_weight: float = 0.01) -> Tensor:
        """The mean cross entropy of all tokens behind a first one, padding skipped, and the layers' auxiliary losses.

        Args:
            ids: As in :meth:`forward`.
            key_padding: As there.
            aux_weight: The factor on the sum of the auxiliary losses.

        Raises:
            ShapeError: If no token follows another; and what :meth:`forward` raises.
        """
        real_ids(ids, key_padding, self.embedding.num_embeddings)
        target = next_tokens(ids, key_padding) if ids.shape[1] > 1 else None
        if target is None or (is_readable(ids) and bool((target == IGNORED).all())):
            raise ShapeError(f"ids: expected a text of two tokens or more, got {list(ids.shape)} without one")
        with record(self) as recording:
            logits = self(ids, key_padding).flatten(0, 1)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = cross_entropy(wide, target.flatten(), ignore_index=IGNORED)
        return loss + aux_weight * recording.aux_loss.to(loss.device)

    def new_cache(self, batch: int, max_length: int, *, policy: Policy | None = None) -> tuple[KVCache, ...]:
        """An empty cache for each layer.

        Args:
            batch: Items B.
            max_length: Tokens that fit, for each item, landmarks not counted.
            policy: What the KV heads remember, where all layers take one; ``None`` remembers everything.

        Raises:
            ConfigError: If the length does not fit.
            UnsupportedError: If a layer takes no policy.
        """
        check_int("max_length", max_length, 1)
        room = length_with_landmarks(max_length, self.landmark_every) if self.landmark_every else max_length
        layers = [cast(Block, block).attention for block in self.blocks]
        return tuple(layer.new_cache(batch, room, policy=policy) for layer in layers)

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop_tokens: Collection[int] = (),
        key_padding: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continues texts token by token, with a cache. Call ``model.eval()`` before.

        Args:
            ids: The texts, int64 ``[B, T]``, each of a token or more.
            max_new_tokens: How many tokens are added at most.
            temperature: What logits are divided by before a token is drawn; 0 takes the best one.
            top_k: How many of the most likely tokens may be drawn; ``None`` means all.
            top_p: Of those, the fewest most likely ones that together reach this probability; ``None`` means all.
            stop_tokens: Tokens that end a text.
            key_padding: bool ``[B, T]``, true at padding, on either side.
            generator: What draws, on the device of the ids.

        Returns:
            int64 ``[B, T + N]``: the ids as given, and behind all of them N new tokens. A text that has ended repeats
            its stop token; once all have, nothing more is added.

        Raises:
            TypeError: If a tensor is none or has another dtype.
            ConfigError: If a number does not fit.
            ShapeError: If a shape does not fit, or a text has no token.
        """
        check_int("max_new_tokens", max_new_tokens, 0)
        sampling = Sampling(temperature, top_k, top_p, generator)
        check_stop_tokens(stop_tokens, self.embedding.num_embeddings)
        real_ids(ids, key_padding, self.embedding.num_embeddings)
        row = last_tokens(ids, key_padding).view(-1, 1, 1)
        cache = self.new_cache(ids.shape[0], ids.shape[1] + max_new_tokens)
        stops = torch.tensor(list(stop_tokens), dtype=torch.int64, device=ids.device)
        ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        out = [ids]
        while len(out) <= max_new_tokens:
            # The whole text first, then one token at a time; row says where each text's last one is.
            logits = self(out[-1], key_padding, cache).take_along_dim(row, 1).squeeze(1)
            token = torch.where(ended, out[-1][:, -1], sampling.choose(logits))
            out.append(token.unsqueeze(1))
            ended = torch.isin(token, stops)
            if len(stops) and bool(ended.all()):
                break
            key_padding = None
            row = torch.zeros_like(row)
        return torch.cat(out, 1)


def next_tokens(ids: Tensor, key_padding: Tensor | None) -> Tensor:
    """What follows each of the ids ``[B, T]``, padding skipped; ``IGNORED`` at padding and at last tokens."""
    length = ids.shape[1]
    place = torch.arange(length, device=ids.device).expand_as(ids)
    place = place if key_padding is None else place.masked_fill(key_padding, length)
    # The first token from each place on, so that the one behind a place is that of its neighbour.
    first = place.flip(1).cummin(1).values.flip(1)
    following = first.roll(-1, 1).index_fill(1, place.new_tensor([length - 1]), length)
    target = ids.gather(1, following.clamp(max=length - 1)).masked_fill(following == length, IGNORED)
    return target if key_padding is None else target.masked_fill(key_padding, IGNORED)
