"""How the next token is chosen: the best one, or drawn from the likely ones. Letters: B batch, V words."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.base.config import check_int
from attnzoo_kernels.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; :meth:`attnzoo.models.CausalLM.generate` says what the values mean.

    Raises:
        ConfigError: If a value does not fit, or nothing is drawn beside a value that says how.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if not _is_number(self.temperature) or self.temperature < 0:
            raise ConfigError(f"temperature: expected a number from 0 on, got {self.temperature!r}")
        if self.top_k is not None:
            check_int("top_k", self.top_k, 1)
        if self.top_p is not None and not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise ConfigError(f"top_p: expected a number above 0 and up to 1, got {self.top_p!r}")
        if not isinstance(self.generator, torch.Generator | None):
            raise ConfigError(f"generator: expected a torch.Generator or None, got {self.generator!r}")
        for name in ("top_k", "top_p"):
            if self.temperature == 0 and getattr(self, name) is not None:
                raise ConfigError(f"{name}: expected a temperature above 0 beside it, so that tokens are drawn, got 0")

    def choose(self, logits: Tensor) -> Tensor:
        """A token for each row of ``logits [B, V]``, int64 ``[B]``."""
        if self.temperature == 0:
            return logits.argmax(-1)
        return torch.multinomial(self.probabilities(logits), 1, generator=self.generator).squeeze(-1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """What tokens are drawn by, ``[B, V]`` in fp32 at least; the temperature is above 0."""
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # The best score is 0, so that no low temperature overflows.
        scores = (scores - scores.amax(-1, keepdim=True)) / self.temperature
        best, token = scores.sort(dim=-1, descending=True, stable=True)
        if self.top_k is not None:
            best[..., self.top_k :] = -torch.inf
        likely = best.softmax(-1)
        if self.top_p is not None:
            # A token stays where the better ones alone do not reach the probability.
            better = likely.cumsum(-1) - likely
            likely = best.masked_fill(better >= self.top_p, -torch.inf).softmax(-1)
        return torch.zeros_like(likely).scatter(-1, token, likely)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
