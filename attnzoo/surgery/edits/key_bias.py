"""What is added to the scores of some keys in some rows, and how two sets of keys are weighed against each other.

Letters: B batch, S tokens, n tokens of a set.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnzoo.surgery.edits.tokens import Tokens, as_tokens, real_first
from attnzoo_kernels.errors import ConfigError, ShapeError


@dataclass(frozen=True, eq=False, kw_only=True)
class KeyBias:
    """A bias on the scores of some keys, in some rows: data alone.

    Rows and keys are tokens of each item's sequence, counted from its first one: padding does not count, and a token
    keeps its number in decoding, wherever a cache has put it. Masks go by the same numbers; one that has the columns of
    padded ``input_ids`` needs the ``attention_mask`` beside it, without which padded calls refuse it. Tokens behind a
    mask's end are in no set.

    A row that is left with nothing to see gives 0, as in the operation. Where a cache holds less than all, what it
    holds is edited; where its rows stand for several tokens each, keys cannot be told apart, and calls refuse.

    Attributes:
        queries: The rows, int64 ``[n]`` or bool ``[B|1, S]``; ``None`` means all.
        keys: The keys, int64 ``[n]`` or bool ``[B|1, S]``.
        bias: What is added to their scaled scores: a number, or ``[n]`` where ``keys`` are indices, ``[B|1, S]`` where
            they are a mask.
        others: Whether it is added to all keys but these.
        by_token: Whether it is certain that masks count no padding.
    """

    queries: Tensor | None
    keys: Tensor
    bias: float | Tensor
    others: bool = False
    by_token: bool = False

    @classmethod
    def knock_out(cls, queries: Tokens | None, keys: Tokens, *, attention_mask: Tensor | None = None) -> KeyBias:
        """Hides keys from rows: attention over the rest, as if these had not been there.

        A row that has no other key gives 0.

        Args:
            queries: The rows; ``None`` means all.
            keys: What they do not see.
            attention_mask: Where there are tokens, ``[B, S]``, if masks have columns for padding too.

        Raises:
            ConfigError: If tokens are neither indices nor a mask.
            ShapeError: If shapes do not fit.
        """
        rows = None if queries is None else as_tokens("queries", queries)
        return cls(queries=rows, keys=as_tokens("keys", keys), bias=-math.inf)._moved(attention_mask)

    @classmethod
    def emphasise(cls, keys: Tokens, log_gamma: float | Tensor, *, attention_mask: Tensor | None = None) -> KeyBias:
        """Multiplies the weights of keys by gamma, and makes them sum to 1 again, in every row.

        Args:
            keys: Which.
            log_gamma: The logarithm of the factor: a number, or a tensor with one for each of the keys.
            attention_mask: As for :meth:`knock_out`.

        Raises:
            ConfigError: If it is not finite.
            ShapeError: If there are not as many as keys.
        """
        found = as_tokens("keys", keys)
        return cls(queries=None, keys=found, bias=_checked(found, log_gamma))._moved(attention_mask)

    @classmethod
    def only(cls, keys: Tokens, *, attention_mask: Tensor | None = None) -> KeyBias:
        """Hides all keys but these, from every row; see :meth:`knock_out`."""
        return cls(queries=None, keys=as_tokens("keys", keys), bias=-math.inf, others=True)._moved(attention_mask)

    def _moved(self, attention_mask: Tensor | None) -> KeyBias:
        """The same for masks that have columns for padding, which count tokens then."""
        if attention_mask is None:
            return self
        queries = self.queries
        keys = self.keys
        bias = self.bias
        if queries is not None and queries.dtype == torch.bool:
            queries = real_first(queries, attention_mask)
        if keys.dtype == torch.bool:
            keys = real_first(keys, attention_mask)
            bias = real_first(bias, attention_mask) if isinstance(bias, Tensor) and bias.dim() else bias
        return replace(self, queries=queries, keys=keys, bias=bias, by_token=True)


@dataclass(frozen=True, eq=False)
class SinkScaling:
    """The weight of some keys together multiplied by beta, and what is taken given to the others: ACT's calibration.

    Attributes:
        keys: The sinks, int64 ``[n]`` or bool ``[B|1, S]``; tokens, counted as :class:`KeyBias` counts them.
        beta: The factor, from 0 to 1; 1 changes nothing, to the bit.
        by_token: Whether it is certain that a mask counts no padding.
    """

    keys: Tensor
    beta: float
    by_token: bool = False

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
