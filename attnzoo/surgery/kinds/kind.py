"""What every kind of conversion says: how it is prepared, made again from a recipe, and what a block then caches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, ClassVar

from torch import Tensor, nn

from attnzoo.factory import get_config
from attnzoo.surgery.edits.lasting.standing import why_edits_go
from attnzoo.surgery.hosts import weights
from attnzoo.surgery.hosts.block import Need
from attnzoo.surgery.hosts.families.known import block_of
from attnzoo.surgery.hosts.site import Site
from attnzoo.surgery.lowrank.calibration import Progress, Statistics
from attnzoo.surgery.replacements.spec import OF_THE_SITE
from attnzoo.surgery.transaction import Change
from attnzoo_kernels.errors import ConfigError, UnsupportedError

REQUIRED = "required"
"""Stands for the default of an option that has none."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Order:
    """What a caller asks of some sites.

    Attributes:
        model: The model.
        sites: Which of its attention blocks.
        variant: What to convert them to.
        options: Of the variant, completed by the kind.
        calibration: A text, or what was collected from it before.
        progress: Told how far the work is.
    """

    model: nn.Module
    sites: Sequence[Site]
    variant: str
    options: dict[str, Any]
    calibration: Iterable[Any] | Statistics | None = None
    progress: Progress | None = None

    def module(self, site: Site) -> nn.Module:
        """The attention block at a site."""
        return self.model.get_submodule(site.path)

    def refuse_calibration(self) -> None:
        """Raises where a text was given to a kind that has no use for it.

        Raises:
            ConfigError: If one was.
        """
        if self.calibration is not None:
            raise ConfigError(f"calibration: expected None, {self.variant!r} has no use for it")


class Kind(ABC):
    """A kind of conversion.

    Attributes:
        word: What recipes call it.
        need: What it needs of a block.
        changes_weights: Whether an adapter stores the blocks that it changes.
        keeps_class: Whether changed blocks are ordinary blocks of their host, whose weights anybody may read.
    """

    word: ClassVar[str]
    need: ClassVar[Need]
    changes_weights: ClassVar[bool] = True
    keeps_class: ClassVar[bool] = False

    @abstractmethod
    def takes(self, variant: str, options: dict[str, Any]) -> bool:
        """Whether a variant with these options is converted so."""

    @abstractmethod
    def options(self, variant: str) -> dict[str, Any]:
        """The options of a variant, by name, with their defaults."""

    def completed(self, variant: str, options: dict[str, Any]) -> dict[str, Any]:
        """A caller's options with those that this kind starts from."""
        return options

    @abstractmethod
    def prepare(self, order: Order) -> list[Change]:
        """Everything that a conversion will do, with nothing done yet.

        Raises:
            ConfigError: If an option is unknown or does not fit.
            UnsupportedError: If a site cannot be converted so.
        """

    @abstractmethod
    def rebuild(self, model: nn.Module, site: Site, entry: dict[str, Any], beside: Mapping[str, Tensor]) -> Change:
        """The change that an entry of a recipe describes, with weights still to come.

        Args:
            model: The model.
            site: Where the entry's block is.
            entry: The entry.
            beside: What :meth:`beside` gave for it.

        Raises:
            ConversionError: If it does not fit the site.
        """

    def values(self, module: nn.Module) -> int:
        """Values that a block caches for each token."""
        return block_of(module).cached_values()

    def current(self, module: nn.Module, entry: dict[str, Any]) -> dict[str, Any]:
        """An entry of a recipe as its block is set now."""
        return entry

    def beside(self, module: nn.Module) -> dict[str, Tensor]:
        """Tensors by name that a recipe needs for a block beside the entry, and that are no weights of the model."""
        return {}

    def told(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options as reports tell them."""
        return options

    def model_state(self, entry: dict[str, Any]) -> tuple[str, ...]:
        """Prefixes of what an entry adds to the model beside its block."""
        return ()

    def check_model(self, model: nn.Module) -> None:  # noqa: B027  (most kinds have nothing to ask of the whole)
        """Raises if a model has not all that recipes must bring together.

        Raises:
            ConversionError: If something is missing.
        """

    def reasons(self, module: nn.Module, site: Site, variant: str) -> tuple[str, ...]:
        """Why a block cannot be converted to a variant, whatever its weights are; empty where it can."""
        return block_of(module).reasons[self.need]

    def reasons_here(self, module: nn.Module, site: Site, variant: str) -> tuple[str, ...]:
        """The same, with what is in the way of its weights."""
        found = self._all_reasons(module, site, variant)
        return found or (weights.reasons_against(block_of(module).projections) if self.changes_weights else ())

    def _all_reasons(self, module: nn.Module, site: Site, variant: str) -> tuple[str, ...]:
        """Those of :meth:`reasons`, and that edits of heads would be lost."""
        found = self.reasons(module, site, variant)
        lost = why_edits_go(module, self.need)
        return found if lost is None else (lost, *found)

    def refuse(self, model: nn.Module, sites: Sequence[Site], variant: str, *, weights_come: bool = False) -> None:
        """Raises unless blocks can be converted so; weights that a file brings afterwards need not be there.

        Raises:
            UnsupportedError: If one cannot.
        """
        for site in sites:
            module = model.get_submodule(site.path)
            reasons = (self._all_reasons if weights_come else self.reasons_here)(module, site, variant)
            if reasons:
                raise UnsupportedError(f"{site.path}: cannot be converted: {'; '.join(reasons)}", reasons)


def default_of(field: Field[Any]) -> Any:
    """A field's default, or ``REQUIRED``."""
    if field.default_factory is not MISSING:
        return field.default_factory()
    return REQUIRED if field.default is MISSING else field.default


def own_options(variant: str) -> dict[str, Any]:
    """The options of a variant that no site decides, by name, with their defaults; ``REQUIRED`` where there is none."""
    return {field.name: default_of(field) for field in fields(get_config(variant)) if field.name not in OF_THE_SITE}
