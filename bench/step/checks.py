"""Whether a step says what it must: itself computed otherwise, and the dense model where that is the same function.

Two ways of computing the same differ by rounding. How much that is says the dense model: its own step in fp32 beside
the same step in fp64, with the same keys and values. Of angles it says more: transformers computes those of rotation in
fp32, which is off by a rounding for each token that lies before, and layers that take a block's place compute them in
fp64. So the dense model is here twice, with its own angles and with exact ones, and a step has to agree with either.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.step.decoder import Decoder
from bench.step.rows import Contestant, copy_of

ROOM = 4.0
"""How much further two ways of computing the same may be apart than the dense model's step is from fp64."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a check found.

    Attributes:
        error: The largest difference to what a step must say, over the largest logit.
        bound: The most that it may be.
        wrong: What it differs from, and by how much; empty where it is right.
    """

    error: float
    bound: float
    wrong: str


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest value."""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1))


def in_double(model: Any) -> Any:
    """The model in fp64."""
    return copy.deepcopy(model).double()


class ExactAngles(nn.Module):
    """What a Llama of transformers asks for cosines and sines, computed in fp64.

    Args:
        rotary: The model's own, of plain rotation.
        base: Of its frequencies.
    """

    def __init__(self, rotary: Any, base: float) -> None:
        super().__init__()
        width = 2 * rotary.inv_freq.numel()
        self.frequencies = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[B, T, D]`` in the dtype of ``x``."""
        angles = position_ids.unsqueeze(-1).double() * self.frequencies
        both = torch.cat([angles, angles], -1)
        return both.cos().to(x.dtype), both.sin().to(x.dtype)


def with_exact_angles(model: Any) -> Any:
    """The model with the angles of rotation in fp64; weights are its own."""
    other = copy_of(model)
    other.model.rotary_emb = ExactAngles(model.model.rotary_emb, model.config.rope_parameters["rope_theta"])
    return other


def floor(dense: Decoder, exact: Any) -> float:
    """How far a step of the dense model is from the same in fp64, with the same keys and values in its cache.

    Args:
        dense: The dense model behind a text; it stays there.
        exact: The same in fp64.
    """
    twin = dense.fork()
    twin.model = exact
    for cache in twin.cache.values():
        for layer in cache.layers:
            layer.keys = layer.keys.double()
            layer.values = layer.values.double()
    return difference(dense.fork().step(), twin.step())


def check(row: Contestant, runner: Decoder, references: Sequence[Decoder], *, floor: float, whole: bool) -> Finding:
    """The largest difference of a step to what it must say: itself the slow way, with no cache, or the dense model.

    Args:
        row: The contestant.
        runner: It, behind a text; goes on by a token.
        references: The dense model behind the same text, with its own angles and with exact ones.
        floor: How far a step of the dense model is from fp64.
        whole: Whether the whole text is computed without a cache too.
    """
    expected = {}
    if not row.evicts:
        expected["the same step with gradients wanted"] = [runner.slow_step()]
    if whole:
        expected["the whole text without a cache"] = [runner.full_forward()]
    if row.exact:
        expected["the dense model"] = [reference.slow_step() for reference in references]
    tokens = runner.at
    found = runner.step()
    bound = ROOM * floor
    errors = {name: min(difference(found, one) for one in logits) for name, logits in expected.items()}
    # Neither is a difference that is no number within a bound.
    off = [f"{name} by {error:.1e}" for name, error in errors.items() if not error <= bound]
    wrong = f"{row.name}: a step behind {tokens} tokens differs from {' and '.join(off)}, more than {bound:.1e}"
    return Finding(error=max(errors.values(), default=0.0), bound=bound, wrong=wrong if off else "")
