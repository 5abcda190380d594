"""What the tests of the Triton kernels share: how many examples they can afford, and the seams of the launcher."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import settings
from triton.runtime.interpreter import InterpretedFunction

from attnzoo_kernels._triton.tile_table import Pass, Tiles

TILES = 18
"""Pairs of blocks, over all heads and items, of a drawn call: the interpreter takes some 10 ms for each."""

only_interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")


def some(share: float) -> settings:
    """A share of the profile's examples."""
    return settings(max_examples=max(4, int(settings.default.max_examples * share)))  # type: ignore[union-attr]


def grid(**axes: Sequence[Any]) -> pytest.MarkDecorator:
    """Every combination of values: those of a diagonal, on which each value stands, and the others in the slow run."""
    longest = max(len(values) for values in axes.values())
    diagonal = {tuple(i % len(values) for values in axes.values()) for i in range(longest)}
    places = itertools.product(*(range(len(values)) for values in axes.values()))
    cases = [
        pytest.param(
            *(values[i] for i, values in zip(place, axes.values(), strict=True)),
            marks=() if place in diagonal else pytest.mark.slow,
            id="-".join(str(values[i]) for i, values in zip(place, axes.values(), strict=True)),
        )
        for place in places
    ]
    return pytest.mark.parametrize(list(axes), cases)


def slow(*values: Any) -> Any:
    """One case of the slow run."""
    return pytest.param(*values, marks=pytest.mark.slow)


def split_lists(patch: pytest.MonkeyPatch, processors: int = 1000) -> None:
    """Has the launcher believe in a device so wide that lists are cut into parts."""
    launch = _launch()
    patch.setattr(launch, "processors", lambda device: processors)


def tiles_of(patch: pytest.MonkeyPatch, change: Callable[[Tiles], Tiles]) -> None:
    """Changes the tiles that the launcher chooses."""
    specialize = _specialize()
    chosen = specialize.tiles_for

    def mine(architecture: str, of: Pass, width: int, size: int) -> Tiles:
        return change(chosen(architecture, of, width, size))

    patch.setattr(specialize, "tiles_for", mine)


def stepped(tiles: Tiles) -> Tiles:
    """The form of wide fp32, which multiplies a few channels at a time."""
    return tiles._replace(form="stepped")


def without_descriptors(patch: pytest.MonkeyPatch) -> None:
    """Has keys and values come through pointers."""
    patch.setattr(_specialize(), "is_describable", lambda x: False)


_patched: set[Any] = set()
_call = InterpretedFunction.__call__


def _call_patching_once(self: Any, *arguments: Any, **named: Any) -> Any:
    if self.fn in _patched:
        return self.rewrite()(*arguments, **named)
    _patched.add(self.fn)
    return _call(self, *arguments, **named)


# The interpreter patches the language anew for every call of a function from a kernel, which a launch and the first
# call have done already: without that it takes half the time.
InterpretedFunction.__call__ = _call_patching_once


def _launch() -> Any:
    from attnzoo_kernels._triton import launch

    return launch


def _specialize() -> Any:
    from attnzoo_kernels._triton import specialize

    return specialize
