"""Layers as the command line names them: ``8-``, ``0,2,5-9``."""

from __future__ import annotations

import re
from collections.abc import Callable

from attnzoo.surgery.hosts.site import Site
from attnzoo_kernels.errors import ConfigError

_SPAN = re.compile(r"(\d{1,6})(-(\d{1,6})?)?")
EXAMPLES = "layers such as 0,2,5-9 or 8- (8 and all behind it)"


def check_layers(text: str) -> None:
    """Raises unless a text names layers.

    Raises:
        ConfigError: If it does not.
    """
    _spans(text, 0)


def read_layers(text: str, count: int) -> Callable[[Site], bool]:
    """The layers that a text names, as ``convert`` takes them.

    Args:
        text: Numbers from 0 and spans, separated by commas; both ends of a span belong to it.
        count: Layers that the model has.

    Raises:
        ConfigError: If the text names no layers, or one that is not there.

    Example:
        >>> from attnzoo.cli.layers import named_layers
        >>> sorted(named_layers("0,2,4-", 6))
        [0, 2, 4, 5]
    """
    chosen = named_layers(text, count)
    return lambda site: site.layer in chosen


def named_layers(text: str, count: int) -> frozenset[int]:
    """The numbers of the layers that a text names; see :func:`read_layers`."""
    found: set[int] = set()
    for first, last in _spans(text, count):
        if max(first, last) >= count:
            raise ConfigError(f"where: expected layers from 0 to {count - 1}, got {text!r}")
        found |= set(range(first, last + 1))
    return frozenset(found)


def _spans(text: str, count: int) -> list[tuple[int, int]]:
    """First and last layer of each part; one that is open ends at the last layer of ``count``."""
    spans = []
    for part in text.split(","):
        match = _SPAN.fullmatch(part.strip())
        if match is None:
            raise ConfigError(f"where: expected {EXAMPLES}, got {text!r}")
        first = int(match[1])
        if match[3] is not None and int(match[3]) < first:
            raise ConfigError(f"where: expected spans from a layer to a later one, got {part.strip()!r}")
        open_ended = match[2] is not None and match[3] is None
        last = max(first, count - 1) if open_ended else int(match[3] or first)
        spans.append((first, last))
    return spans
