"""How quickly a model goes on behind a prompt, beside the dense model in the same rounds.

Letters: L tokens read, V vocabulary.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from attnzoo.base.recording import Recording, has_layers, record
from attnzoo.base.steps import Plan
from attnzoo.evaluation import timing
from attnzoo.surgery.hosts.calls import cache_name

PIECE = 1024
"""Tokens of a prompt that are read at once."""

ROUNDS = 8
"""Steps timed of each model."""

STEPS = ROUNDS + 2
"""Steps that each model takes: one is looked at, and one warms up."""


@dataclass(frozen=True)
class Decoding:
    """What decoding one sequence costs.

    Attributes:
        tokens: Tokens read before.
        tokens_per_s: From the median time of a step; differs from run to run.
        times_dense: A step's time over the dense model's, median of rounds; differs from run to run.
        read_share: Key slots that a step gathers over all slots, mean over layers and heads; 1 without attnzoo layers.
    """

    tokens: int
    tokens_per_s: float
    times_dense: float
    read_share: float


class Continuation:
    """A model and what it has read of one sequence, to be continued.

    Args:
        model: A causal language model with ``.logits`` and a cache in its output.
        cache: An empty cache to begin with; ``None`` means the model's own.

    Attributes:
        model: The same.
        tokens: Tokens read.
    """

    def __init__(self, model: Any, *, cache: Any = None) -> None:
        self.model = model
        self.tokens = 0
        self._cache: dict[str, Any] = {} if cache is None else {cache_name(type(model).forward): cache}
        self._next = torch.empty(0, dtype=torch.int64, device="cpu")

    @property
    def cache(self) -> Any:
        """What the model remembers; ``None`` where it has read nothing and makes its own."""
        return next(iter(self._cache.values()), None)

    def read_all(self, ids: Tensor) -> Tensor:
        """Reads tokens, int64 ``[L]``, at once; gives their logits ``[L, V]``."""
        return self._read(ids)[0].float()

    def read(self, ids: Tensor) -> None:
        """Reads tokens, int64 ``[any]``, a piece at a time; no logits but the last are computed."""
        for part in ids.split(PIECE):
            self._read(part, logits_to_keep=1)

    def step(self) -> None:
        """Reads the likeliest next token."""
        self._read(self._next)

    def copy(self) -> Continuation:
        """The same sequence once more, with a cache of its own."""
        other = Continuation(self.model)
        other.tokens = self.tokens
        other._next = self._next
        other._cache = deepcopy(self._cache)
        return other

    def _read(self, ids: Tensor, **options: int) -> Tensor:
        with torch.no_grad():
            out = self.model(ids.unsqueeze(0), **self._cache, **options, use_cache=True)
        self._cache = cache_of(out)
        self._next = out.logits[0, -1:].argmax(-1)
        self.tokens += len(ids)
        logits: Tensor = out.logits
        return logits


def cache_of(output: Any) -> dict[str, Any]:
    """The cache in a model's output, as an argument of its next call: versions of transformers name it differently."""
    return {name: value for name, value in output.items() if hasattr(value, "get_seq_length")}


def twin_of(model: Any) -> Any:
    """A second model that computes with the very same weights; what is done to the first one's modules is not seen."""
    tensors: Iterable[Tensor] = chain(model.parameters(), model.buffers())
    return deepcopy(model, {id(x): x for x in tensors})


def race(sequence: Continuation, dense: Continuation) -> Decoding:
    """Decodes greedily, in turns with the dense model behind as many tokens; both sequences go on.

    Args:
        sequence: Of the model that is measured.
        dense: Of the dense one.
    """
    tokens = sequence.tokens
    share = 1.0
    with record(sequence.model) if has_layers(sequence.model) else nullcontext() as seen:
        sequence.step()
    dense.step()
    if seen is not None:
        share = mean_of_plans(seen, read_share)
    found = timing.rounds(
        {"dense": dense.step, "this": sequence.step},
        wall=timing.by_wall(sequence.model.device),
        least=ROUNDS,
        most=ROUNDS,
    )
    speed = 1e3 / timing.middle(found)["this"]
    return Decoding(tokens, speed, timing.paired(found, "this", "dense"), share)


def read_share(plan: Plan) -> float:
    """Key slots that are gathered over all slots; a head that leaves its row out reads nothing."""
    q_pos = plan.extras.q_pos
    present = 1.0 if q_pos is None else float((q_pos >= 0).double().mean())
    return present * float(plan.layout.kv_rows().double().mean()) / plan.layout.seq_k


def mean_of_plans(seen: Recording, measure: Callable[[Plan], float]) -> float:
    """The mean over all recorded calls; layers that share a layout, and rows, are measured once."""
    plans = [plan for layer in seen.plans.values() for plan in layer]
    known: dict[tuple[int, int], float] = {}
    for plan in plans:
        if _rows_and_blocks(plan) not in known:
            known[_rows_and_blocks(plan)] = measure(plan)
    return statistics.fmean(known[_rows_and_blocks(plan)] for plan in plans) if plans else 1.0


def _rows_and_blocks(plan: Plan) -> tuple[int, int]:
    return id(plan.layout), id(plan.extras.q_pos)
