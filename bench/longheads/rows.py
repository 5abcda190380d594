"""Ways of reading a long window, and what each gives: perplexity by position, and how many keys a step reads."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from attnzoo import surgery
from attnzoo.base.recording import has_layers, record
from attnzoo.evaluation.decoding import cache_of
from attnzoo.evaluation.model_scores import Progress

FAR = 12_288
STEPS = 8
"""Tokens at the end that are decoded one by one."""

SPAN = 2048
PIECE = 1024
"""Positions whose logits are held at once: all of them would be gigabytes."""

Conversion = tuple[str, dict[str, Any]] | None


def longheads(length: int, chunk: int, **options: Any) -> Conversion:
    """One setting; if nothing else is said a block of tokens chooses together, which is quicker in a long prefill."""
    return "longheads", {"attention_length": length, "chunk_size": chunk, "select": "block", **options}


ROWS: dict[str, Conversion] = {
    "dense": None,
    "window 4096": ("mha", {"window": 4096}),
    "longheads 2048, chunks of 256": longheads(2048, 256),
    "longheads 1024, chunks of 64": longheads(1024, 64),
    "longheads 1024, chunks of 64, each token": longheads(1024, 64, select="token"),
    "longheads 2048, chunks of 64": longheads(2048, 64),
    "longheads 4096, chunks of 256": longheads(4096, 256),
    "longheads 2048, chunks of 256, mean keys": longheads(2048, 256, chunk_rep="mean_key"),
    "window 4096, sink 4": ("mha", {"window": 4096, "sink": 4}),
    "longheads 2048, chunks of 128": longheads(2048, 128),
    "longheads 1024, chunks of 256": longheads(1024, 256),
}


@dataclass(frozen=True)
class Reading:
    """One way of reading.

    Attributes:
        name: What it is called.
        options: How the model was converted.
        perplexity: For each span of ``SPAN`` positions.
        far: Perplexity of the tokens at ``FAR`` and beyond.
        keys: The most key slots that a head gathers for one decoding step at the end.
        same: Largest difference of a token's loss to dense before the first token that selects; ``None`` where none is.
        seconds: Measured; differs from run to run.
    """

    name: str
    options: dict[str, Any]
    perplexity: list[float]
    far: float
    keys: int
    same: float | None
    seconds: float


def losses(model: Any, window: Tensor) -> tuple[Tensor, int]:
    """The loss of each token but the first, ``[L - 1]``, and the most keys that a head gathers for a step.

    The last tokens are decoded one by one, behind a prefill of the others.
    """
    ids = window.unsqueeze(0)
    keys = len(window)
    with torch.no_grad():
        out = model.model(ids[:, :-STEPS], use_cache=True)
        hidden = [out.last_hidden_state[0]]
        cache = cache_of(out)
        with record(model) if has_layers(model) else nullcontext() as seen:
            for t in range(len(window) - STEPS, len(window)):
                out = model.model(ids[:, t : t + 1], **cache, use_cache=True)
                hidden.append(out.last_hidden_state[0])
        if seen is not None:
            keys = max(int(plan.layout.kv_rows().max()) for plans in seen.plans.values() for plan in plans)
        states = torch.cat(hidden)[:-1]
        parts = [
            cross_entropy(model.lm_head(state).float(), target, reduction="none")
            for state, target in zip(states.split(PIECE), window[1:].split(PIECE), strict=True)
        ]
    return torch.cat(parts), keys


def measure(model: Any, window: Tensor, name: str, dense: Tensor | None) -> tuple[Reading, Tensor]:
    """One row, and the loss of each token."""
    conversion = ROWS[name]
    begin = time.perf_counter()
    report = None
    if conversion is not None:
        with warnings.catch_warnings():
            # A window without a sink is wanted here.
            warnings.simplefilter("ignore", UserWarning)
            report = surgery.convert(model, conversion[0], **conversion[1])
    try:
        loss, keys = losses(model, window)
    finally:
        if report is not None:
            report.undo()
    options = {} if conversion is None else {"variant": conversion[0], **conversion[1]}
    same = None
    if dense is not None and options.get("variant") == "longheads":
        first = options["attention_length"]
        same = float((loss - dense)[:first].abs().max())
    # The loss at place i is that of the token at position i + 1.
    spans = [loss[max(0, a - 1) : a + SPAN - 1] for a in range(0, len(window), SPAN)]
    perplexity = [math.exp(float(span.mean())) for span in spans]
    far = math.exp(float(loss[FAR - 1 :].mean())) if len(window) > FAR else math.nan
    return Reading(name, options, perplexity, far, keys, same, time.perf_counter() - begin), loss


def run(names: list[str], window: Tensor, model: Any, progress: Progress) -> Iterator[Reading]:
    """All rows; dense first, if it is among them."""
    dense = None
    for done, name in enumerate(sorted(names, key=lambda name: name != "dense")):
        progress(name, done, len(names))
        row, loss = measure(model, window, name, dense)
        dense = loss if name == "dense" else dense
        yield row
