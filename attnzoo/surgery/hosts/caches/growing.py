"""The host's own keys and values in buffers with room for more tokens, so that a decoding step copies none of them.

The host's growing cache joins all that it holds with each new token: a copy of the whole for one row. Here a row is
written where it belongs, and what the host reads is a view.

Letters: B batch, G KV heads, S slots held, T tokens of a call, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from attnzoo_kernels.runtime.plain import is_plain

_LEAST_ROOM = 32
_SHARE_OF_ROOM = 16


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A layer of the host's growing cache that does not copy what it holds for each token.

    ``keys`` and ``values`` are as in the host's own layer, and may be read and set by anybody; here they are views of
    buffers that are longer by a sixteenth (32 slots at least), and are written in place. Whoever needs them beyond the
    next call, or beyond ``crop``, copies them.

    Where gradients are wanted, and in programs that are traced or compiled, it does what the host's own layer does.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)  # type: ignore[no-untyped-call]
        self._buffers: tuple[Tensor, Tensor] | None = None
        # What was handed out last: keys and values that are others were put there by somebody else.
        self._views: tuple[Tensor | None, Tensor | None] = (None, None)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes, the room for more tokens among them."""
        held = self._buffers if self._is_own else (self.keys, self.values)
        return sum(x.numel() * x.element_size() for x in held or () if x is not None)

    @property
    def _is_own(self) -> bool:
        """Whether keys and values are the views of the buffers."""
        return self._buffers is not None and self.keys is self._views[0] and self.values is self._views[1]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes a call's keys ``[B, G, T, D]`` and values behind those held, and gives all of them.

        Raises:
            RuntimeError: Where the host's own layer raises it: shapes or devices differ from those of what is held.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if not self._may_write(key_states, value_states):
            self._buffers = None
            found: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return found
        held = self.get_seq_length()
        end = held + key_states.shape[2]
        buffers = self._buffers if self._is_own else None
        if buffers is None or buffers[0].shape[2] < end:
            buffers = self._with_room(held, key_states, value_states)
        with torch.no_grad():
            buffers[0].narrow(2, held, end - held).copy_(key_states)
            buffers[1].narrow(2, held, end - held).copy_(value_states)
        return self._show(buffers, end)

    def _may_write(self, key_states: Tensor, value_states: Tensor) -> bool:
        """Whether a call's keys and values may be written into buffers behind what is held."""
        if not (is_plain(key_states) and is_plain(value_states)) or key_states.dim() != 4 or value_states.dim() != 4:
            return False
        keys: Any = self.keys
        values: Any = self.values
        if torch.is_grad_enabled() and any(x.requires_grad for x in (key_states, value_states, keys, values)):
            return False
        return all(_fits(new, old) for new, old in ((key_states, keys), (value_states, values)))

    def _with_room(self, held: int, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """New buffers with what is held, and room for a call's tokens and some more."""
        end = held + key_states.shape[2]
        # Buffers outlive the mode that they are made in.
        with torch.inference_mode(False), torch.no_grad():
            made = []
            before: tuple[Any, Any] = self.keys, self.values
            for new, old in zip((key_states, value_states), before, strict=True):
                buffer = new.new_empty((*new.shape[:2], room_for(end), new.shape[3]), requires_grad=False)
                if held:
                    buffer.narrow(2, 0, held).copy_(old)
                made.append(buffer)
        return made[0], made[1]

    def _show(self, buffers: tuple[Tensor, Tensor], slots: int) -> tuple[Tensor, Tensor]:
        """Makes the first slots of buffers what is held."""
        views = (buffers[0].narrow(2, 0, slots), buffers[1].narrow(2, 0, slots))
        self._buffers = buffers
        self._views = views
        self.keys = views[0]
        self.values = views[1]
        return views

    def reset(self) -> None:
        """Forgets everything."""
        self._buffers = None
        self.keys = None
        self.values = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last ``-tokens_to_remove`` slots, or what this version of the host means by the number."""
        own = self._is_own
        super().crop(tokens_to_remove)
        if own:
            # Views of the same buffers, which keep their room.
            self._views = (self.keys, self.values)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Takes the items of the chosen beams."""
        if not self._choose(lambda x: x.index_select(0, beam_idx.to(x.device))):
            super().reorder_cache(beam_idx)  # type: ignore[arg-type]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every item."""
        if not self._choose(lambda x: x.repeat_interleave(repeats, dim=0)):
            super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some items."""
        if not self._choose(lambda x: x[indices, ...]):
            super().batch_select_indices(indices)

    def _choose(self, items: Callable[[Tensor], Tensor]) -> bool:
        """Takes items of the buffers, with their room; says whether there were any."""
        if self._buffers is None or not self._is_own:
            return False
        with torch.inference_mode(False), torch.no_grad():
            chosen = (items(self._buffers[0]), items(self._buffers[1]))
        self._show(chosen, self.get_seq_length())
        return True

    def offload(self) -> None:
        """Moves what is held into CPU memory; its room is given up where it lay elsewhere."""
        super().offload()  # type: ignore[no-untyped-call]
        if not self._is_own:
            self._buffers = None


def room_for(tokens: int) -> int:
    """Tokens that a buffer has room for when it is made for so many: by so little more, each is moved a few times."""
    return tokens + max(_LEAST_ROOM, tokens // _SHARE_OF_ROOM)


def _fits(new: Tensor, held: Tensor) -> bool:
    """Whether a call's ``[B, G, T, D]`` can be written behind what is held, which is of no shape before the first."""
    if held.dtype != new.dtype or held.device != new.device:
        return False
    if held.dim() == 1:
        return held.shape[0] == 0
    return held.dim() == 4 and held.shape[:2] == new.shape[:2] and held.shape[3] == new.shape[3]


def growing_cache(config: Any) -> DynamicCache:
    """An empty cache of a host of this configuration, in which layers that hold all tokens grow without copying."""
    cache = DynamicCache(config=config)
    for index in range(len(cache.layers)):
        let_grow(cache, index)
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    return cache


def let_grow(cache: Any, index: int, *, keeps_all: bool = False) -> None:
    """Makes an empty plain layer of a host's cache one that grows without copying; leaves every other.

    Args:
        cache: The host's cache.
        index: Which of its layers.
        keeps_all: Whether one that slides becomes such a layer too, since what it would forget is counted from.
    """
    if torch.compiler.is_compiling():
        return
    layers = getattr(cache, "layers", None)
    if not isinstance(layers, list) or getattr(cache, "offloading", False):
        return
    make = getattr(cache, "layer_class_to_replicate", None)
    while make is DynamicLayer and len(layers) <= index:
        layers.append(GrowingLayer())
    found: Any = layers[index] if index < len(layers) else None
    kinds = (DynamicLayer, DynamicSlidingWindowLayer) if keeps_all else (DynamicLayer,)
    if type(found) in kinds and not found.get_seq_length():
        layers[index] = GrowingLayer()
