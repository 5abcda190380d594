"""Putting back blocks that a conversion has replaced, into a model that may have moved since.

A block that is no part of a model does not hear of ``.to(...)``, ``.train()`` or ``requires_grad_()``. What has been
done to its replacement is done to it when it comes back; where nothing has, it is left as it was, to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from attnzoo.surgery.hosts.weights import type_name, why_not_plain
from attnzoo.surgery.sites import place
from attnzoo_kernels.errors import ConversionError

_STANDS_FOR = {"k_proj": "kv_up", "v_proj": "kv_up"}
"""What a latent has instead of a block's own projections."""


@dataclass(frozen=True)
class _State:
    """What can change about a module without the module being replaced."""

    training: bool
    place: tuple[torch.device, torch.dtype] | None
    trainable: dict[str, bool]

    @classmethod
    def of(cls, module: nn.Module) -> _State:
        own = dict(module.named_parameters(recurse=False))
        first = next(iter(own.values()), None)
        where = None if first is None else (first.device, first.dtype)
        return cls(module.training, where, {name: p.requires_grad for name, p in own.items()})


class Replaced:
    """A block, and the one that a conversion has put in its places (itself, where only what is read has changed).

    Args:
        model: The model.
        paths: All places of the block.
        old: The block as it was.
        new: What stands there now.
    """

    def __init__(self, model: nn.Module, paths: list[str], old: nn.Module, new: nn.Module) -> None:
        self.model, self.paths, self.old, self.new = model, paths, old, new
        self.inside: dict[str, nn.Module] = dict(new.named_modules())
        # What old and new have in common moves with the model.
        ours = {id(module) for module in self.inside.values()}
        self.own = [(name, module) for name, module in old.named_modules() if id(module) not in ours]
        self.common = {id(module) for module in old.modules()} & ours
        self.then = {name: _State.of(self._counterpart(name)) for name, _ in self.own}

    def _counterpart(self, name: str) -> nn.Module:
        """What stands for a module of the old block in the new one."""
        known = [key for key in (name, _STANDS_FOR.get(name, name)) if key in self.inside]
        return self.inside[known[0]] if known else self.new

    def check(self) -> None:
        """Raises unless the block can be put back, and nothing is lost by it that this conversion has not made.

        Raises:
            ConversionError: If somebody else has replaced the new block, or something in it.
        """
        for path in self.paths:
            try:
                found: object = self.model.get_submodule(path)
            except AttributeError:
                found = None
            if found is not self.new:
                raise ConversionError(
                    f"undo: {path}: expected the {type_name(self.new)} that stood there after the conversion, got "
                    f"{type_name(found)}; put it back first"
                )
        if self.new is self.old:
            return
        inside = dict(self.new.named_modules())
        for name in sorted(inside.keys() | self.inside.keys()):
            now, then = inside.get(name), self.inside.get(name)
            # What was put into a module that the old block has too is not lost.
            kept = name and id(inside.get(name.rpartition(".")[0])) in self.common
            if now is not then and not kept:
                what = f"{type_name(then)} as after the conversion" if then is not None else "nothing there"
                raise ConversionError(
                    f"undo: {self.paths[0]}.{name}: expected {what}, got {type_name(now)}, which would be lost; take "
                    "it off first (PEFT: unload() or merge_and_unload())"
                )
        self._check_weights()

    def _check_weights(self) -> None:
        for name, _ in self.own:
            for key, x in self._counterpart(name).named_parameters(recurse=False):
                reason = why_not_plain(x)
                if reason is not None:
                    raise ConversionError(
                        f"undo: {self.paths[0]}.{name}.{key}: expected a plain floating weight, whose dtype and device "
                        f"the old block takes over, got one that is {reason}"
                    )

    def put_back(self) -> None:
        """Puts the block back, moved as the model has moved; :meth:`check` comes first."""
        for name, module in self.own:
            self._follow(module, self.then[name], _State.of(self._counterpart(name)))
        place(self.model, self.paths, self.old)

    @staticmethod
    def _follow(module: nn.Module, then: _State, now: _State) -> None:
        """Does to a module what has been done to its counterpart."""
        if now.training != then.training:
            module.training = now.training
        if now.place is not None and now.place != then.place:
            device, dtype = now.place
            module.to(device=device, dtype=dtype)
        for name, parameter in module.named_parameters(recurse=False):
            like = name if name in now.trainable else "weight"
            if now.trainable.get(like) != then.trainable.get(like):
                parameter.requires_grad_(now.trainable[like])
