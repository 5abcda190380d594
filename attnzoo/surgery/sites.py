"""Where attention blocks are in a model, which may apply one of them several times."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from attnzoo.surgery.hosts.families.known import is_block, site_of
from attnzoo.surgery.hosts.site import Site
from attnzoo_kernels.errors import ConversionError


def find(model: nn.Module) -> tuple[Site, ...]:
    """The attention blocks of a model that can be converted, in order.

    A block that the model applies several times is one site.
    """
    found: list[Site] = []
    seen: set[int] = set()
    for path, module in model.named_modules():
        if is_block(module) and id(module) not in seen:
            seen.add(id(module))
            found.append(site_of(path, len(found), module))
    return tuple(found)


def places_of(model: nn.Module, module: nn.Module) -> list[str]:
    """Every path that leads to a module."""
    return [path for path, found in model.named_modules(remove_duplicate=False) if found is module]


def place(model: nn.Module, paths: Iterable[str], module: nn.Module) -> None:
    """Puts a module at paths."""
    for path in paths:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, module)


def shared_blocks(model: nn.Module) -> list[list[str]]:
    """The paths of each attention block that a model applies at several places."""
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if is_block(module):
            paths.setdefault(id(module), []).append(path)
    return [found for found in paths.values() if len(found) > 1]


def share_blocks(model: nn.Module, groups: Sequence[Any]) -> None:
    """Makes a model apply one attention block at all paths of a group, as :func:`shared_blocks` gives them.

    Raises:
        ConversionError: If a group is no list of paths to different blocks.
    """
    blocks = {path for path, module in model.named_modules(remove_duplicate=False) if is_block(module)}
    for paths in groups:
        if not isinstance(paths, list) or not set(map(str, paths)) <= blocks or len(set(map(str, paths))) < 2:
            raise ConversionError(f"shared: expected paths of attention blocks, got {paths!r}")
        place(model, paths[1:], model.get_submodule(paths[0]))
