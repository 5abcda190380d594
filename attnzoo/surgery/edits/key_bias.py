"""What is added to the scores of some keys in some rows, and how two sets of keys are weighed against each other.

Letters: B batch, S tokens, n tokens of a set.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo.surgery.edits.tokens import Tokens, as_tokens
from attnzoo_kernels.errors import ConfigError, ShapeError


@dataclass(frozen=True, eq=False, kw_only=True)
class KeyBias:
    """A bias on the scores of some keys, in some rows: data alone.

    Tokens are counted as the sequence has them, from its first slot on, whatever a call's rows are.

    Attributes:
        queries: The rows, int64 ``[n]`` or bool ``[B|1, S]``; ``None`` means all.
        keys: The keys, int64 ``[n]`` or bool ``[B|1, S]``.
        bias: What is added to their scaled scores: a number, or ``[n]`` where ``keys`` are indices, ``[B|1, S]`` where
            they are a mask.
        others: Whether it is added to all keys but these.
    """

    queries: Tensor | None
    keys: Tensor
    bias: float | Tensor
    others: bool = False

    @classmethod
    def knock_out(cls, queries: Tokens | None, keys: Tokens) -> KeyBias:
        """Hides keys from rows: attention over the rest, as if these had not been there.

        A row that has no other key gives 0.

        Args:
            queries: The rows; ``None`` means all.
            keys: What they do not see.
        """
        rows = None if queries is None else as_tokens("queries", queries)
        return cls(queries=rows, keys=as_tokens("keys", keys), bias=-math.inf)

    @classmethod
    def emphasise(cls, keys: Tokens, log_gamma: float | Tensor) -> KeyBias:
        """Multiplies the weights of keys by gamma, and makes them sum to 1 again, in every row.

        Args:
            keys: Which.
            log_gamma: The logarithm of the factor: a number, or a tensor with one for each of the keys.

        Raises:
            ConfigError: If it is not finite.
            ShapeError: If there are not as many as keys.
        """
        found = as_tokens("keys", keys)
        return cls(queries=None, keys=found, bias=_checked(found, log_gamma))

    @classmethod
    def only(cls, keys: Tokens) -> KeyBias:
        """Hides all keys but these, from every row."""
        return cls(queries=None, keys=as_tokens("keys", keys), bias=-math.inf, others=True)


@dataclass(frozen=True, eq=False)
class SinkScaling:
    """The weight of some keys together multiplied by beta, and what is taken given to the others: ACT's calibration.

    Attributes:
        keys: The sinks, int64 ``[n]`` or bool ``[B|1, S]``.
        beta: The factor, from 0 to 1.
    """

    keys: Tensor
    beta: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "keys", as_tokens("keys", self.keys))
        if isinstance(self.beta, bool) or not isinstance(self.beta, int | float) or not 0 <= self.beta <= 1:
            raise ConfigError(f"beta: expected a number from 0 to 1, got {self.beta!r}")


def _checked(keys: Tensor, given: Any) -> float | Tensor:
    """The factor's logarithm, one for all keys or one for each."""
    if not isinstance(given, Tensor):
        if isinstance(given, bool) or not isinstance(given, int | float) or not math.isfinite(given):
            raise ConfigError(f"log_gamma: expected a finite number or a tensor, got {given!r}")
        return float(given)
    if not given.is_floating_point() or not bool(given.isfinite().all()):
        raise ConfigError("log_gamma: expected finite floating numbers")
    own = given.view(1, -1) if keys.dtype == torch.bool and given.dim() == 1 else given
    if own.dim() and own.shape != keys.shape:
        raise ShapeError(f"log_gamma: expected {list(keys.shape)} as keys, got {list(given.shape)}")
    return own
