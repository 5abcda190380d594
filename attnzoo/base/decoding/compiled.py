"""What a compiled decoding step calls and no compiler looks into: a row's attention where what it reads is looked up.

Lists of slots change at the borders of blocks, choices are read, tables are kept: a program that follows all this makes
a plan at each step. One operator stands for it, and does what a step without a compiler does. A length is a number of
its own among its arguments, so that one program serves all.

Letters: B batch, H query heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from attnzoo.base.config import AttentionConfig
from attnzoo_kernels.errors import ConfigError


@dataclass(frozen=True, eq=False)
class HiddenRow:
    """A call of the operator.

    Attributes:
        tensors: What the function takes; the first has the batch, the heads and the dtype of its result.
        held: Tokens of each item, the row's own the last.
        options: The layer's configuration, as :func:`options_of` gives it; empty where the function needs none.
        width: The last dimension of the result.
        numbers: What else the function takes.
    """

    tensors: Sequence[Tensor]
    held: int
    options: str
    width: int
    numbers: Sequence[float] = ()

    @property
    def config(self) -> Any:
        """The layer's configuration."""
        return _config(self.options)


Function = TypeVar("Function", bound=Callable[[HiddenRow], Tensor])

_functions: dict[str, Callable[[HiddenRow], Tensor]] = {}


def hidden_from_compilers(name: str) -> Callable[[Function], Function]:
    """Registers what a name computes: ``[B, H, 1, width]``, new memory, with no gradient."""

    def keep(function: Function) -> Function:
        _functions[name] = function
        return function

    return keep


def compute_hidden(
    name: str,
    tensors: Sequence[Tensor],
    held: int,
    *,
    width: int,
    options: str = "",
    numbers: Sequence[float] = (),
) -> Tensor:
    """What the function of a name makes of a row, see :class:`HiddenRow`, as one operator of a compiled program."""
    made: Tensor = torch.ops.attnzoo.row(name, tensors, held, options, width, numbers)
    return made


@lru_cache(maxsize=256)
def options_of(config: AttentionConfig) -> str | None:
    """A configuration as an operator takes it; ``None`` where it could not be made again from its text."""
    try:
        text = config.to_json()
        return text if _config(text) == config else None
    except (ConfigError, TypeError):
        # A class of somebody's own, whose fields are no plain values or whose kind names another class.
        return None


@lru_cache(maxsize=256)
def _config(text: str) -> AttentionConfig:
    return AttentionConfig.from_json(text)


def _row(name: str, tensors: Sequence[Tensor], held: int, options: str, width: int, numbers: Sequence[float]) -> Tensor:
    return _functions[name](HiddenRow(tensors, held, options, width, numbers))


def _like_row(
    name: str, tensors: Sequence[Tensor], held: int, options: str, width: int, numbers: Sequence[float]
) -> Tensor:
    return tensors[0].new_empty(*tensors[0].shape[:2], 1, width)


_library = torch.library.Library("attnzoo", "FRAGMENT")
# Keys and values are views of what a cache holds: nobody shall copy them.
_library.define(
    "row(str name, Tensor[] tensors, SymInt held, str options, SymInt width, float[] numbers) -> Tensor",
    tags=torch.Tag.needs_exact_strides,
)
_library.impl("row", _row, "CompositeExplicitAutograd")
torch.library.register_fake("attnzoo::row", _like_row, lib=_library)
