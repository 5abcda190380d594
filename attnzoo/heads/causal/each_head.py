"""What a metric loses where one head after the other is edited: the heads of a layer at once, along the batch.

One forward keeps what each layer gives. For the heads of a layer the batch is repeated, each copy with one of them
edited, and the layers before give what they gave.

Letters: B batch, T tokens, L layers, H query heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attnzoo.heads.causal.batches import HeadBatch, Metric, Progress, measured
from attnzoo.heads.causal.layer_memory import LayerMemory
from attnzoo.surgery.edits.edit import HeadEdit
from attnzoo.surgery.edits.edited import edited
from attnzoo.surgery.edits.places import HeadSite
from attnzoo_kernels.errors import ConfigError, UnsupportedError

CHUNK_VALUES = 1 << 26
"""Logits that are held at once, 256 MiB in fp32."""

Edit = Callable[[HeadSite, int, int, Tensor], Sequence[HeadEdit]]
"""The edits for one head of a place: of its index, of the number of copies of the batch, and of the rows ``[n * B, T]``
of the head's copy."""

Rest = Callable[[HeadSite, int], Sequence[HeadEdit]]
"""The edits of all copies beside those of one head each: of the heads' place, and of the number of copies."""


class EachHead:
    """A model and a batch, for one edit after the other.

    Args:
        model: In evaluation mode.
        places: Where heads are.
        batch: The batch.
        metric: Of what the model says.
        progress: Told of each layer.
    """

    def __init__(
        self,
        model: Any,
        places: Sequence[HeadSite],
        batch: HeadBatch,
        metric: Metric,
        progress: Progress | None = None,
    ) -> None:
        self.model = model
        self.places = places
        self.batch = batch
        self.metric = metric
        self.progress = progress
        self._memory = LayerMemory(model, [place.path for place in places], batch.size)
        self._at_once = 1
        self.intact = torch.zeros((), device="cpu")

    def run(self) -> None:
        """Calls the model as it is."""
        with self._memory.recording():
            logits = self.batch.call(self.model)
        self._at_once = max(1, CHUNK_VALUES // logits.numel())
        self.intact = measured(self.metric, logits).double().cpu()

    def lost(self, edit: Edit, heads: Sequence[tuple[int, int]] | None = None, *, rest: Rest | None = None) -> Tensor:
        """What the metric loses by an edit of each head, fp64 ``[L, H]`` on the CPU.

        Args:
            edit: Of one head.
            heads: Pairs of layer and head; all by default. The others are NaN.
            rest: What is edited beside it.
        """
        count = self.places[0].heads
        found = torch.full((len(self.places), count), torch.nan, dtype=torch.float64, device="cpu")
        chosen = self._by_layer(heads)
        for number, place in enumerate(self.places):
            wanted = chosen[number]
            for start in range(0, len(wanted), self._at_once):
                some = wanted[start : start + self._at_once]
                edits = [] if rest is None else list(rest(place, len(some)))
                found[number, some] = self.intact - self._edited(number, some, edit, edits)
            if self.progress is not None:
                self.progress("heads", number + 1, len(self.places))
        return found

    def _edited(self, number: int, heads: Sequence[int], edit: Edit, rest: Sequence[HeadEdit]) -> Tensor:
        """The metric with each of some heads of a layer edited, fp64 ``[n]``."""
        times = len(heads)
        place = self.places[number]
        edits = list(rest)
        for copy, head in enumerate(heads):
            rows = torch.zeros(times, self.batch.size, self.batch.tokens, dtype=torch.bool, device="cpu")
            rows[copy] = True
            edits += edit(place, head, times, rows.flatten(0, 1))
        with self._memory.before(number, times), edited(self.model, edits):
            logits = self.batch.call(self.model, times)
        parts = logits.unflatten(0, (times, -1))
        return torch.stack([measured(self.metric, part).double().cpu() for part in parts])

    def _by_layer(self, heads: Sequence[tuple[int, int]] | None) -> list[list[int]]:
        if heads is None:
            return [list(range(place.heads)) for place in self.places]
        chosen: list[list[int]] = [[] for _ in self.places]
        for layer, head in checked_heads("heads", heads, self.places):
            chosen[layer].append(head)
        return chosen


def even_places(places: Sequence[HeadSite]) -> Sequence[HeadSite]:
    """Places that one table ``[L, H]`` holds.

    Raises:
        UnsupportedError: If layers have different numbers of heads.
    """
    for place in places:
        if (place.heads, place.head_dim) != (places[0].heads, places[0].head_dim):
            raise UnsupportedError(
                f"model: {place.path}: expected {places[0].heads} heads of width {places[0].head_dim} as in "
                f"{places[0].path}, got {place.heads} of width {place.head_dim}"
            )
    return places


def checked_heads(name: str, heads: Any, places: Sequence[HeadSite]) -> list[tuple[int, int]]:
    """Pairs of layer and query head, each once.

    Raises:
        ConfigError: If there is none, or one is no such pair.
    """
    try:
        found = list(dict.fromkeys((int(layer), int(head)) for layer, head in heads))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name}: expected pairs (layer, head), got {heads!r}") from error
    for layer, head in found:
        if not 0 <= layer < len(places) or not 0 <= head < places[layer].heads:
            raise ConfigError(
                f"{name}: expected layers below {len(places)} and heads below {places[0].heads}, got {(layer, head)}"
            )
    if not found:
        raise ConfigError(f"{name}: expected at least one (layer, head), got none")
    return found
