"""A model in the middle of a text: its cache is filled, and it goes on by tokens, or says the same otherwise."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from attnzoo.evaluation.decoding import cache_of
from attnzoo.surgery.hosts.calls import cache_name

CHUNK = 512


class Decoder:
    """A model in the middle of a text: its cache holds the tokens up to ``at``."""

    def __init__(self, model: Any, text: Tensor, cache: Any) -> None:
        self.model = model
        self.text = text
        self.cache: dict[str, Any] = {} if cache is None else {cache_name(type(model).forward): cache}
        self.at = 0

    def read(self, end: int) -> None:
        """Reads the text up to a token, in chunks."""
        while self.at < end:
            self._call(min(end, self.at + CHUNK))

    def step(self) -> Tensor:
        """Reads one token, and gives the logits of the next."""
        return self._call(self.at + 1)

    def _call(self, end: int) -> Tensor:
        with torch.no_grad():
            said = self.model(self.text[:, self.at : end], **self.cache, use_cache=True, logits_to_keep=1)
        self.cache = cache_of(said)
        self.at = end
        logits: Tensor = said.logits[0, -1]
        return logits

    def fork(self) -> Decoder:
        """Another with a cache of its own."""
        other = Decoder(self.model, self.text, None)
        other.cache = {name: copy.deepcopy(cache) for name, cache in self.cache.items()}
        other.at = self.at
        return other

    def slow_step(self) -> Tensor:
        """What a step says where gradients are wanted, for which nothing is cut short; the cache stays as it is."""
        caches = {name: copy.deepcopy(cache) for name, cache in self.cache.items()}
        with torch.enable_grad():
            said = self.model(self.text[:, self.at : self.at + 1], **caches, use_cache=True, logits_to_keep=1)
        logits: Tensor = said.logits[0, -1].detach()
        return logits

    def full_forward(self) -> Tensor:
        """What a step says where no cache is."""
        with torch.no_grad():
            said = self.model(self.text[:, : self.at + 1], use_cache=False, logits_to_keep=1)
        logits: Tensor = said.logits[0, -1]
        return logits

    @property
    def cache_bytes(self) -> int:
        """What the cache takes."""
        return sum(layer_bytes(layer) for cache in self.cache.values() for layer in cache.layers)


def layer_bytes(layer: Any) -> int:
    """What a layer of a cache takes, the room for more tokens among it."""
    if getattr(layer, "memory", None) is not None:
        return int(layer.memory.nbytes)
    if hasattr(layer, "nbytes"):
        return int(layer.nbytes)
    return int(sum(x.numel() * x.element_size() for x in (layer.keys, layer.values)))
