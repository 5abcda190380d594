"""Conversions by edits of heads: no block is replaced, and what its heads give or read is edited from then on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.reporting.choices import check_known
from attnzoo.surgery.edits.edit import HeadEdit, as_edits, checked_edits
from attnzoo.surgery.edits.edited import try_edits
from attnzoo.surgery.edits.lasting.plain import from_plain, to_plain
from attnzoo.surgery.edits.lasting.standing import EditsChange, StandingEdits, standing_edits
from attnzoo.surgery.edits.places import HeadSite, place_of, why_no_place
from attnzoo.surgery.hosts.block import Need
from attnzoo.surgery.hosts.site import Site
from attnzoo.surgery.kinds.kind import REQUIRED, Kind, Order
from attnzoo.surgery.replacements.spec import ModelChange
from attnzoo.surgery.report import SiteReport
from attnzoo.surgery.transaction import Change
from attnzoo_kernels.errors import ConfigError, ConversionError

VARIANT = "heads"

Placed = tuple[HeadEdit, HeadSite]


class HeadEdits(Kind):
    """Blocks keep their weights, and some of their heads are edited; see :class:`attnzoo.heads.HeadEdit`.

    The entry of a recipe says what is done in plain values; tensors lie beside it.
    """

    word = "heads"
    need = Need.READING
    changes_weights = False

    def takes(self, variant: str, options: dict[str, Any]) -> bool:
        """Whether edits of heads are asked for."""
        return variant == VARIANT

    def options(self, variant: str) -> dict[str, Any]:
        """The edits, which have no default, and whether they become part of the weights."""
        return {"edits": REQUIRED, "fold": False}

    def reasons(self, module: nn.Module, site: Site, variant: str) -> tuple[str, ...]:
        """Why the outputs of a block's heads cannot be reached; whatever else stands there may stay."""
        reason = why_no_place(module)
        return () if reason is None else (reason,)

    def told(self, options: dict[str, Any]) -> dict[str, Any]:
        """How many edits there are."""
        return {"edits": len(as_edits(options["edits"]))}

    def prepare(self, order: Order) -> list[Change]:
        """Edits of the layers that have some, once all of them are known to fit."""
        places = {place.layer: place for place in self.asked_places(order)}
        given = as_edits(order.options["edits"])
        checked_edits(given, list(places.values()))
        # Whatever a context would refuse is refused before anything is changed.
        try_edits(order.model, given, sites=list(places.values()))
        active = [edit for edit in given if edit.writes or edit.reads]
        if not active:
            raise ConfigError("edits: expected one that changes something, got none")
        by_layer = {layer: [edit for edit in active if edit.layer == layer] for layer in sorted(places)}
        return [
            self._change(order.model, places[layer], self._standing(order.model, places[layer], edits))
            for layer, edits in by_layer.items()
            if edits
        ]

    def asked_places(self, order: Order) -> list[HeadSite]:
        """The layers that have edits.

        Raises:
            ConfigError: If there are none, an option is unknown, or an edit is of a layer that is not asked for.
            UnsupportedError: If the heads of a layer cannot be reached.
        """
        order.refuse_calibration()
        for name in order.options:
            check_known(name, self.options(order.variant), f"options for {order.variant!r}")
        asked = {edit.layer for edit in as_edits(order.options.get("edits"))}
        known = {site.layer for site in order.sites}
        if not asked <= known:
            layers = ", ".join(str(layer) for layer in sorted(known))
            raise ConfigError(f"layer: expected one of {layers}, got {min(asked - known)}")
        sites = [site for site in order.sites if site.layer in asked]
        self.refuse(order.model, sites, order.variant)
        return [place_of(order.model, site) for site in sites]

    def _standing(self, model: nn.Module, place: HeadSite, edits: Sequence[HeadEdit]) -> StandingEdits:
        """The edits with a number that no other of the block has."""
        before = standing_edits(model.get_submodule(place.path))
        return StandingEdits(1 + max((each.number for each in before), default=0), tuple(edits))

    def _change(self, model: nn.Module, place: HeadSite, standing: StandingEdits) -> Change:
        about = {"number": standing.number, "edits": [to_plain(edit)[0] for edit in standing.edits]}
        return self.told_of(model, place, about, EditsChange(model, place, standing))

    def told_of(self, model: nn.Module, place: HeadSite, about: dict[str, Any], change: ModelChange) -> Change:
        """A change that leaves a block and its cache as they are, with what a recipe says about it."""
        if place.site is None:
            raise AssertionError("blocks of known families have a site")
        values = self.values(model.get_submodule(place.path))
        entry = {"path": place.path, "kind": self.word, "variant": VARIANT, **about}
        return Change(SiteReport(place.site, values, values), entry, model_change=change)

    def rebuild(self, model: nn.Module, site: Site, entry: dict[str, Any], beside: Mapping[str, Tensor]) -> Change:
        """The edits that an entry of a recipe describes, with their tensors beside it."""
        place = place_of(model, site)
        number = entry.get("number")
        given = entry.get("edits")
        if not isinstance(number, int) or not isinstance(given, list):
            raise ConversionError(f"recipe: {site.path}: expected a number and edits, got {number!r} and {given!r}")
        # Tensors go where the model is, as far as it is anywhere.
        where = next((x.device for x in model.parameters()), torch.device("cpu"))
        edits = []
        for i, data in enumerate(given):
            prefix = _prefix(number, i)
            own = {name.removeprefix(prefix): x for name, x in beside.items() if name.startswith(prefix)}
            placed = {name: x if where.type == "meta" else x.to(where) for name, x in own.items()}
            edits.append(from_plain(data, placed, site.layer))
        try_edits(model, edits, sites=[place])
        return self._change(model, place, StandingEdits(number, tuple(edits)))

    def current(self, module: nn.Module, entry: dict[str, Any]) -> dict[str, Any]:
        """The entry, once it is sure that its edits stand.

        Raises:
            ConversionError: If they do not.
        """
        if all(each.number != entry["number"] for each in standing_edits(module)):
            raise ConversionError(f"model: {entry['path']}: expected the edits of heads that were put there, got none")
        return entry

    def beside(self, module: nn.Module) -> dict[str, Tensor]:
        """The tensors of all edits of a block."""
        found: dict[str, Tensor] = {}
        for each in standing_edits(module):
            for i, edit in enumerate(each.edits):
                tensors = to_plain(edit)[1]
                found |= {f"{_prefix(each.number, i)}{name}": x for name, x in tensors.items()}
        return found


def _prefix(number: int, i: int) -> str:
    """What the names of an edit's tensors begin with."""
    return f"heads.{number}.{i}."
