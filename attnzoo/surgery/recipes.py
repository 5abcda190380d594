"""Recipes: what has been done to a model, entry by entry, and doing it again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from attnzoo.reporting.versions import check_transformers
from attnzoo.surgery.kinds import KINDS, kind_of
from attnzoo.surgery.report import ConversionReport
from attnzoo.surgery.sites import find
from attnzoo.surgery.transaction import RECIPE_ATTRIBUTE, Change, make_changes
from attnzoo_kernels.errors import ConversionError

Recipe = list[dict[str, Any]]


def apply_recipe(model: nn.Module, recipe: Recipe, beside: Mapping[str, Tensor] | None = None) -> Callable[[], None]:
    """Gives a model the structure that a recipe describes; weights of changed blocks are to be loaded afterwards.

    Args:
        model: The model.
        recipe: Its entries.
        beside: Tensors that :func:`beside_of` gave with the recipe.

    Returns:
        The way back.

    Raises:
        ConversionError: If the recipe does not fit the model, which is left as it was.
    """
    if getattr(model, "config", None) is not None:
        check_transformers()
    done: list[ConversionReport] = []

    def undo() -> None:
        for report in reversed(done):
            report.undo()

    try:
        # One after the other: an entry builds on the block that the one before it has left.
        for entry in recipe:
            done.append(make_changes(model, [_change_again(model, entry, beside or {})], "recipe", {}))
        for kind in KINDS:
            kind.check_model(model)
    except Exception:
        undo()
        raise
    return undo


def _change_again(model: nn.Module, entry: dict[str, Any], beside: Mapping[str, Tensor]) -> Change:
    """The change that an entry of a recipe describes, with weights still to come."""
    path = entry.get("path")
    site = next((site for site in find(model) if site.path == path), None)
    if site is None:
        raise ConversionError(f"recipe: expected the path of an attention block, got {path!r}")
    kind = kind_of(entry)
    if kind is None:
        *words, last = (kind.word for kind in KINDS)
        raise ConversionError(f"recipe: expected kind {', '.join(words)} or {last}, got {entry.get('kind')!r}")
    prefix = f"{path}."
    own = {name.removeprefix(prefix): x for name, x in beside.items() if name.startswith(prefix)}
    return kind.rebuild(model, site, entry, own)


def beside_of(model: nn.Module, recipe: Recipe) -> dict[str, Tensor]:
    """Tensors that a recipe needs beside its entries and the model's weights, each by its block's path and a name."""
    found: dict[str, Tensor] = {}
    for entry in recipe:
        kind = kind_of(entry)
        tensors = {} if kind is None else kind.beside(model.get_submodule(entry["path"]))
        found |= {f"{entry['path']}.{name}": x for name, x in tensors.items()}
    return found


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
