"""A host's own projections inside a replacement: what the family says of the block, of modules that are here now.

A replacement holds the submodules, weights and buffers of the block whose place it takes, under their names. A view of
it is an object of the block's class that has the same ones: what somebody puts in the place of a projection later, an
adapter for one, is what projects from then on. The block itself keeps what it had, and is not called.

Letters: B batch, T tokens, C model width, H query heads, G KV heads, D head width, Dv value width.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from attnzoo.base.weights import PROJECTIONS
from attnzoo.surgery.hosts.families.known import block_of
from attnzoo_kernels.errors import ConversionError

_HELD = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
"""Where a module keeps what it has."""


def adopt(module: nn.Module, host: nn.Module) -> None:
    """Gives a module all that another has, under the same names.

    Raises:
        ConversionError: If a name is taken.
    """
    for held in _HELD:
        ours: Any = module.__dict__[held]
        theirs: Any = host.__dict__[held]
        for name in theirs:
            if hasattr(module, name) and held != _HELD[-1]:
                raise ConversionError(f"{name}: expected a name that {type(module).__name__} does not use itself")
        ours.update(theirs)


def keep_others(module: nn.Module, host: nn.Module, projections: Collection[nn.Module]) -> None:
    """Gives a module the children of another that do not project, under the same names."""
    known = {id(child) for child in projections}
    for name, child in host.named_children():
        if id(child) not in known:
            module.add_module(name, child)


def view_of(module: nn.Module, host: nn.Module) -> nn.Module:
    """An object of a host's class that has what ``module`` has, now and later. It is no part of any model."""
    view: nn.Module = type(host).__new__(type(host))
    for name, value in host.__dict__.items():
        # Who watches or wraps the block's own call has no say in this.
        view.__dict__[name] = OrderedDict() if name.endswith("_hooks") else value
    for held in _HELD:
        view.__dict__[held] = module.__dict__[held]
    return view


class HostProjector:
    """Projects for a layer by a host's modules; see :class:`attnzoo.base.weights.Projector`.

    Args:
        view: See :func:`view_of`.

    Attributes:
        source: That view.
        block: What the family says of it.
        products: Whether all that is done is the products with four modules.
    """

    def __init__(self, view: nn.Module) -> None:
        self.source = view
        self.block = block_of(view)
        children = {id(child): name for name, child in view.named_children()}
        known = {role: id(child) for role, child in self.block.projections.items()}
        counts = Counter(known.values())
        # One that projects several at once does the work of none alone.
        self._names = {role: children[i] for role, i in known.items() if i in children and counts[i] == 1}
        self.products = self.block.products and set(self._names) == set(PROJECTIONS)

    def module(self, name: str) -> nn.Module | None:
        """The module that does the work of a projection, if one alone does."""
        found = self._names.get(name)
        return None if found is None else self.source._modules[found]

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[B, T, C]`` to q ``[B, H, T, D]``, k ``[B, G, T, D]`` and v ``[B, G, T, Dv]``, not rotated."""
        return self.block.project(x)

    def output(self, y: Tensor) -> Tensor:
        """``[B, T, H * Dv]`` to ``[B, T, C]``."""
        return self.block.output(y)
