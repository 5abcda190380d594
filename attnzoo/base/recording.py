"""Watching a model's attention layers: what each planned, and the auxiliary losses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from attnzoo.base.steps import Plan
from attnzoo.cache.replay import is_replay
from attnzoo_kernels.errors import ConfigError

RULE = "attnzoo_rule"
"""The attribute of a converted module that holds what its block reads, as an object with a ``layer``."""


@runtime_checkable
class Recorded(Protocol):
    """A module that tells its recordings what it planned."""

    recordings: tuple[Recording, ...]


class Recording:
    """What a model's layers planned within one :func:`record` block.

    Attributes:
        plans: For each layer's path in the model, the plans of its calls in order. Plans keep their layouts alive.
    """

    def __init__(self, paths: dict[Recorded, str]) -> None:
        self._paths = paths
        self.plans: dict[str, list[Plan]] = {path: [] for path in paths.values()}

    @property
    def aux_loss(self) -> Tensor:
        """The unweighted auxiliary losses of all calls, added; 0 where no layer has one."""
        losses = [plan.aux_loss for plans in self.plans.values() for plan in plans if plan.aux_loss is not None]
        return torch.stack(losses).sum() if losses else torch.zeros((), device="cpu")

    def add(self, layer: Recorded, plan: Plan) -> None:
        """Notes a layer's plan, unless this is a recomputation inside a backward (activation checkpointing)."""
        if is_replay():
            return
        self.plans[self._paths[layer]].append(plan.apart() if torch.compiler.is_compiling() else plan)


def _recorded(model: nn.Module) -> Iterator[tuple[Recorded, str]]:
    """Layers, and the weightless layers that say what a converted block reads, with their paths."""
    for path, module in model.named_modules():
        rule = getattr(module.__dict__.get(RULE), "layer", None)
        for layer in (module, rule):
            if isinstance(layer, Recorded):
                yield layer, path


def has_layers(model: nn.Module) -> bool:
    """Whether :func:`record` would find something."""
    return next(_recorded(model), None) is not None


@contextmanager
def record(model: nn.Module) -> Iterator[Recording]:
    """Records the plans and auxiliary losses of a model's attnzoo layers while the block runs.

    Nothing global is touched: each layer of this model holds the recording until the block ends. Blocks may be nested;
    each records everything that runs inside it. Recomputation by activation checkpointing is not recorded again.

    Args:
        model: A module with attnzoo layers somewhere, or a layer.

    Raises:
        TypeError: If it is no module.
        ConfigError: If the model has no attnzoo layer.

    Example:
        >>> import attnzoo
        >>> layer = attnzoo.create("mha", dim=64, num_heads=4)
        >>> with record(layer) as rec:
        ...     y = layer(torch.randn(1, 10, 64))
        >>> rec.plans[""][0].density
        1.0
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a Module, got {type(model).__name__}")
    layers = dict(_recorded(model))
    if not layers:
        raise ConfigError(f"model: expected a module with attnzoo layers, got {type(model).__name__} without any")
    recording = Recording(layers)
    for layer in layers:
        layer.recordings = (*layer.recordings, recording)
    try:
        yield recording
    finally:
        for layer in layers:
            layer.recordings = tuple(other for other in layer.recordings if other is not recording)
