"""Edits of heads folded into weights, as a conversion: offsets find a bias where the host's class has none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.base.config import check_bool
from attnzoo.surgery.edits.edit import as_edits, checked_edits
from attnzoo.surgery.edits.fold import linear_edits, refuse_weights
from attnzoo.surgery.edits.lasting.folded import FoldChange
from attnzoo.surgery.edits.places import HeadSite, place_of
from attnzoo.surgery.hosts.site import Site
from attnzoo.surgery.kinds.head_edits import VARIANT, HeadEdits
from attnzoo.surgery.kinds.kind import Order
from attnzoo.surgery.transaction import Change
from attnzoo_kernels.errors import ConfigError, ConversionError


class FoldedHeads(HeadEdits):
    """The outputs' projections get other weights, and a bias where offsets need one; see :func:`attnzoo.heads.fold`.

    What is saved has no edits any more: the weights are all there is.
    """

    word = "folded-heads"
    changes_weights = True

    def takes(self, variant: str, options: dict[str, Any]) -> bool:
        """Whether edits of heads are to be folded."""
        return variant == VARIANT and options.get("fold", False) is not False

    def told(self, options: dict[str, Any]) -> dict[str, Any]:
        """How many edits there are."""
        return {**super().told(options), "fold": True}

    def prepare(self, order: Order) -> list[Change]:
        """New weights for the layers that have edits."""
        check_bool("fold", order.options["fold"])
        places = self.asked_places(order)
        changes = linear_edits(checked_edits(as_edits(order.options["edits"]), places))
        if not changes:
            raise ConfigError("edits: expected one that changes something, got none")
        found = []
        for change in changes:
            module: Any = order.model.get_submodule(change.site.o_proj)
            refuse_weights(order.model, change.site, module)
            found.append(self._fold(order.model, change.site, FoldChange.of(change, module)))
        return found

    def _fold(self, model: nn.Module, place: HeadSite, fold: FoldChange) -> Change:
        return self.told_of(model, place, {"o_proj": place.o_proj, "bias": fold.adds_bias}, fold)

    def rebuild(self, model: nn.Module, site: Site, entry: dict[str, Any], beside: Mapping[str, Tensor]) -> Change:
        """A projection with a bias where an entry of a recipe says so, whose weights are still to come."""
        place = place_of(model, site)
        module: Any = model.get_submodule(place.o_proj)
        bias = entry.get("bias")
        if not isinstance(bias, bool) or (bias and module.bias is not None):
            raise ConversionError(f"recipe: bias: expected true for a projection without one, got {bias!r}")
        weight = torch.zeros_like(module.weight, requires_grad=False)
        width = site.width
        new = weight.new_zeros(width) if bias else None if module.bias is None else torch.zeros_like(module.bias)
        return self._fold(model, place, FoldChange(place.o_proj, module, weight, new))

    def current(self, module: nn.Module, entry: dict[str, Any]) -> dict[str, Any]:
        """The entry; that the weights are there, names of weights say."""
        return entry

    def model_state(self, entry: dict[str, Any]) -> tuple[str, ...]:
        """The projection, which may stand outside of the block."""
        return (f"{entry.get('o_proj')}.",)

    def beside(self, module: nn.Module) -> dict[str, Tensor]:
        """Nothing: it is all in the weights."""
        return {}
