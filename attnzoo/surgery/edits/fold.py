"""Edits of heads made part of a model's weights: exact, for ever, and taken back.

An edit that is linear in a head's output z is part of what the projection does with it: of ``z' = a * z + v`` it makes
``W z' + b = (W diag(a)) z + (b + W v)``. A head has its columns of W, ``[C, D]`` each.

Source: LoFiT (Yin et al. 2024), section 3, for the fold of offsets; scales and ablations follow alike.

Letters: C model width, H query heads, D width of a head's output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.base.projections import is_distributed
from attnzoo.surgery.edits.edit import HeadEdit, checked_edits
from attnzoo.surgery.edits.places import HeadSite, check_sites
from attnzoo.surgery.hosts.weights import is_conv1d, reasons_against, type_name
from attnzoo_kernels.errors import ConfigError, ConversionError, UnsupportedError


@dataclass(frozen=True)
class FoldedLayer:
    """What became part of a layer's weights.

    Attributes:
        layer: Its index.
        o_proj: The projection that has it now.
        heads: The query heads that were edited.
        bias: Whether its bias has changed.
    """

    layer: int
    o_proj: str
    heads: tuple[int, ...]
    bias: bool


@dataclass(eq=False)
class FoldReport:
    """What :func:`attnzoo.heads.fold` did, with :meth:`undo`.

    Attributes:
        layers: What became of each layer.
    """

    layers: list[FoldedLayer]
    _undo: Callable[[], None] | None = field(repr=False, default=None)

    def undo(self) -> None:
        """Puts the very bits of the weights back; once.

        Raises:
            ConversionError: If this was undone before, or the weights have changed since.
        """
        if self._undo is None:
            raise ConversionError("undo: these edits were taken back before")
        self._undo()
        self._undo = None

    def __str__(self) -> str:
        return "\n".join(
            f"layer {x.layer}, {x.o_proj}: heads {', '.join(map(str, x.heads))}{' and the bias' if x.bias else ''}"
            for x in self.layers
        )


@dataclass(frozen=True, eq=False)
class LinearEdit:
    """What the edits of one layer make of its heads' outputs together: ``z' = scale * z + offset``.

    Attributes:
        site: The layer.
        heads: The query heads that are edited, in ascending order.
        scale: fp64 ``[H, D]``, on the CPU.
        offset: fp64 ``[H, D]``, on the CPU.
    """

    site: HeadSite
    heads: tuple[int, ...]
    scale: Tensor
    offset: Tensor

    @property
    def needs_bias(self) -> bool:
        """Whether something is added."""
        return bool((self.offset != 0).any())

    def write(self, weight: Tensor, bias: Tensor | None) -> None:
        """Writes it into a weight ``[C, H * D]`` and a bias ``[C]``, in place, computed in fp64 and rounded once.

        Only the columns of edited heads are touched, and a bias only where something is added.
        """
        heads = list(self.heads)
        width = self.site.head_dim
        columns = (torch.tensor(heads, device="cpu")[:, None] * width + torch.arange(width, device="cpu")).flatten()
        columns = columns.to(weight.device)
        old = weight[:, columns].double()
        if bias is not None and self.needs_bias:
            # What is added does not meet the scale: b' = b + W v.
            bias.copy_(bias.double() + old @ self.offset[heads].flatten().to(weight.device))
        if bool((self.scale != 1).any()):
            weight[:, columns] = (old * self.scale[heads].flatten().to(weight.device)).to(weight.dtype)


def fold(
    model: nn.Module,
    edits: HeadEdit | Sequence[HeadEdit],
    where: Callable[[HeadSite], bool] | None = None,
    *,
    sites: Sequence[HeadSite] | None = None,
) -> FoldReport:
    """Makes edits of heads part of the weights, in place: the model is an ordinary checkpoint and calls no hook.

    Scales, offsets and ablations by zero or by a value that is the same in every row are folded; the result is that of
    :func:`attnzoo.heads.edited` up to the rounding of weights. What is folded comes behind what is edited later.

    Args:
        model: As for :func:`attnzoo.heads.edited`.
        edits: What is done.
        where: Which layers' edits; all by default.
        sites: What :func:`attnzoo.heads.sites` gave for a model of no known family.

    Returns:
        What was folded, with ``undo()``.

    Raises:
        ConfigError: If there is no such layer or head, a number is not finite, or nothing is to be folded.
        ShapeError: If a tensor does not fit.
        UnsupportedError: If an edit cannot be folded, by its place in the list; or a projection has no plain weights of
            its own (quantised, sharded, wrapped, shared with another module); or offsets need a bias that it has not:
            ``surgery.convert(model, "heads", edits=..., fold=True)`` gives it one. The model is unchanged.
    """
    places = check_sites(model, sites)
    found = [(edit, site) for edit, site in checked_edits(edits, places) if where is None or where(site)]
    changes = linear_edits(found)
    if not changes:
        raise ConfigError("edits: expected one that changes something, got none")
    modules: list[Any] = [model.get_submodule(change.site.o_proj) for change in changes]
    for change, module in zip(changes, modules, strict=True):
        refuse_weights(model, change.site, module)
        if change.needs_bias and module.bias is None:
            raise UnsupportedError(
                f"edits: {change.site.o_proj} has no bias that could take an offset, and the host's class can have "
                "none there; surgery.convert(model, 'heads', edits=..., fold=True) gives it one, which is saved and "
                "loaded with the model"
            )
    undone = [_write(change, module) for change, module in zip(changes, modules, strict=True)]

    def undo() -> None:
        for restore in undone:
            restore(False)
        for restore in undone:
            restore(True)

    layers = [FoldedLayer(change.site.layer, change.site.o_proj, change.heads, change.needs_bias) for change in changes]
    return FoldReport(layers, undo)


def linear_edits(found: Sequence[tuple[HeadEdit, HeadSite]]) -> list[LinearEdit]:
    """What edits make of each layer's heads together, in the order of layers; nothing of those that change nothing.

    Raises:
        UnsupportedError: If one is not linear in what a head gives, or not the same in every row, by its place.
    """
    reasons = [f"edits[{i}]: {reason}" for i, (edit, _) in enumerate(found) if (reason := _why_not(edit)) is not None]
    if reasons:
        raise UnsupportedError(f"edits: expected edits that can be folded, got {'; '.join(reasons)}", tuple(reasons))
    by_layer: dict[int, list[tuple[HeadEdit, HeadSite]]] = {}
    for edit, site in found:
        if edit.writes:
            by_layer.setdefault(site.layer, []).append((edit, site))
    return [_joined(by_layer[layer]) for layer in sorted(by_layer)]


def _why_not(edit: HeadEdit) -> str | None:
    """Why an edit is no part of a projection."""
    if edit.reads:
        return "it changes what attention gives"
    if isinstance(edit.where, Tensor):
        return "it has a mask of rows"
    if edit.where != "all":
        return f"where={edit.where!r}: weights are the same in every row"
    if edit.value is not None and edit.value.dim() == 4:
        return "its value differs from row to row"
    return None


def _joined(placed: Sequence[tuple[HeadEdit, HeadSite]]) -> LinearEdit:
    """The edits of one layer, one after the other."""
    site = placed[0][1]
    scale = torch.ones(site.heads, site.head_dim, dtype=torch.float64, device="cpu")
    offset = torch.zeros_like(scale)
    touched: set[int] = set()
    for edit, _ in placed:
        heads = list(edit.query_heads(site))
        touched |= set(heads)
        # Ablation: what was there goes.
        if edit.ablate is not None:
            scale[heads] = 0.0
            offset[heads] = 0.0 if edit.value is None else _of_heads(edit, site, edit.value)
        # Scale, of what has been added before too.
        factor = _of_heads(edit, site, edit.scale) if isinstance(edit.scale, Tensor) else edit.scale
        scale[heads] *= factor
        offset[heads] *= factor
        # Offset.
        if edit.offset is not None:
            offset[heads] += _of_heads(edit, site, edit.offset)
    return LinearEdit(site, tuple(sorted(touched)), scale, offset)


def _of_heads(edit: HeadEdit, site: HeadSite, given: Tensor) -> Tensor:
    """A tensor of an edit for its query heads, fp64 ``[n, D]`` or ``[D]``."""
    own = given.detach().to(device="cpu", dtype=torch.float64)
    return own.repeat_interleave(site.heads // site.kv_heads, 0) if edit.kv and own.dim() == 2 else own


def refuse_weights(model: nn.Module, site: HeadSite, module: Any) -> None:
    """Raises unless a projection has plain weights that are its own alone.

    Raises:
        UnsupportedError: If not.
    """
    reasons = list(reasons_against({site.o_proj: module}))
    if not reasons and is_distributed(module):
        reasons.append(f"{site.o_proj}: expected an nn.Linear with all heads here, got one that is divided")
    if reasons:
        raise UnsupportedError(f"edits: cannot be folded: {reasons[0]}; heads.edited needs no weights", tuple(reasons))
    for path, other in model.named_modules():
        for name, x in other.named_parameters(recurse=False):
            if other is not module and x.data_ptr() == module.weight.data_ptr() and x.numel():
                raise UnsupportedError(
                    f"edits: cannot be folded: {site.o_proj}.weight is that of {path}.{name} too ({type_name(other)}), "
                    "which would change with it; heads.edited needs no weights"
                )


def _write(change: LinearEdit, module: Any) -> Callable[[bool], None]:
    """Writes a layer's edits into its projection.

    Returns:
        What raises if the weights have changed since, and with True puts them back.
    """
    written = [module.weight, *([module.bias] if change.needs_bias else [])]
    before = [(x, x.detach().clone()) for x in written]
    with torch.no_grad():
        # GPT-2's product has its weight the other way round.
        change.write(module.weight.T if is_conv1d(module) else module.weight, module.bias)
    versions = [x._version for x, _ in before]

    def restore(write: bool) -> None:
        for (x, old), version in zip(before, versions, strict=True):
            if not write and (x._version != version or all(x is not own for own in (module.weight, module.bias))):
                raise ConversionError(
                    f"undo: {change.site.o_proj}: expected the weights that the fold has made, got others, which would "
                    "be lost; take back what came later first"
                )
            if write:
                with torch.no_grad():
                    x.copy_(old)

    return restore
