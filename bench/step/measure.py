"""Filling caches, checking steps, and timing them: a contestant and the dense model take turns in one process."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo.evaluation.decoding import cache_of
from attnzoo.evaluation.model_scores import Progress
from attnzoo.surgery.hosts.calls import cache_name
from bench.contestants import Wrong
from bench.step.rows import DENSE, Contestant, copy_of

SAME = 1e-5
"""Largest difference of logits, over the largest of them, of two ways of computing the same."""

CHUNK = 512


@dataclass(frozen=True, kw_only=True)
class StepReading:
    """What a step of one contestant costs behind so many tokens.

    Attributes:
        name: Of the contestant.
        tokens: In the cache.
        ms: Milliseconds of a step, the median.
        dense_ms: Of the dense model's, in the same rounds.
        ratio: The median ratio of a round.
        must: The most that it may be, or ``None``.
        cache_bytes: What the cache takes.
        token_bytes: What keys and values of the tokens take in the dense model.
        error: The largest difference to what it must say.
    """

    name: str
    tokens: int
    ms: float
    dense_ms: float
    ratio: float
    must: float | None
    cache_bytes: int
    token_bytes: int
    error: float

    @property
    def holds(self) -> bool | None:
        """Whether the bound holds; ``None`` where there is none."""
        return None if self.must is None else self.ratio <= self.must


class Decoder:
    """A model in the middle of a text: its cache holds the tokens up to ``at``."""

    def __init__(self, model: Any, text: Tensor, cache: Any) -> None:
        self.model = model
        self.text = text
        self.cache: dict[str, Any] = {} if cache is None else {cache_name(type(model).forward): cache}
        self.at = 0

    def read(self, end: int) -> None:
        """Reads the text up to a token, in chunks."""
        while self.at < end:
            self._call(min(end, self.at + CHUNK))

    def step(self) -> Tensor:
        """Reads one token, and gives the logits of the next."""
        return self._call(self.at + 1)

    def _call(self, end: int) -> Tensor:
        with torch.no_grad():
            said = self.model(self.text[:, self.at : end], **self.cache, use_cache=True, logits_to_keep=1)
        self.cache = cache_of(said)
        self.at = end
        logits: Tensor = said.logits[0, -1]
        return logits

    def fork(self) -> Decoder:
        """Another with a cache of its own."""
        other = Decoder(self.model, self.text, None)
        other.cache = {name: copy.deepcopy(cache) for name, cache in self.cache.items()}
        other.at = self.at
        return other

    def slow_step(self) -> Tensor:
        """What a step says where gradients are wanted, for which nothing is cut short; the cache stays as it is."""
        caches = {name: copy.deepcopy(cache) for name, cache in self.cache.items()}
        with torch.enable_grad():
            said = self.model(self.text[:, self.at : self.at + 1], **caches, use_cache=True, logits_to_keep=1)
        logits: Tensor = said.logits[0, -1].detach()
        return logits

    def full_forward(self) -> Tensor:
        """What a step says where no cache is."""
        with torch.no_grad():
            said = self.model(self.text[:, : self.at + 1], use_cache=False, logits_to_keep=1)
        logits: Tensor = said.logits[0, -1]
        return logits

    @property
    def cache_bytes(self) -> int:
        """What the cache takes."""
        return sum(layer_bytes(layer) for cache in self.cache.values() for layer in cache.layers)


def layer_bytes(layer: Any) -> int:
    """What a layer of a cache takes, the room for more tokens among it."""
    if getattr(layer, "memory", None) is not None:
        return int(layer.memory.nbytes)
    if hasattr(layer, "nbytes"):
        return int(layer.nbytes)
    return int(sum(x.numel() * x.element_size() for x in (layer.keys, layer.values)))


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest value."""
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1))


def check(row: Contestant, runner: Decoder, dense: Decoder, *, whole: bool) -> float:
    """The largest difference of a step to what it must say: itself the slow way, with no cache, or the dense model.

    Raises:
        Wrong: If it is too large.
    """
    expected = {}
    if not row.evicts:
        expected["the same step with gradients wanted"] = runner.slow_step()
    if whole:
        expected["the whole text without a cache"] = runner.full_forward()
    if row.exact:
        expected["the dense model"] = dense.slow_step()
    found = runner.step()
    worst = 0.0
    for name, logits in expected.items():
        error = difference(found, logits)
        if not error <= SAME:
            raise Wrong(f"{row.name}: a step behind {runner.at - 1} tokens differs from {name} by {error:.1e}")
        worst = max(worst, error)
    return worst


def take_turns(runners: Sequence[Decoder], rounds: int) -> list[list[float]]:
    """Milliseconds of each one's steps, round by round, in CPU time of this thread; two rounds before are not timed."""
    found: list[list[float]] = [[] for _ in runners]
    for done in range(rounds + 2):
        for times, runner in zip(found, runners, strict=True):
            begin = time.thread_time()
            runner.step()
            if done >= 2:
                times.append((time.thread_time() - begin) * 1e3)
    return found


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured.

    Attributes:
        lengths: Tokens in the cache, ascending.
        rounds: Steps timed of each contestant.
        whole: Whether the shortest length is also checked against a call without a cache.
    """

    lengths: Sequence[int]
    rounds: int = 25
    whole: bool = True


def run(
    model: Any, text: Tensor, rows: Sequence[Contestant], settings: Settings, progress: Progress
) -> Iterator[StepReading]:
    """Readings of all contestants at all lengths.

    Args:
        model: The dense model; it is left as it was.
        text: Tokens int64 ``[1, L]``: L more than the longest length by some dozens. The last 1,024 calibrate.
        rows: The contestants.
        settings: What is measured.
        progress: Told of each reading.

    Raises:
        Wrong: If a contestant does not say what it must.
    """
    longest = Decoder(model, text, None)
    starts = {}
    for length in settings.lengths:
        progress(f"{DENSE}: {length} tokens", 0, len(rows))
        longest.read(length)
        starts[length] = longest.fork()
    token_bytes = longest.cache_bytes // longest.at
    for done, row in enumerate(rows):
        converted = copy_of(model)
        row.convert(converted, text[:, -1024:].view(4, -1))
        runner = Decoder(converted, text, row.cache(converted))
        for length in settings.lengths:
            progress(f"{row.name}: {length} tokens", done, len(rows))
            runner.read(length)
            dense = starts[length].fork()
            error = check(row, runner, dense, whole=settings.whole and length == settings.lengths[0])
            dense.step()
            ours, theirs = take_turns((runner, dense), settings.rounds)
            yield StepReading(
                name=row.name,
                tokens=length,
                ms=statistics.median(ours),
                dense_ms=statistics.median(theirs),
                ratio=statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
                must=row.must.get(length),
                cache_bytes=runner.cache_bytes,
                token_bytes=token_bytes * runner.at,
                error=error,
            )
