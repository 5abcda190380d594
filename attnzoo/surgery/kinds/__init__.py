"""The kinds of conversion, each an object: what recipes call it, how it is prepared and made again, what is cached.

To add one: a class here, and its place in ``KINDS``; the first that takes a variant converts to it.
"""

from __future__ import annotations

from typing import Any

from attnzoo.surgery.kinds.kind import Kind
from attnzoo.surgery.kinds.policy import Remembering
from attnzoo.surgery.kinds.reading import Reading
from attnzoo.surgery.kinds.replacing import Replacing
from attnzoo.surgery.kinds.weights import Latents, Weights

REPLACING = Replacing()
KINDS: tuple[Kind, ...] = (Reading(), Remembering(), Latents(), Weights(), REPLACING)


def kind_for(variant: str, options: dict[str, Any]) -> Kind:
    """The kind that converts to a variant with these options."""
    return next(kind for kind in KINDS if kind.takes(variant, options))


def kind_of(entry: dict[str, Any]) -> Kind | None:
    """The kind of an entry of a recipe, or ``None`` where its word is none of theirs."""
    return next((kind for kind in KINDS if kind.word == entry.get("kind")), None)
