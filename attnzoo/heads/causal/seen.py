"""What was seen of a model's heads: by name and layer, one call after the other.

Letters: B batch, T rows, S key slots, H query heads, G KV heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnzoo_kernels.errors import ConfigError, ShapeError

WHOLE = ("k", "k_unrotated", "v")
"""What each call has of all tokens so far, so that the last call's is all there is."""


class SeenLayers(Mapping[int, Tensor]):
    """One thing of all layers: what :class:`SeenHeads` gives by name.

    Rows of several calls, such as those of ``generate``, lie one behind the other; of keys and values the last call's
    are all there are. :meth:`calls` has each call's.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._calls: dict[int, list[Tensor]] = {}
        self._joined: dict[int, Tensor] = {}

    def add(self, layer: int, x: Tensor) -> None:
        """Another call's."""
        self._calls.setdefault(layer, []).append(x)
        self._joined.pop(layer, None)

    def calls(self, layer: int) -> tuple[Tensor, ...]:
        """Each call's, in order; of a block that the model applies several times, each application's."""
        return tuple(self._calls.get(layer, ()))

    def __getitem__(self, layer: int) -> Tensor:
        if layer not in self._calls:
            raise KeyError(f"{self.name}: nothing was seen of layer {layer}; seen were {sorted(self._calls)}")
        if layer not in self._joined:
            self._joined[layer] = self._join(self._calls[layer])
        return self._joined[layer]

    def _join(self, calls: list[Tensor]) -> Tensor:
        if self.name in WHOLE or len(calls) == 1:
            return calls[-1]
        if len({x.shape[0] for x in calls}) > 1:
            raise ShapeError(f"{self.name}: expected calls of one batch, got several; .calls(layer) has each call's")
        if self.name == "pattern":
            slots = max(x.shape[-1] for x in calls)
            # No earlier row reads a later slot.
            calls = [pad(x, (0, slots - x.shape[-1])) for x in calls]
        return torch.cat(calls, 1)

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._calls))

    def __len__(self) -> int:
        return len(self._calls)


class SeenHeads(Mapping[str, SeenLayers]):
    """What :func:`attnzoo.heads.capture` has seen: ``seen["z"][layer]``.

    Args:
        names: What is looked at.

    Attributes:
        stream: What the norm behind the layers is called with, ``[B, R, C]`` as ``stream[L]`` of L layers, where "z" is
            looked at and that norm can be told: :func:`attnzoo.heads.contributions` needs its scale.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self._found = {name: SeenLayers(name) for name in names}
        self.stream = SeenLayers("stream")

    def __getitem__(self, name: str) -> SeenLayers:
        if name not in self._found:
            raise ConfigError(f"what: expected one of {', '.join(self._found)}, got {name!r}")
        return self._found[name]

    def __contains__(self, name: object) -> bool:
        return name in self._found

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def clear(self) -> None:
        """Forgets what was seen so far."""
        for name in self._found:
            self._found[name] = SeenLayers(name)
        self.stream = SeenLayers("stream")
