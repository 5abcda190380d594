"""Landmark tokens inside a model: put in at the input of its decoder, and taken out of what comes out.

Nobody outside the decoder sees them: ids, masks, positions, labels, logits and lengths of caches are those of the given
tokens. They take no position, so that ordinary tokens are rotated as ever.

Letters: B batch, T given tokens of a call, T' tokens with landmarks, C model width.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from attnzoo.surgery.hosts import attention_function
from attnzoo.surgery.hosts.calls import cache_name, take_cache
from attnzoo.surgery.hosts.families.known import block_of, is_block
from attnzoo.surgery.replacements.replacement import Replacement
from attnzoo.variants.landmark.config import LandmarkConfig, check_mix
from attnzoo.variants.landmark.layer import LandmarkAttention
from attnzoo.variants.landmark.tokens import WithLandmarks, insert_landmarks, mean_embedding
from attnzoo_kernels.errors import ConversionError, ShapeError, UnsupportedError

if TYPE_CHECKING:
    from attnzoo.surgery.hosts.caches.landmark_cache import LandmarkCacheLayer

NAME = "landmark_tokens"
"""The decoder's child that holds the landmark's embedding."""


@dataclass(frozen=True, eq=False)
class _WithLandmarks(attention_function.Geometry):
    """The mask of a call whose tokens have landmarks among them; it travels through the decoder, and nothing is kept.

    Attributes:
        inserted: What was put in.
        given_real: Which of the host's slots hold tokens, bool ``[B, S]``; ``None`` where all do.
        held: The places of the replacements in the host's cache.
    """

    inserted: WithLandmarks
    given_real: Tensor | None
    held: tuple[LandmarkCacheLayer, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """B and the slots up to the call's last: hosts without a cache ask for them."""
        batch, tokens = self.inserted.is_landmark.shape
        return batch, (self.first if isinstance(self.first, int) else 0) + tokens


