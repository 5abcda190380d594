r"""RazorAttention: some KV heads hold everything; the others a sink, a window, and one row for all that they have lost.

With n tokens lost, that row is

.. math::
    \hat k = \frac{1}{n} \sum_j k_j, \quad \hat v = \frac{1}{n} \sum_j v_j, \quad \hat b = \log n

and attention to it is :math:`\exp(\sigma q \cdot \hat k + \hat b)`. As the exponential is convex, that is never more
than what the tokens lost would have had, and the same if all their keys were one. ``bias="moment"`` mends the mean of
it: where products of queries with the keys lost are spread as a Gaussian,

.. math::
    \log \sum_j \exp(\sigma q \cdot k_j) \approx \sigma q \cdot \hat k + \log n
        + \tfrac{1}{2} \sigma^2 q^\top \mathrm{Cov}(k)\, q

whose last term has the mean :math:`\tfrac{1}{2} \mathrm{tr}(M\, \mathrm{Cov}(k))` over queries with the second moment
:math:`M = \mathrm{E}[\sigma q\, \sigma q^\top]`. The trace is the mean of :math:`k^\top M k` less
:math:`\hat k^\top M \hat k`, so that one number is kept beside the row.

Source: Tang et al. 2024, *RazorAttention: Efficient KV Cache Compression Through Retrieval Heads*, sections 3.2 to 3.4
(arXiv:2407.15891).

Departures:
    - Heads are protected by KV head: one is if any query head of its group is. On models with grouped heads, the
      paper's 15 % of query heads may be a much larger share of KV heads.
    - The window is of a fixed size; the paper's is a fifth of the sequence, and 4,000 tokens at least.
    - Rows are folded as they leave the window, prompt and decoding alike; the paper folds once, behind the prompt.
    - ``bias="moment"`` is not of the paper.

Letters: L layers, B batch, H query heads, G KV heads, T tokens, D key width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from attnzoo.cache.policies.duo import Duo, HeadScoring, top_heads
from attnzoo.cache.policies.full_heads import heads_of_layer
from attnzoo_kernels.errors import ConfigError

PROTECTED: Mapping[str, float] = {"induction": 14 / 15, "echo": 1 / 15}
"""Which scores protect heads, and which share of the protected query heads each."""


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Razor(Duo, name="razor"):
    """Everything for some KV heads; a sink, a window and a row for the rest for the others.

    Attributes:
        fold: "rotated", the means of keys as they are held, and of values, stand for what is lost; "none", nothing
            does, which is DuoAttention.
        bias: "log_n", the logarithm of the tokens lost; "moment", with the term for the spread of their keys.
        moments: Second moments of scaled queries, of :func:`second_moments`, ``[L, G, D, D]``, for "moment";
            ``[G, D, D]`` is one layer's.

    Raises:
        ConfigError: If a setting is none of these, or there are no moments, or those of other heads.
    """

    fold: str = "rotated"
    bias: str = "log_n"
    moments: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("fold", ("rotated", "none")), ("bias", ("log_n", "moment"))):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
        if (self.moments is None) == (self.bias == "moment"):
            expected = "second moments with bias 'moment', and with no other"
            raise ConfigError(f"moments: expected {expected}, got bias {self.bias!r}")
        if self.moments is not None:
            object.__setattr__(self, "moments", _moments_of(self.moments, self.full))

    @classmethod
    def from_scores(
        cls, scores: HeadScoring, keep: float = 0.15, *, kinds: Mapping[str, float] | None = None, **settings: Any
    ) -> Self:
        """The KV heads of the query heads that score most: 14 % by induction and 1 % by echo.

        Args:
            scores: Scores of every query head by kind.
            keep: Share of the query heads that are protected.
            kinds: Which scores, and which share of the protected heads each; their numbers are rounded up to heads.
            Kinds
                choose for themselves, so that a head may be among the best of several.
            **settings: Of the policy.

        Raises:
            ConfigError: If a share is none, or scores are no finite ``[L, H]``.
        """
        if isinstance(keep, bool) or not 0 <= keep <= 1:
            raise ConfigError(f"keep: expected a share of the query heads from 0 to 1, got {keep!r}")
        parts = dict(PROTECTED if kinds is None else kinds)
        if not parts or any(isinstance(part, bool) or not part > 0 for part in parts.values()):
            raise ConfigError(f"kinds: expected kinds of scores with positive shares, got {parts}")
        whole = sum(parts.values())
        protected = []
        for kind, part in parts.items():
            found = scores[kind]
            protected.append(top_heads(found, math.ceil(keep * part / whole * found.numel() - 1e-9)))
        heads = torch.stack(protected).any(0)
        return cls(heads.unflatten(1, (scores.kv_heads, -1)).any(2), **settings)

    def _said(self) -> list[str]:
        return [*super()._said(), f"fold={self.fold}", f"bias={self.bias}"]

    def of_layer(self, layer: int) -> Self:
        """The policy of one layer."""
        full = heads_of_layer(self.full, layer)
        return replace(self, full=full, moments=None if self.moments is None else self.moments[layer])

    @property
    def folds(self) -> bool:
        """Whether one row stands for all that are lost."""
        return self.fold == "rotated"

    def moment_of(self, k: Tensor) -> Tensor | None:
        """The square of products of queries with each key, in the mean ``[B, G, T]``."""
        if self.moments is None:
            return None
        keys = k.to(torch.promote_types(k.dtype, torch.float32))
        return _squared(keys, self.moments[0])

    def fold_bias(self, k: Tensor, mass: Tensor, moment: Tensor | None = None) -> Tensor:
        """The logarithm of the tokens lost, and half the variance of their products where that is asked for."""
        if self.moments is None or moment is None:
            return mass.log()
        spread = moment - _squared(k.unsqueeze(2), self.moments[0]).squeeze(2)
        return mass.log() + spread.clamp(min=0) / 2

    def settings(self) -> dict[str, Any]:
        """The settings, but for the moments."""
        return {name: value for name, value in super().settings().items() if name != "moments"}

    def weights(self) -> dict[str, Tensor]:
        """The moments, where there are any."""
        return {} if self.moments is None else {"moments": self.moments}


def second_moments(q: Tensor, kv_heads: int, scale: float | None = None) -> Tensor:
    """The second moments of a layer's queries, over tokens and over the query heads of each group.

    Args:
        q: Rotated queries ``[B, H, T, D]``.
        kv_heads: G.
        scale: The factor on scores. ``None`` means ``D ** -0.5``.

    Returns:
        ``[G, D, D]``, in float32 or more.
    """
    factor = q.shape[3] ** -0.5 if scale is None else scale
    scaled = q.detach().to(torch.promote_types(q.dtype, torch.float32)) * factor
    rows = scaled.unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(1, 3)
    moments: Tensor = rows.mT @ rows / rows.shape[1]
    return moments


def _squared(k: Tensor, moments: Tensor) -> Tensor:
    """:math:`k^T M k` of keys ``[B, G, T, D]``, ``[B, G, T]``."""
    squared: Tensor = ((k @ moments.to(k)) * k).sum(-1)
    return squared


def _moments_of(given: Tensor, full: Tensor) -> Tensor:
    moments = given.detach() if given.dim() == 4 else given.detach().unsqueeze(0)
    if moments.dim() != 4 or moments.shape[:2] != full.shape or moments.shape[2] != moments.shape[3]:
        layers, heads = full.shape
        raise ConfigError(f"moments: expected [{layers}, {heads}, D, D], got {list(given.shape)}")
    return moments
