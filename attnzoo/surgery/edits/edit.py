"""What is done to some heads of one layer: data alone, checked when it is made and against the place where it goes.

Letters: B batch, T query tokens, H query heads, G KV heads, D width of a head's output, n heads of an edit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from attnzoo.base.config import check_bool, check_int
from attnzoo.reporting.choices import check_choice
from attnzoo.surgery.edits.key_bias import KeyBias, SinkScaling
from attnzoo.surgery.edits.places import HeadSite
from attnzoo_kernels.errors import ConfigError, ShapeError

Ablation = Literal["zero", "mean", "resample", "uniform"]
Where = Literal["all", "prefill", "decode", "last"]

ABLATIONS = ("zero", "mean", "resample", "uniform")
WHERE = ("all", "prefill", "decode", "last")
_FILLED = ("mean", "resample")
"""Ablations that put a value there."""


@dataclass(frozen=True, eq=False)
class HeadEdit:
    """An edit of some heads of one layer.

    A head's output z is what attention gives it, before the output's projection. Within a head the order is: key bias,
    attention, ``post``, ablation, scale, offset, projection. A router that weighs heads (MoH) comes before.

    Attributes:
        layer: The index of the attention block, as :class:`attnzoo.surgery.Site` has it. A block that the model applies
            several times (ALBERT) is one site, and is edited in each of its applications.
        head: Query heads: one, several, or a slice; with ``kv`` KV heads, each of which stands for its group's.
        scale: z is multiplied by it: a number, ``[D]``, or ``[n, D]`` for the n heads as they are given.
        offset: Is added to z, ``[D]`` or ``[n, D]``.
        ablate: What z is replaced by before: "zero"; "mean" and "resample", ``value``; "uniform", the mean of the
            values of all tokens that the row may read.
        value: What "mean" and "resample" put there: ``[D]``, ``[n, D]``, or ``[B, T, n, D]`` for calls of such sizes.
        key_bias: Added to scores before the softmax.
        where: In which rows: "all"; "prefill", in calls of more than one token; "decode", in calls of one; "last", the
            last token of each item that is no padding, as the ``attention_mask`` of the call of the whole model has it
            (``key_padding`` of attnzoo's layers); or a bool mask ``[B|1, T]``, for calls of T tokens: calls of one
            token, which decoding makes, are not edited then unless T is 1, and others raise.
        kv: Whether ``head`` are KV heads.
        post: How a head weighs two sets of keys against each other.

    Raises:
        ConfigError: If an argument is none of these.
        ShapeError: If a tensor has another number of dimensions.
    """

    layer: int
    head: int | Sequence[int] | slice
    scale: float | Tensor = 1.0
    offset: Tensor | None = None
    ablate: Ablation | None = None
    value: Tensor | None = None
    key_bias: KeyBias | None = None
    where: Where | Tensor = "all"
    kv: bool = False
    post: SinkScaling | None = None

    def __post_init__(self) -> None:
        check_int("layer", self.layer, 0)
        check_bool("kv", self.kv)
        _check_heads(self.head)
        _check_scale(self.scale)
        _check_tensor("offset", self.offset, (1, 2))
        _check_tensor("value", self.value, (1, 2, 4))
        if self.ablate is not None:
            check_choice("ablate", self.ablate, ABLATIONS)
        if (self.value is not None) != (self.ablate in _FILLED):
            wanted = f"a tensor with ablate={self.ablate!r}" if self.ablate in _FILLED else "None"
            raise ConfigError(
                f"value: expected {wanted}, got {'None' if self.value is None else 'a tensor'}; "
                "ablate='mean' and 'resample' have one"
            )
        for name, kind in (("key_bias", KeyBias), ("post", SinkScaling)):
            found = getattr(self, name)
            if found is not None and not isinstance(found, kind):
                raise ConfigError(f"{name}: expected a {kind.__name__} or None, got {type(found).__name__}")
        _check_where(self.where)

    @property
    def reads(self) -> bool:
        """Whether it changes what attention gives, and not its output alone."""
        return self.key_bias is not None or self.post is not None or self.ablate == "uniform"

    @property
    def writes(self) -> bool:
        """Whether it changes a head's output after attention; one that multiplies by 1 and adds 0 does not.

        What a gradient is wanted of may become something else, and counts.
        """
        if self.ablate is not None and self.ablate != "uniform":
            return True
        return not _is_constant(self.scale, 1.0) or not _is_constant(self.offset, 0.0)

    def tensors(self) -> dict[str, Tensor]:
        """What it multiplies, adds and puts there, by name."""
        found = {name: getattr(self, name) for name in ("scale", "offset", "value")}
        return {name: x for name, x in found.items() if isinstance(x, Tensor)}

    def given_heads(self, site: HeadSite) -> tuple[int, ...]:
        """The heads as they are given, in order: KV heads with ``kv``.

        Raises:
            ConfigError: If the layer has none of this number, or one is named twice.
        """
        count = site.kv_heads if self.kv else site.heads
        what = "KV heads" if self.kv else "query heads"
        if isinstance(self.head, slice):
            chosen = tuple(range(count)[self.head])
        else:
            chosen = (self.head,) if isinstance(self.head, int) else tuple(self.head)
        for head in chosen:
            if not 0 <= head < count:
                raise ConfigError(f"head: expected {what} from 0 to {count - 1} in layer {site.layer}, got {head}")
        if not chosen or len(set(chosen)) < len(chosen):
            raise ConfigError(f"head: expected {what} of layer {site.layer}, each once, got {list(chosen)}")
        return chosen

    def query_heads(self, site: HeadSite) -> tuple[int, ...]:
        """The query heads that are edited: those given, or all of the groups of the KV heads given."""
        group = site.heads // site.kv_heads if self.kv else 1
        return tuple(head * group + i for head in self.given_heads(site) for i in range(group))

    def check(self, site: HeadSite) -> None:
        """Raises unless it fits a place.

        Raises:
            ConfigError: If the layer has no such head, or a number is not finite.
            ShapeError: If a tensor does not fit the heads and their width.
        """
        count = len(self.given_heads(site))
        for name, x in self.tensors().items():
            allowed = [[site.head_dim], [count, site.head_dim]]
            fits = list(x.shape[2:] if x.dim() == 4 else x.shape) in allowed[x.dim() == 4 :]
            if not fits:
                more = f" or [B, T, {count}, {site.head_dim}]" if name == "value" else ""
                raise ShapeError(
                    f"{name}: expected {allowed[0]} or {allowed[1]}{more} for {count} heads of layer {site.layer}, got "
                    f"{list(x.shape)}"
                )
            if not x.is_meta and not bool(x.detach().isfinite().all()):
                raise ConfigError(f"{name}: expected finite numbers for layer {site.layer}")


def as_edits(given: Any) -> list[HeadEdit]:
    """Edits in their order, whether one or several were given.

    Raises:
        ConfigError: If something else is among them.
    """
    found = [given] if isinstance(given, HeadEdit) else list(given) if isinstance(given, Sequence) else None
    if found is None:
        raise ConfigError(f"edits: expected a HeadEdit or a list of them, got {type(given).__name__}")
    for edit in found:
        if not isinstance(edit, HeadEdit):
            raise ConfigError(f"edits: expected HeadEdit, got {type(edit).__name__}")
    return cast(list[HeadEdit], found)


def checked_edits(given: Any, sites: Sequence[HeadSite]) -> list[tuple[HeadEdit, HeadSite]]:
    """Edits in their order, each with its place.

    Raises:
        ConfigError: If there is no such layer or head, or a number is not finite.
        ShapeError: If a tensor does not fit.
    """
    by_layer = {site.layer: site for site in sites}
    found = []
    for edit in as_edits(given):
        site = by_layer.get(edit.layer)
        if site is None:
            known = ", ".join(str(layer) for layer in by_layer)
            raise ConfigError(f"layer: expected one of {known}, got {edit.layer}")
        edit.check(site)
        found.append((edit, site))
    return found


def _check_heads(head: Any) -> None:
    if isinstance(head, slice):
        return
    given = [head] if isinstance(head, int) else list(head) if isinstance(head, Sequence) else None
    if given is None or isinstance(head, str):
        raise ConfigError(f"head: expected an int, several, or a slice, got {type(head).__name__}")
    for one in given:
        check_int("head", one, 0)


def _check_scale(scale: Any) -> None:
    if isinstance(scale, Tensor):
        _check_tensor("scale", scale, (1, 2))
    elif isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ConfigError(f"scale: expected a finite number or a tensor, got {scale!r}")


def _check_tensor(name: str, x: Any, dims: tuple[int, ...]) -> None:
    if x is None:
        return
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise ConfigError(f"{name}: expected a floating tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.dim() not in dims:
        forms = {1: "[D]", 2: "[n, D]", 4: "[B, T, n, D]"}
        raise ShapeError(f"{name}: expected {' or '.join(forms[n] for n in dims)}, got {list(x.shape)}")


def _check_where(where: Any) -> None:
    if not isinstance(where, Tensor):
        check_choice("where", where, WHERE)
    elif where.dtype != torch.bool or where.dim() != 2:
        raise ShapeError(f"where: expected a bool mask [B, T], got {where.dtype} {list(where.shape)}")


def _is_constant(x: float | Tensor | None, value: float) -> bool:
    """Whether everything is this value now and will be, since no gradient is wanted of it."""
    if not isinstance(x, Tensor):
        return x is None or x == value
    return not x.requires_grad and not x.is_meta and bool((x == value).all())
