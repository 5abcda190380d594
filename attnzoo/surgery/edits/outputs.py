"""Edits of heads' outputs: a hook on the module that all of a layer's heads go to.

Letters: B batch, T query tokens, H query heads, D width of a head's output, n heads of an edit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.surgery.edits.calls import Calls, last_rows
from attnzoo.surgery.edits.edit import HeadEdit
from attnzoo.surgery.edits.places import HeadSite
from attnzoo.surgery.hosts.weights import type_name
from attnzoo_kernels.errors import ShapeError, UnsupportedError


class OutputHook:
    """What a layer's edits make of the outputs of its heads, before they are projected; a forward pre-hook.

    A plain mean of values ("uniform") is what attention gives already: what is done to a head's output before it comes
    to nothing, in this hook and in those of contexts round it.

    Args:
        site: The layer.
        edits: Those that change outputs, or put a plain mean there, in their order.
        calls: Who knows which rows are tokens; needed for edits of the last one.
    """

    def __init__(self, site: HeadSite, edits: Sequence[HeadEdit], calls: Calls | None = None) -> None:
        self.site = site
        self.edits = list(edits)
        self._calls = calls
        self._heads = [torch.tensor(edit.query_heads(site), device="cpu") for edit in self.edits]
        self._means = [(self, number) for number, edit in enumerate(self.edits) if edit.ablate == "uniform"]
        self._inner: list[tuple[OutputHook, int]] = []

    def replace_outer(self, module: nn.Module) -> list[Callable[[], None]]:
        """Lets hooks that a module has already leave alone what is a plain mean here; what is returned undoes it."""
        removals: list[Callable[[], None]] = []
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, OutputHook) and self._means:
                before = hook._inner
                hook._inner = before + self._means
                removals.append(partial(setattr, hook, "_inner", before))
        return removals

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Edits the module's input ``[..., H * D]``."""
        joined = input_of(self.site, args, kwargs)
        z = heads_of(self.site, joined)
        for number in range(len(self.edits)):
            z = self._edited(number, z)
        return with_input(z.flatten(-2), args, kwargs)

    def _edited(self, number: int, z: Tensor) -> Tensor:
        edit = self.edits[number]
        rows = self._rows(edit, z)
        if rows is False:
            return z
        heads = self._heads[number].to(z.device)
        old = z.index_select(-2, heads)
        new = self._changed(edit, old)
        if isinstance(rows, Tensor):
            new = torch.where(rows[..., None, None], new, old)
        later = [(hook, n) for hook, n in self._means if n > number] + self._inner
        for hook, n in later:
            new = hook._where_mean(n, heads, (new, old), z)
        return z.index_copy(z.dim() - 2, heads, new)

    def _where_mean(self, number: int, heads: Tensor, outputs: tuple[Tensor, Tensor], z: Tensor) -> Tensor:
        """Of new and old outputs ``[..., n, D]`` of some heads the old ones, where an edit has put a plain mean."""
        new, old = outputs
        rows = self._rows(self.edits[number], z)
        if rows is False:
            return new
        mean = torch.isin(heads, self._heads[number].to(heads.device)).unsqueeze(-1)  # [n, 1]
        return torch.where(mean & rows[..., None, None] if isinstance(rows, Tensor) else mean, old, new)

    def _rows(self, edit: HeadEdit, z: Tensor) -> Tensor | bool:
        """The rows that are edited, bool ``[B|1, T]``; True for all, False for none."""
        where = edit.where
        if not isinstance(where, Tensor) and where == "all":
            return True
        if z.dim() != 4:
            raise ShapeError(f"where: expected rows [B, T], got calls of {self.site.o_proj} with {list(z.shape[:-2])}")
        batch, tokens = z.shape[:2]
        if isinstance(where, Tensor):
            if where.shape[1] != tokens and tokens == 1:
                return False
            if where.shape[1] != tokens or where.shape[0] not in (1, batch):
                raise ShapeError(f"where: expected a mask [{batch}, {tokens}] for this call, got {list(where.shape)}")
            return where.to(z.device)
        if where != "last":
            return (tokens > 1) == (where == "prefill")
        if self._calls is None:
            raise AssertionError("edits of the last token are given who knows which it is")
        last = last_rows(self._calls, z)
        return torch.arange(tokens, device=z.device) == last[:, None]

    def _changed(self, edit: HeadEdit, old: Tensor) -> Tensor:
        """Ablation, scale and offset of some heads ``[..., n, D]``, in the widest dtype of all; rounded once."""
        tensors = edit.tensors()
        wide = reduce(torch.promote_types, (x.dtype for x in tensors.values()), old.dtype)
        x = old.to(wide)
        if edit.ablate == "zero":
            x = torch.zeros_like(x)
        elif "value" in tensors:
            value = self._of_heads(edit, tensors["value"], x)
            if value.dim() == 4 and value.shape[:2] != x.shape[:2]:
                raise ShapeError(f"value: expected {list(x.shape)} for this call, got {list(value.shape)}")
            x = value.expand(x.shape)
        if "scale" in tensors:
            x = x * self._of_heads(edit, tensors["scale"], x)
        elif edit.scale != 1:
            x = x * edit.scale
        if "offset" in tensors:
            x = x + self._of_heads(edit, tensors["offset"], x)
        return x.to(old.dtype)

    def _of_heads(self, edit: HeadEdit, given: Tensor, x: Tensor) -> Tensor:
        """A tensor of an edit as its query heads have it, where x is: ``[D]``, ``[n, D]`` or ``[B, T, n, D]``."""
        own = given.to(device=x.device, dtype=x.dtype)
        if edit.kv and own.dim() > 1:
            own = own.repeat_interleave(self.site.heads // self.site.kv_heads, -2)
        return own


def input_of(site: HeadSite, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What an output's projection is called with, ``[..., H * D]``.

    Raises:
        UnsupportedError: If that is not the joined outputs of all heads.
    """
    given = args[0] if args else next(iter(kwargs.values()), None)
    if not isinstance(given, Tensor) or given.is_nested:
        kind = "a nested tensor" if isinstance(given, Tensor) else type_name(given)
        raise UnsupportedError(f"{site.o_proj}: expected to be called with a tensor [B, T, H * D], got {kind}")
    if given.shape[-1] != site.heads * site.head_dim or hasattr(given, "placements"):
        raise UnsupportedError(
            f"{site.o_proj}: expected the outputs of {site.heads} heads of width {site.head_dim}, got width "
            f"{given.shape[-1]}; heads that are divided among processes cannot be edited"
        )
    return given


def heads_of(site: HeadSite, joined: Tensor) -> Tensor:
    """Joined outputs ``[..., H * D]`` by head, ``[..., H, D]``."""
    z: Tensor = joined.unflatten(-1, (site.heads, site.head_dim))
    return z


def with_input(joined: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with another first one."""
    if args:
        return (joined, *args[1:]), kwargs
    return args, {**kwargs, next(iter(kwargs)): joined}