class LandmarkTokens(nn.Module):
    """The landmark's embedding, and the hooks that put it among a decoder's tokens.

    Attributes:
        embedding: ``[C]``; it starts as the mean of the model's embeddings.
        block_size: Tokens in a block, the landmark included.
        numbers: What the host numbers where its caller gives no positions.
    """

    # Of one that an earlier version has pickled.
    numbers: Literal["slots", "tokens"] = "slots"

    def __init__(
        self, block_size: int, embeddings: nn.Parameter, numbers: Literal["slots", "tokens"] = "slots"
    ) -> None:
        super().__init__()
        self.block_size = block_size
        self.numbers = numbers
        self.embedding = nn.Parameter(mean_embedding(embeddings), requires_grad=embeddings.requires_grad)

    def extra_repr(self) -> str:
        """The block size, for ``print(model)``."""
        return f"block_size={self.block_size}"

    def insert(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        """What the decoder is called with instead.

        Raises:
            UnsupportedError: If a mask or a cache cannot be honoured.
            ShapeError: If mask and cache disagree about earlier tokens.
        """
        # Before the host's own mask function meets the mask that is made here.
        attention_function.check_implementation(decoder.config)
        forward = type(decoder).forward
        given = inspect.signature(forward).bind_partial(decoder, *args)
        call = {**{name: value for name, value in given.arguments.items() if value is not decoder}, **kwargs}
        ids = call.pop("input_ids", None)
        x = call.pop("inputs_embeds", None)
        if (ids is None) == (x is None):
            raise ValueError("input_ids: expected either ids or inputs_embeds, got both or neither")
        if x is None:
            x = decoder.get_input_embeddings()(ids)
        cache, held = self._cache(decoder, call)
        batch, tokens, _ = x.shape
        before = held[0].given if held else 0
        given_real = _real_slots(call.get("attention_mask"), held, before, tokens)
        positions = call.get("position_ids")
        if positions is None:
            positions = self._positions(given_real, before, tokens, x.device)
        else:
            _refuse_packed(positions, None if given_real is None else given_real[:, before:])
        inserted = insert_landmarks(
            x,
            self.embedding.to(x.dtype),
            block_size=self.block_size,
            key_padding=None if given_real is None else ~given_real[:, before:],
            positions=positions,
            offset=held[0].given_tokens if held else 0,
        )
        first, past = (held[0].seen, held[0].real) if held else (0, None)
        real = None
        if past is not None or inserted.key_padding is not None:
            nothing = torch.zeros_like(inserted.is_landmark)
            now = ~(nothing if inserted.key_padding is None else inserted.key_padding)
            before_now = torch.ones(batch, first, dtype=torch.bool, device=x.device) if past is None else past
            real = torch.cat([before_now, now], 1)
        call["attention_mask"] = _WithLandmarks(first, real, inserted=inserted, given_real=given_real, held=held)
        call |= {"inputs_embeds": inserted.tokens, "position_ids": inserted.positions, cache_name(forward): cache}
        return (), call

    def drop(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """What the decoder gives instead: nothing of landmarks."""
        mask = kwargs["attention_mask"]
        for layer in mask.held:
            # A pass that recomputes has not remembered.
            if layer.seen == mask.first + mask.inserted.tokens.shape[1]:
                layer.count(mask.inserted.place.shape[1], mask.given_real)
        return _without(output, mask.inserted)

    def _positions(self, real: Tensor | None, before: int, tokens: int, device: torch.device) -> Tensor:
        """The positions ``[B|1, T]`` that the host gives its tokens by itself."""
        if real is None or self.numbers == "slots":
            return (torch.arange(tokens, device=device) + before).unsqueeze(0)
        counted = real.cumsum(1) - 1
        return counted.masked_fill(~real, -1)[:, before:]

    def _cache(self, decoder: Any, call: dict[str, Any]) -> tuple[Any, tuple[LandmarkCacheLayer, ...]]:
        """The host's cache, made here where the decoder would, and the replacements' places in it."""
        cache = take_cache(call)
        use = call.get("use_cache")
        if cache is None and not (decoder.config.use_cache if use is None else use):
            return None, ()
        # Importing the host's library is for callers who want one of its caches.
        from attnzoo.surgery.hosts.caches.cache_layer import new_cache
        from attnzoo.surgery.hosts.caches.landmark_cache import landmark_layer

        cache = new_cache(decoder.config) if cache is None else cache
        replaced = [module for module in decoder.modules() if isinstance(module, Replacement)]
        return cache, tuple(landmark_layer(cache, block.layer_idx, self.block_size) for block in replaced)


def _refuse_packed(positions: Tensor, real: Tensor | None) -> None:
    """Raises where positions of neighbouring tokens jump: by this hosts tell sequences in one row from each other."""
    if torch.compiler.is_compiling():
        return
    rises = positions[:, 1:] - positions[:, :-1] == 1
    if real is not None:
        rises = rises | ~(real[:, 1:] & real[:, :-1])
    if not bool(rises.all()):
        raise UnsupportedError("position_ids: expected consecutive positions; landmarks know one sequence in a row")


class LandmarkInput:
    """The change of a model whose blocks become landmark attention, see :class:`LandmarkTokens`."""

    def __init__(self, model: nn.Module, config: LandmarkConfig) -> None:
        host: Any = model
        embedding: Any = host.get_input_embeddings()
        found: list[Any] = [
            module
            for module in model.modules()
            if any(child is embedding for child in module.children())
            and any(isinstance(child, nn.ModuleList) for child in module.children())
        ]
        if len(found) != 1:
            raise ConversionError(f"model: expected one decoder with an embedding and layers, got {len(found)}")
        self.decoder = found[0]
        if hasattr(self.decoder, NAME):
            raise ConversionError(f"model: expected a decoder without {NAME}, got one that has them")
        blocks = [block_of(module) for module in self.decoder.modules() if is_block(module)]
        numbers: Literal["slots", "tokens"] = (
            "tokens" if any(block.numbers == "tokens" for block in blocks) else "slots"
        )
        self.tokens = LandmarkTokens(config.block_size, embedding.weight, numbers)
        self.tokens.train(self.decoder.training)
        self.handles: list[Any] = []

    def make(self) -> None:
        """Puts the tokens in."""
        self.decoder.add_module(NAME, self.tokens)
        self.handles = [
            self.decoder.register_forward_pre_hook(self.tokens.insert, with_kwargs=True),
            self.decoder.register_forward_hook(self.tokens.drop, with_kwargs=True),
        ]

    def undo(self) -> None:
        """Takes them out."""
        for handle in self.handles:
            handle.remove()
        delattr(self.decoder, NAME)


def set_gate_mix(model: nn.Module, mix: float) -> None:
    """Sets the share of landmark scores in all landmark blocks of a model, to be raised from 0 to 1 while it heals.

    Args:
        model: A model that was converted to "landmark".
        mix: From 0, where blocks weigh what plain attention gives them, to 1.

    Raises:
        ConfigError: If the mix does not lie there.
        ConversionError: If the model has no landmark attention.
    """
    layers = [module for module in model.modules() if isinstance(module, LandmarkAttention)]
    if not layers:
        raise ConversionError("model: expected one that was converted to 'landmark', got one without such layers")
    check_mix(mix)
    for layer in layers:
        layer.gate_mix = mix


def _real_slots(mask: Any, held: tuple[LandmarkCacheLayer, ...], before: int, tokens: int) -> Tensor | None:
    """Which of the host's slots hold tokens, bool ``[B, S]``, after checking it against earlier calls."""
    past = held[0].given_real if held else None
    if mask is None:
        if past is not None:
            raise ShapeError("attention_mask: expected the padding of earlier calls again, got none")
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise UnsupportedError(
            f"attention_mask: expected the host's 2-D padding mask or None, got {type(mask).__name__}"
        )
    if mask.shape[1] < before + tokens:
        raise ShapeError(f"attention_mask: expected {before + tokens} slots, got {mask.shape[1]}")
    real = mask[:, : before + tokens].bool()
    same = bool(real[:, :before].all()) if past is None else torch.equal(real[:, :before], past)
    if not same:
        raise ShapeError("attention_mask: expected the padding of earlier calls again, got another")
    return None if bool(real.all()) else real


def _without(output: Any, inserted: WithLandmarks) -> Any:
    """Outputs without landmarks: tensors that begin with B and T'."""
    if isinstance(output, Tensor):
        return inserted.drop(output) if output.shape[:2] == inserted.is_landmark.shape else output
    if isinstance(output, tuple):
        return tuple(_without(value, inserted) for value in output)
    if hasattr(output, "keys"):
        for name in list(output.keys()):
            output[name] = _without(output[name], inserted)
    return output
