"""Folded edits as a change that is taken back: new weights in a projection, with a bias where it had none.

Letters: C model width, H query heads, D width of a head's output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.surgery.edits.fold import LinearEdit
from attnzoo.surgery.hosts.weights import is_conv1d
from attnzoo_kernels.errors import ConversionError


class FoldChange:
    """Gives a projection other weights; see :class:`attnzoo.surgery.replacements.spec.ModelChange`.

    The module stays, and with it whatever has been put round it.

    Args:
        path: Where the projection is, for messages.
        module: An ``nn.Linear``, or the transposed product of GPT-2.
        weight: As it stores it.
        bias: ``[C]``, or ``None``.
    """

    def __init__(self, path: str, module: Any, weight: Tensor, bias: Tensor | None) -> None:
        trainable = bool(module.weight.requires_grad)
        self._path = path
        self._module = module
        self._old: dict[str, nn.Parameter | None] = {name: module._parameters[name] for name in ("weight", "bias")}
        self._new = {
            "weight": nn.Parameter(weight, requires_grad=trainable),
            "bias": None if bias is None else nn.Parameter(bias, requires_grad=trainable),
        }

    @classmethod
    def of(cls, change: LinearEdit, module: Any) -> FoldChange:
        """The fold of a layer's edits; the module is untouched."""
        with torch.no_grad():
            weight = module.weight.detach().clone()
            bias = None if module.bias is None else module.bias.detach().clone()
            plain = weight.T if is_conv1d(module) else weight  # [C, H * D]
            if bias is None and change.needs_bias:
                bias = weight.new_zeros(plain.shape[0])
            change.write(plain, bias)
        return cls(change.site.o_proj, module, weight, bias)

    @property
    def adds_bias(self) -> bool:
        """Whether the projection had no bias, and has one then."""
        return self._old["bias"] is None and self._new["bias"] is not None

    def make(self) -> None:
        """Puts the weights there."""
        self._module._parameters.update(self._new)

    def undo(self) -> None:
        """Puts the old ones back, moved as the new ones have been.

        Raises:
            ConversionError: If others are there, which would be lost.
        """
        now = self._module._parameters
        if any(now.get(name) is not x for name, x in self._new.items()):
            raise ConversionError(f"undo: {self._path}: expected the weights of the fold, got others; put them back")
        like: Any = now["weight"]
        for x in self._old.values():
            if x is not None:
                x.data = x.data.to(device=like.device, dtype=like.dtype)
                x.requires_grad_(like.requires_grad)
        now.update(self._old)
