"""Measuring a causal language model: likelihood on text, what its attention reads, and decoding speed.

Letters: n windows, L tokens in a window, V vocabulary.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from attnzoo.base.recording import Recording, has_layers, record
from attnzoo.base.steps import Plan
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
    """

    nll: tuple[float, ...]
    density: float
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
    density = 1.0
    probe = torch.empty(0, device="cpu")
    for done, window in enumerate(windows):
        ids = window.unsqueeze(0)
        with torch.no_grad():
            if done == 0:
                logits, density = _watched(model, ids)
                probe = logits[-PROBE_ROWS:].clone()
            else:
                logits = model(ids, use_cache=False).logits[0].float()
            nll.append(float(cross_entropy(logits[:-1], window[1:])))
        if progress is not None:
            progress("scoring", done + 1, len(windows))
    return Score(tuple(nll), density, probe)


def _watched(model: Any, ids: Tensor) -> tuple[Tensor, float]:
    """Logits of one window, and the density that the layers' own plans say."""
    if not has_layers(model):
        return model(ids, use_cache=False).logits[0].float(), 1.0
    with record(model) as seen:
        logits = model(ids, use_cache=False).logits[0].float()
    return logits, _mean_of_plans(seen, lambda plan: plan.density)


def cache_of(output: Any) -> dict[str, Any]:
    """The cache in a model's output, as an argument of its next call: versions of transformers name it differently."""
    return {name: value for name, value in output.items() if hasattr(value, "get_seq_length")}


def _mean_of_plans(seen: Recording, measure: Callable[[Plan], float]) -> float:
    """The mean over all recorded calls; layers that share a layout, and rows, are measured once."""
    plans = [plan for layer in seen.plans.values() for plan in layer]
    known: dict[tuple[int, int], float] = {}
    for plan in plans:
        if _rows_and_blocks(plan) not in known:
            known[_rows_and_blocks(plan)] = measure(plan)
    return statistics.fmean(known[_rows_and_blocks(plan)] for plan in plans) if plans else 1.0


def _rows_and_blocks(plan: Plan) -> tuple[int, int]:
    return id(plan.layout), id(plan.extras.q_pos)


def _read_share(plan: Plan) -> float:
    q_pos = plan.extras.q_pos
    # A head that leaves its row out reads nothing.
    present = 1.0 if q_pos is None else float((q_pos >= 0).double().mean())
    return present * float(plan.layout.kv_rows().double().mean()) / plan.layout.seq_k


@dataclass(frozen=True)
class Decoding:
    """What decoding one sequence costs.

    Attributes:
        tokens_per_s: From the median time of a step; differs from run to run.
        read_share: Key slots that a step gathers over all slots, mean over layers and heads; 1 without attnzoo layers.
    """

    tokens_per_s: float
    read_share: float


def decode(model: Any, prompt: Tensor, *, steps: int = 12, warm_up: int = 2) -> Decoding:
    """Decodes behind a prompt, greedily.

    Args:
        model: A model with ``generate``'s kind of cache.
        prompt: int64 ``[L]``.
        steps: Steps timed.
        warm_up: Steps before, at least one, not timed.
    """
    times = []
    with torch.no_grad():
        out = model(prompt.unsqueeze(0), use_cache=True)

        def step() -> Any:
            token = out.logits[:, -1:].argmax(-1)
            return model(token, **cache_of(out), use_cache=True)

        share = 1.0
        with record(model) if has_layers(model) else nullcontext() as seen:
            out = step()
        if seen is not None:
            share = _mean_of_plans(seen, _read_share)
        for done in range(1, warm_up + steps):
            begin = time.perf_counter()
            out = step()
            if done >= warm_up:
                times.append(time.perf_counter() - begin)
    return Decoding(1.0 / statistics.median(times), share)
