"""Making the changes that a conversion has prepared, all of them, and taking them back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from attnzoo.surgery.hosts import attention_function, llama
from attnzoo.surgery.hosts.site import Site
from attnzoo.surgery.replaced import Replaced
from attnzoo.surgery.replacements.replacement import LayerSeat
from attnzoo.surgery.replacements.spec import ModelChange
from attnzoo.surgery.report import ConversionReport, SiteReport
from attnzoo.surgery.sites import find, place, places_of
from attnzoo_kernels.errors import ConversionError


@dataclass(frozen=True, eq=False)
class Cut:
    """One site's change, ready to be made."""

    site: Site
    report: SiteReport
    recipe: dict[str, Any]
    module: nn.Module | None = None
    rule: attention_function.Rule | None = None
    change: ModelChange | None = None


def make_cuts(model: Any, cuts: list[Cut], variant: str, options: dict[str, Any]) -> ConversionReport:
    """Makes all changes; nothing before this touches the model."""
    old_modules = [model.get_submodule(cut.site.path) for cut in cuts]
    old_rules = [attention_function.rule_of(module) for module in old_modules]
    replaced = [
        Replaced(model, places_of(model, module), module, cut.module or module)
        for cut, module in zip(cuts, old_modules, strict=True)
    ]
    old_recipe = model.__dict__.get("attnzoo_recipe", [])
    old_heads = getattr(model.config, "num_key_value_heads", None)
    needs_interface = any(cut.rule is not None or isinstance(cut.module, llama.LatentSeat | LayerSeat) for cut in cuts)
    switched = attention_function.switch(model, old_modules) if needs_interface else None
    for cut, block in zip(cuts, replaced, strict=True):
        place(model, block.paths, block.new)
        if cut.rule is not None:
            attention_function.set_rule(model.get_submodule(cut.site.path), cut.rule)
        if cut.change is not None:
            cut.change.make()
    model.__dict__["attnzoo_recipe"] = recipe = [*old_recipe, *(cut.recipe for cut in cuts)]
    counts = {site.kv_heads for site in find(model)}
    if len(counts) == 1 and all(cut.recipe["kind"] == "weights" for cut in cuts):
        model.config.num_key_value_heads = counts.pop()

    def undo() -> None:
        if model.__dict__.get("attnzoo_recipe") is not recipe:
            raise ConversionError("undo: a later conversion of this model still stands; undo that first")
        for block in replaced:
            block.check()
        for cut in reversed(cuts):
            if cut.change is not None:
                cut.change.undo()
        for block, rule in zip(replaced, old_rules, strict=True):
            block.put_back()
            attention_function.set_rule(block.old, rule)
        model.__dict__["attnzoo_recipe"] = old_recipe
        if old_heads is not None:
            model.config.num_key_value_heads = old_heads
        if switched is not None:
            attention_function.switch_back(model, switched)

    size = next(model.parameters()).element_size()
    return ConversionReport(variant, options, [cut.report for cut in cuts], size, undo)
