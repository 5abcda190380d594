"""Edits of heads that stand: part of a converted model, carried with its blocks, until they are taken back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from attnzoo.surgery.edits.calls import Remove
from attnzoo.surgery.edits.edit import HeadEdit
from attnzoo.surgery.edits.edited import put_edits
from attnzoo.surgery.edits.places import HeadSite
from attnzoo.surgery.hosts import attention_function
from attnzoo.surgery.hosts.block import HEAD_EDITS, Need, ReplacementModule
from attnzoo.surgery.hosts.families.known import WITHOUT_TRANSFORMERS


@dataclass(frozen=True, eq=False)
class StandingEdits:
    """What one conversion has put on a block.

    Attributes:
        number: Of that conversion, among those of the block.
        edits: What is done, in order.
        removals: What takes them off, once they stand; as long as the block lives, so do contexts behind them.
    """

    number: int
    edits: tuple[HeadEdit, ...]
    removals: list[Remove] = field(default_factory=list, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a model has the hooks, and no way back.
        return {"number": self.number, "edits": self.edits, "removals": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if any(edit.reads for edit in self.edits):
            # A process that only loads a pickle has registered nothing yet.
            attention_function.register()


def standing_edits(block: nn.Module) -> tuple[StandingEdits, ...]:
    """What conversions have put on a block, in order."""
    found: tuple[StandingEdits, ...] = block.__dict__.get(HEAD_EDITS, ())
    return found


def why_edits_go(block: nn.Module, need: Need) -> str | None:
    """Why a conversion would lose edits that stand; ``None`` where it does not.

    Args:
        block: The block.
        need: What the conversion needs of it.
    """
    standing = [edit for each in standing_edits(block) for edit in each.edits]
    if need is Need.WEIGHTS and standing:
        return "it has edits of heads, which other projections would not have; undo them first, and edit it then"
    if need is Need.REPLACING and any(edit.reads for edit in standing):
        return "it has edits of what its heads read, which a replacement would not have; undo them first"
    return None


class EditsChange:
    """Puts edits on a layer; see :class:`attnzoo.surgery.replacements.spec.ModelChange`.

    Args:
        model: The model.
        place: The layer.
        standing: Its edits, which are known to fit.
    """

    def __init__(self, model: nn.Module, place: HeadSite, standing: StandingEdits) -> None:
        self._model = model
        self._place = place
        self._standing = standing

    def make(self) -> None:
        """Puts the hooks there that a context would."""
        block = self._model.get_submodule(self._place.path)
        placed = [(edit, self._place) for edit in self._standing.edits]
        self._standing.removals.extend(put_edits(self._model, placed))
        if any(edit.reads for edit, _ in placed) and _is_called(self._place, block):
            self._standing.removals.append(block.register_forward_pre_hook(_check_implementation).remove)
        self._hold(block, [*standing_edits(block), self._standing])

    def undo(self) -> None:
        """Takes them off."""
        block = self._model.get_submodule(self._place.path)
        while self._standing.removals:
            self._standing.removals.pop()()
        self._hold(block, [each for each in standing_edits(block) if each is not self._standing])

    def _hold(self, block: nn.Module, standing: Sequence[StandingEdits]) -> None:
        if standing:
            block.__dict__[HEAD_EDITS] = tuple(standing)
        else:
            block.__dict__.pop(HEAD_EDITS, None)


def _is_called(place: HeadSite, block: nn.Module) -> bool:
    """Whether the host calls a block's attention by the name that its configuration says."""
    host = None if place.site is None else place.site.host
    return host not in WITHOUT_TRANSFORMERS and not isinstance(block, ReplacementModule)


def _check_implementation(block: Any, args: tuple[Any, ...]) -> None:
    """Before a block's call: its attention is asked for by the functions that ask who edits it."""
    attention_function.check_implementation(block.config)
