"""A family of hosts: models whose attention blocks are called, configured and named alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from attnzoo.surgery.hosts.block import Block
from attnzoo.surgery.hosts.projections import Projections


@dataclass(frozen=True, eq=False, kw_only=True)
class Family:
    """All that surgery asks about a family's attention blocks.

    Attributes:
        name: Of the family.
        classes: Names of its attention classes, so that nothing is imported before a model is there.
        block: Describes a module of one of them.
        with_weights: Makes a module of the same class with other weights; the original is untouched.
    """

    name: str
    classes: tuple[str, ...]
    block: Callable[[nn.Module], Block]
    with_weights: Callable[[nn.Module, Projections], nn.Module]

    def matches(self, module: nn.Module) -> bool:
        """Whether a module is an attention block of this family."""
        return type(module).__name__ in self.classes
