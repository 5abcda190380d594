"""Modules that look like attention and that no family of hosts knows: what an error says was found instead."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import NoReturn

from torch import nn

from attnzoo.reporting.choices import nearest
from attnzoo.surgery.hosts.families.known import REFUSED, is_block, known_classes
from attnzoo_kernels.errors import ConfigError

_CLASS = re.compile(r"attention|attn", re.IGNORECASE)
NEAR = 4
"""Names of known classes in a warning."""
_PLACE = re.compile(r"(self_|cross_)?(attn|attention)")


def lookalikes(model: nn.Module) -> dict[tuple[str, str], int]:
    """How many modules look like attention and are not known, by class and path, numbers in paths being ``*``.

    Of modules inside each other the outermost counts, and none inside a known block does, or round one.

    Example:
        >>> class OwnAttention(nn.Linear): ...
        >>> lookalikes(nn.Sequential(OwnAttention(8, 8), OwnAttention(8, 8)))
        {('OwnAttention', '*'): 2}
    """
    found: Counter[tuple[str, str]] = Counter()
    outer = None
    blocks = [path for path, module in model.named_modules() if is_block(module)]
    for path, module in model.named_modules():
        if not path or (outer is not None and path.startswith(f"{outer}.")):
            continue
        name = type(module).__name__
        known = is_block(module)
        if not (known or _CLASS.search(name) or _PLACE.fullmatch(path.rpartition(".")[2])):
            continue
        if any(block.startswith(f"{path}.") for block in blocks):
            continue
        outer = path
        if not known:
            pattern = ".".join("*" if part.isdecimal() else part for part in path.split("."))
            found[name, pattern] += 1
    return dict(found)


def unknown(found: Mapping[tuple[str, str], int]) -> list[str]:
    """In words what :func:`lookalikes` gives."""
    return [
        f"not known, and left alone: {count} {name} at {place}{_why(name)}" for (name, place), count in found.items()
    ]


def known_near(found: Mapping[tuple[str, str], int]) -> str:
    """In words how many classes are known, and which come nearest to what :func:`lookalikes` gives."""
    known = known_classes()
    near = list(dict.fromkeys(name for kind, _ in found for name in nearest(kind, known) if name != kind))[:NEAR]
    like = f", such as {', '.join(near)}" if near else ""
    return f"{len(known)} classes are known{like}; docs/families.md has them all"


def refuse_unknown(model: nn.Module) -> NoReturn:
    """Raises for a model without a known block: nothing can be said about it, and zeros would be untrue.

    Raises:
        ConfigError: Saying what looks like attention in it, and which classes are known.
    """
    found = [f"{count} {name} at {pattern}{_why(name)}" for (name, pattern), count in lookalikes(model).items()]
    got = f"found {', '.join(found)}" if found else f"{type(model).__name__} has no module that says attention"
    known = ", ".join(known_classes())
    raise ConfigError(f"model: expected attention blocks of a known family, {got}; known are {known}")


def _why(name: str) -> str:
    """Why a class is not converted, where that is known."""
    return f" ({REFUSED[name]})" if name in REFUSED else ""
