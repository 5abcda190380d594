"""What a model was called with, for who must know which of a call's rows are tokens.

Hosts hand masks to their blocks in many forms; what the whole model is called with has one. attnzoo's own layers and
:class:`attnzoo.MultiheadAttention` are told of padding themselves.

Letters: B batch, T tokens of a call, S tokens so far.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.cache.replay import is_replay
from attnzoo.surgery.edits.places import HeadSite
from attnzoo.surgery.hosts.families.own import HOST as OWN
from attnzoo.surgery.hosts.families.torch_mha import HOST as TORCH
from attnzoo_kernels.errors import ShapeError, UnsupportedError

Remove = Callable[[], None]
_PADDING = ("key_padding", "key_padding_mask")
"""What modules that are told of padding themselves call it: true where there is no token."""
_MASK = "attention_mask"
_INPUTS = {"input_ids": 2, "inputs_embeds": 3}


class ModelCalls:
    """Notes each call of a model, from its beginning to its end.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        # In a wrapper the outermost module that takes a mask is told of padding.
        self._path = next((path for path, module in model.named_modules() if _takes_mask(module)), "")
        self._names = _argument_names(model.get_submodule(self._path))
        self._given: dict[str, Any] | None = None
        self._runs = False

    def watch(self, model: nn.Module) -> list[Remove]:
        """Puts hooks on the model; calling all that is returned takes them off."""
        module = model.get_submodule(self._path)
        begin = module.register_forward_pre_hook(self._begin, with_kwargs=True)
        end = module.register_forward_hook(self._end, always_call=True)
        return [begin.remove, end.remove]

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        self._given = {name: given.get(name) for name in (_MASK, *_INPUTS)}
        self._runs = True

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._runs = False

    def real(self, tokens: int) -> Tensor | None:
        """Which rows of the call that runs are tokens, bool ``[B, T]``; ``None`` where all are.

        Args:
            tokens: T.

        Raises:
            UnsupportedError: If the model's call is not known, or its mask is of another form.
            ShapeError: If there are other rows than the model was given tokens.
        """
        if self._given is None or not (self._runs or is_replay()):
            raise UnsupportedError(
                "where: 'last' is known from what the edited model is called with, got a call of a part of it; call "
                "the model, or give the rows as a mask [B, T]"
            )
        for name, dims in _INPUTS.items():
            x = self._given[name]
            if isinstance(x, Tensor) and x.dim() == dims and x.shape[1] != tokens:
                raise ShapeError(f"where: expected {x.shape[1]} rows, as the model was given tokens, got {tokens}")
        mask = self._given[_MASK]
        if mask is None:
            return None
        if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] < tokens:
            form = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise UnsupportedError(f"where: 'last' needs an attention_mask [B, S], S at least {tokens}, got {form}")
        return mask[:, -tokens:].bool()


class BlockCalls:
    """Notes what a block that is told of padding itself is called with; see :class:`ModelCalls`."""

    def __init__(self, block: nn.Module) -> None:
        self._names = _argument_names(block)
        self._padding: Tensor | None = None

    def watch(self, block: nn.Module) -> list[Remove]:
        """Puts a hook on the block; calling all that is returned takes it off."""
        return [block.register_forward_pre_hook(self._begin, with_kwargs=True).remove]

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        found = next((given[name] for name in _PADDING if given.get(name) is not None), None)
        # Numbers hide a key where they are minus infinity.
        self._padding = found.isneginf() if isinstance(found, Tensor) and found.is_floating_point() else found

    def real(self, tokens: int) -> Tensor | None:
        """Which rows of the block's last call are tokens, bool ``[B, T]``; ``None`` where all are.

        Raises:
            ShapeError: If the block was told of other tokens than its rows.
        """
        if self._padding is None:
            return None
        if self._padding.dim() != 2 or self._padding.shape[1] != tokens:
            raise ShapeError(f"where: 'last' needs padding of {tokens} rows, got {list(self._padding.shape)}")
        return ~self._padding.bool()


Calls = ModelCalls | BlockCalls


def watch_calls(model: nn.Module, sites: Sequence[HeadSite]) -> tuple[dict[int, Calls], list[Remove]]:
    """Watches what must be known about calls for some layers.

    Returns:
        By layer, who knows; and what takes the hooks off.
    """
    found: dict[int, Calls] = {}
    removals: list[Remove] = []
    whole: ModelCalls | None = None
    for site in sites:
        if site.site is not None and site.site.host in (OWN, TORCH):
            block = model.get_submodule(site.path)
            own = BlockCalls(block)
            removals += own.watch(block)
            found[site.layer] = own
            continue
        if whole is None:
            whole = ModelCalls(model)
            removals += whole.watch(model)
        found[site.layer] = whole
    return found, removals


def last_rows(calls: Calls, like: Tensor) -> Tensor:
    """The last token of each item among the rows of ``like [B, T, ...]``, int64 ``[B]``."""
    batch, tokens = like.shape[:2]
    real = None if tokens == 1 else calls.real(tokens)
    if real is None:
        return torch.full((batch,), tokens - 1, device=like.device)
    if real.shape[0] not in (1, batch):
        raise ShapeError(f"where: expected an attention_mask of {batch} items, got {real.shape[0]}")
    rows = torch.arange(tokens, device=like.device)
    # An item without a token has its last row.
    last = torch.where(real.to(like.device), rows, -1).amax(1)
    return torch.where(last < 0, tokens - 1, last).expand(batch)


def _takes_mask(module: nn.Module) -> bool:
    return _MASK in inspect.signature(type(module).forward).parameters


def _argument_names(module: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(type(module).forward).parameters)[1:]
