"""Measuring a causal language model: likelihood on text, and what its attention reads.

Letters: n windows, L tokens in a window, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from attnzoo.base.recording import has_layers, record
from attnzoo.evaluation.decoding import Continuation, mean_of_plans
from attnzoo.reporting.warn import silent
from attnzoo_kernels.errors import ConfigError

Progress = Callable[[str, int, int], None]

PROBE_ROWS = 32
"""Positions at the end of the first window whose logits are kept for comparing models."""


@dataclass(frozen=True, eq=False)
class Score:
    """How a model does on some windows.

    Attributes:
        nll: Negative log-likelihood of each window in nats per token; all but a window's first token are scored.
        density: Visible (query, key) pairs over those of dense attention, over all layers; 1 without attnzoo layers.
        probe: Logits ``[PROBE_ROWS, V]`` at the end of the first window.
        sequence: The first window as the model has read it; decoding may go on behind it.
    """

    nll: tuple[float, ...]
    density: float
    probe: Tensor
    sequence: Continuation

    @property
    def mean_nll(self) -> float:
        """Mean over windows, which all score as many tokens."""
        return sum(self.nll) / len(self.nll)

    @property
    def perplexity(self) -> float:
        """The exponential of the mean."""
        return math.exp(self.mean_nll)


def cut_windows(tokens: Tensor, *, length: int, offset: int, count: int) -> Tensor:
    """Windows that follow each other, int64 ``[n, L]``.

    Args:
        tokens: int64 ``[any]``.
        length: L, in tokens.
        offset: Tokens before the first window.
        count: n.

    Raises:
        ConfigError: If a number is out of range or the text is too short.
    """
    for name, value, least in (("length", length, 2), ("offset", offset, 0), ("windows", count, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name}: expected an int from {least}, got {value!r}")
    end = offset + length * count
    if end > tokens.shape[0]:
        raise ConfigError(f"text: expected {end} tokens for {count} windows of {length}, got {tokens.shape[0]}")
    return tokens[offset:end].view(count, length)


def score(model: Any, windows: Tensor, *, progress: Progress | None = None) -> Score:
    """Scores windows one at a time.

    Args:
        model: A causal language model with ``.logits`` in its output.
        windows: int64 ``[n, L]``.
        progress: Told of each window.
    """
    nll: list[float] = []
    density = 1.0
    probe = torch.empty(0, device="cpu")
    sequence = Continuation(model)
    for done, window in enumerate(windows):
        with torch.no_grad():
            if done == 0:
                logits, density = _watched(sequence, window)
                probe = logits[-PROBE_ROWS:].clone()
            else:
                # Of a policy that chooses behind a prompt the table says that one forward says nothing.
                with silent():
                    logits = model(window.unsqueeze(0), use_cache=False).logits[0].float()
            nll.append(float(cross_entropy(logits[:-1], window[1:])))
        if progress is not None:
            progress("scoring", done + 1, len(windows))
    return Score(tuple(nll), density, probe, sequence)


def _watched(sequence: Continuation, window: Tensor) -> tuple[Tensor, float]:
    """Logits of one window, and the density that the layers' own plans say."""
    if not has_layers(sequence.model):
        return sequence.read_all(window), 1.0
    with record(sequence.model) as seen:
        logits = sequence.read_all(window)
    return logits, mean_of_plans(seen, lambda plan: plan.density)
