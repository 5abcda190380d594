"""All changes of a conversion made at once, or none, and taken back.

A block that is no part of a model does not hear of ``.to(...)``, ``.train()`` or ``requires_grad_()``. What has been
done to its replacement is done to it when it comes back; where nothing has, it is left as it was, to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from attnzoo.base.layer import AttentionLayer
from attnzoo.surgery.hosts import attention_function
from attnzoo.surgery.hosts.attention_function import ReadPattern
from attnzoo.surgery.hosts.block import HEAD_EDITS, ReplacementModule
from attnzoo.surgery.hosts.families.known import block_of
from attnzoo.surgery.hosts.weights import type_name, why_not_plain
from attnzoo.surgery.replacements.spec import ModelChange
from attnzoo.surgery.report import ConversionReport, SiteReport
from attnzoo.surgery.sites import find, place, places_of
from attnzoo.torch_mha.module import MultiheadAttention
from attnzoo_kernels.errors import ConversionError

_OURS = (ReplacementModule, AttentionLayer, MultiheadAttention)
"""What is put into a block's place and is no block of the host's own class."""

RECIPE_ATTRIBUTE = "attnzoo_recipe"
"""Where a converted model keeps the entries of its recipe."""


@dataclass(frozen=True, eq=False)
class Change:
    """One site's change, ready to be made.

    Attributes:
        report: Where, and what becomes of it.
        entry: The recipe's entry for it.
        module: What takes the block's place; ``None`` where it stays.
        pattern: What the block reads from now on; ``None`` leaves that.
        model_change: A change to the whole model that goes with it.
    """

    report: SiteReport
    entry: dict[str, Any]
    module: nn.Module | None = None
    pattern: ReadPattern | None = None
    model_change: ModelChange | None = None

    @property
    def needs_interface(self) -> bool:
        """Whether the host must call what stands there through the functions that are registered with it."""
        return self.pattern is not None or (isinstance(self.module, ReplacementModule) and self.module.needs_interface)

    @property
    def keeps_class(self) -> bool:
        """Whether it gives the block other weights and leaves it one of the host's own."""
        return self.module is not None and not isinstance(self.module, _OURS)


def make_changes(model: Any, changes: list[Change], variant: str, options: dict[str, Any]) -> ConversionReport:
    """Makes all changes; nothing before this touches the model."""
    old_modules = [model.get_submodule(change.report.site.path) for change in changes]
    old_patterns = [attention_function.pattern_of(module) for module in old_modules]
    replaced = [
        ReplacedBlock(model, places_of(model, module), module, change.module or module)
        for change, module in zip(changes, old_modules, strict=True)
    ]
    old_recipe = model.__dict__.get(RECIPE_ATTRIBUTE, [])
    # Models that are not of transformers need have no configuration.
    settings: Any = getattr(model, "config", None)
    old_heads = getattr(settings, "num_key_value_heads", None)
    needs_interface = any(change.needs_interface for change in changes)
    switched = attention_function.switch(model, old_modules) if needs_interface else None
    for change, block in zip(changes, replaced, strict=True):
        place(model, block.paths, block.new)
        if HEAD_EDITS in block.old.__dict__:
            block.new.__dict__[HEAD_EDITS] = block.old.__dict__[HEAD_EDITS]
        if change.pattern is not None:
            attention_function.set_pattern(block.new, change.pattern)
        if change.model_change is not None:
            change.model_change.make()
    recipe = [*old_recipe, *(change.entry for change in changes)]
    model.__dict__[RECIPE_ATTRIBUTE] = recipe
    counts = {site.kv_heads for site in find(model)}
    if old_heads is not None and len(counts) == 1 and all(change.keeps_class for change in changes):
        settings.num_key_value_heads = counts.pop()

    def undo() -> None:
        if model.__dict__.get(RECIPE_ATTRIBUTE) is not recipe:
            raise ConversionError("undo: a later conversion of this model still stands; undo that first")
        for block in replaced:
            block.check()
        for change in reversed(changes):
            if change.model_change is not None:
                change.model_change.undo()
        for block, pattern in zip(replaced, old_patterns, strict=True):
            block.put_back()
            attention_function.set_pattern(block.old, pattern)
        model.__dict__[RECIPE_ATTRIBUTE] = old_recipe
        if settings is not None and old_heads is not None:
            settings.num_key_value_heads = old_heads
        if switched is not None:
            attention_function.switch_back(model, switched)

    size = next(model.parameters()).element_size()
    return ConversionReport(variant, options, [change.report for change in changes], size, undo)


_STANDS_FOR = {"k_proj": "kv_up", "v_proj": "kv_up"}
"""What a latent has instead of a block's own projections."""


def _roles(block: nn.Module) -> dict[str, str]:
    """What each module of a block projects, the first of it where it is more, by the module's name."""
    roles: dict[int, str] = {}
    for role, module in block_of(block).projections.items():
        roles.setdefault(id(module), role)
    return {name: roles[id(module)] for name, module in block.named_modules() if id(module) in roles}


@dataclass(frozen=True)
class _ModuleState:
    """What can change about a module without the module being replaced."""

    training: bool
    whereabouts: tuple[torch.device, torch.dtype] | None
    trainable: dict[str, bool]

    @classmethod
    def of(cls, module: nn.Module) -> _ModuleState:
        own = dict(module.named_parameters(recurse=False))
        first = next(iter(own.values()), None)
        where = None if first is None else (first.device, first.dtype)
        return cls(module.training, where, {name: p.requires_grad for name, p in own.items()})


class ReplacedBlock:
    """A block, and the one that a conversion has put in its places (itself, where only what is read has changed).

    Args:
        model: The model.
        paths: All places of the block.
        old: The block as it was.
        new: What stands there now.
    """

    def __init__(self, model: nn.Module, paths: list[str], old: nn.Module, new: nn.Module) -> None:
        self.model = model
        self.paths = paths
        self.old = old
        self.new = new
        self.inside: dict[str, nn.Module] = dict(new.named_modules())
        # What old and new have in common moves with the model.
        ours = {id(module) for module in self.inside.values()}
        self.own = [(name, module) for name, module in old.named_modules() if id(module) not in ours]
        self.common = {id(module) for module in old.modules()} & ours
        self.roles = _roles(old)
        self.then = {name: _ModuleState.of(self._counterpart(name)) for name, _ in self.own}

    def _counterpart(self, name: str) -> nn.Module:
        """What stands for a module of the old block in the new one."""
        role = self.roles.get(name, name)
        known = [key for key in (name, role, _STANDS_FOR.get(role, role)) if key in self.inside]
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
            now = inside.get(name)
            then = self.inside.get(name)
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
            self._follow(module, self.then[name], _ModuleState.of(self._counterpart(name)))
        place(self.model, self.paths, self.old)

    @staticmethod
    def _follow(module: nn.Module, then: _ModuleState, now: _ModuleState) -> None:
        """Does to a module what has been done to its counterpart."""
        if now.training != then.training:
            module.training = now.training
        if now.whereabouts is not None and now.whereabouts != then.whereabouts:
            device, dtype = now.whereabouts
            module.to(device=device, dtype=dtype)
        for name, parameter in module.named_parameters(recurse=False):
            like = name if name in now.trainable else "weight"
            if now.trainable.get(like) != then.trainable.get(like):
                parameter.requires_grad_(now.trainable[like])
