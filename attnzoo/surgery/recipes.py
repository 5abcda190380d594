"""Recipes: what has been done to a model, entry by entry, and doing it again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from attnzoo.reporting.versions import check_transformers
from attnzoo.surgery.kinds import KINDS, kind_of
from attnzoo.surgery.report import ConversionReport
from attnzoo.surgery.sites import find
from attnzoo.surgery.transaction import RECIPE_ATTRIBUTE, Change, make_changes
from attnzoo_kernels.errors import ConversionError

Recipe = list[dict[str, Any]]


def apply_recipe(model: nn.Module, recipe: Recipe) -> Callable[[], None]:
    """Gives a model the structure that a recipe describes; weights of changed blocks are to be loaded afterwards.

    Returns:
        The way back.

    Raises:
        ConversionError: If the recipe does not fit the model, which is left as it was.
    """
    check_transformers()
    done: list[ConversionReport] = []

    def undo() -> None:
        for report in reversed(done):
            report.undo()

    try:
        # One after the other: an entry builds on the block that the one before it has left.
        for entry in recipe:
            done.append(make_changes(model, [_change_again(model, entry)], "recipe", {}))
        for kind in KINDS:
            kind.check_model(model)
    except Exception:
        undo()
        raise
    return undo


def _change_again(model: nn.Module, entry: dict[str, Any]) -> Change:
    """The change that an entry of a recipe describes, with weights still to come."""
    path = entry.get("path")
    site = next((site for site in find(model) if site.path == path), None)
    if site is None:
        raise ConversionError(f"recipe: expected the path of an attention block, got {path!r}")
    kind = kind_of(entry)
    if kind is None:
        *words, last = (kind.word for kind in KINDS)
        raise ConversionError(f"recipe: expected kind {', '.join(words)} or {last}, got {entry.get('kind')!r}")
    return kind.rebuild(model, site, entry)


def recipe_of(model: nn.Module) -> Recipe:
    """What has been done to a model and stands, in order; of replacements, as they are set now.

    Raises:
        ConversionError: If something of it is not there any more.
    """
    entries = []
    for entry in model.__dict__.get(RECIPE_ATTRIBUTE, []):
        block = model.get_submodule(entry["path"])
        kind = kind_of(entry)
        entries.append(entry if kind is None else kind.current(block, entry))
    return entries
