"""Measuring a causal language model: likelihood on text, what its attention reads, and decoding speed.

Letters: n windows, L tokens in a window, V vocabulary.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from attnzoo.record import has_layers, record
from attnzoo.records import Plan
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
        read_share: Key slots gathered for the last query block over all slots, mean over layers and heads.
        probe: Logits ``[PROBE_ROWS, V]`` at the end of the first window.
    """

    nll: tuple[float, ...]
    density: float
    read_share: float
    probe: Tensor

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
    density = read_share = 1.0
    probe = torch.empty(0)
    for done, window in enumerate(windows):
        ids = window.unsqueeze(0)
        with torch.no_grad():
            if done == 0:
                logits, density, read_share = _watched(model, ids)
                probe = logits[-PROBE_ROWS:].clone()
            else:
                logits = model(ids, use_cache=False).logits[0].float()
            nll.append(float(cross_entropy(logits[:-1], window[1:])))
        if progress is not None:
            progress("scoring", done + 1, len(windows))
    return Score(tuple(nll), density, read_share, probe)


def _watched(model: Any, ids: Tensor) -> tuple[Tensor, float, float]:
    """Logits of one window, with density and the share of slots read, as the layers' own plans say."""
    if not has_layers(model):
        return model(ids, use_cache=False).logits[0].float(), 1.0, 1.0
    with record(model) as seen:
        logits = model(ids, use_cache=False).logits[0].float()
    plans = [plan for layer in seen.plans.values() for plan in layer]
    if not plans:
        return logits, 1.0, 1.0
    known: dict[int, tuple[float, float]] = {}
    for plan in plans:
        if id(plan.layout) not in known:
            known[id(plan.layout)] = (plan.density, _read_share(plan))
    pairs = [known[id(plan.layout)] for plan in plans]
    return logits, statistics.fmean(d for d, _ in pairs), statistics.fmean(s for _, s in pairs)


def _read_share(plan: Plan) -> float:
    rows = plan.layout.kv_rows()[..., -1].double()
    return float(rows.mean()) / plan.layout.seq_k


def decode_speed(model: Any, prompt: Tensor, *, steps: int = 12, warm_up: int = 2) -> float:
    """Tokens a second when decoding one sequence after a prompt: from the median time of a step.

    Args:
        model: A model with ``generate``'s kind of cache (``past_key_values``).
        prompt: int64 ``[L]``.
        steps: Steps timed.
        warm_up: Steps before, not timed.
    """
    times = []
    with torch.no_grad():
        out = model(prompt.unsqueeze(0), use_cache=True)
        for step in range(warm_up + steps):
            token = out.logits[:, -1:].argmax(-1)
            begin = time.perf_counter()
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            if step >= warm_up:
                times.append(time.perf_counter() - begin)
    return 1.0 / statistics.median(times)
