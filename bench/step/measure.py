"""Steps that are checked and then timed: a contestant and the dense model take turns in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from attnzoo.evaluation.model_scores import Progress
from bench.step import checks
from bench.step.decoder import Decoder
from bench.step.rows import DENSE, Contestant, copy_of


@dataclass(frozen=True, kw_only=True)
class StepReading:
    """What a step of one contestant costs behind so many tokens.

    Attributes:
        name: Of the contestant.
        tokens: In the cache.
        ms: Milliseconds of a step, the median; ``None`` of what is wrong, as are the next two.
        dense_ms: Of the dense model's, in the same rounds.
        ratio: The median ratio of a round.
        must: The most that it may be, or ``None``.
        cache_bytes: What the cache takes.
        token_bytes: What keys and values of the tokens take in the dense model.
        error: The largest difference to what it must say.
        bound: The most that it may be.
        wrong: What it differs from, and by how much; empty where it is right.
    """

    name: str
    tokens: int
    ms: float | None = None
    dense_ms: float | None = None
    ratio: float | None = None
    must: float | None
    cache_bytes: int
    token_bytes: int
    error: float
    bound: float
    wrong: str = ""

    @property
    def holds(self) -> bool | None:
        """Whether it is right and as quick as it must be; ``None`` where it is right and there is no bound."""
        if self.ratio is None:
            return False
        return None if self.must is None else self.ratio <= self.must


def take_turns(steps: Sequence[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """Milliseconds of each one's calls, round by round, in CPU time of this thread; two rounds before are not timed."""
    found: list[list[float]] = [[] for _ in steps]
    for done in range(rounds + 2):
        for times, step in zip(found, steps, strict=True):
            begin = time.thread_time()
            step()
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


@dataclass(frozen=True, kw_only=True)
class Start:
    """The dense model behind so many tokens.

    Attributes:
        dense: The sequence; who goes on takes a fork.
        exact: The same with the angles of rotation in fp64.
        floor: How far a step is from the same in fp64.
    """

    dense: Decoder
    exact: Decoder
    floor: float


def starts_of(model: Any, text: Tensor, lengths: Sequence[int], progress: Progress) -> dict[int, Start]:
    """The dense model behind each of the lengths."""
    found = {}
    dense = Decoder(model, text, None)
    exact = Decoder(checks.with_exact_angles(model), text, None)
    double = checks.in_double(model)
    for done, length in enumerate(lengths):
        progress(f"{DENSE}: {length} tokens", done, len(lengths))
        for sequence in (dense, exact):
            sequence.read(length)
        found[length] = Start(dense=dense.fork(), exact=exact.fork(), floor=checks.floor(dense, double))
    return found


def run(
    model: Any,
    text: Tensor,
    rows: Sequence[Contestant],
    settings: Settings,
    progress: Progress,
    *,
    known: Callable[[str, int], bool] = lambda name, tokens: False,
) -> Iterator[StepReading]:
    """Readings of all contestants at all lengths; what is wrong is not timed.

    Args:
        model: The dense model; it is left as it was.
        text: Tokens int64 ``[1, L]``: L more than the longest length by some dozens. The last 1,024 calibrate.
        rows: The contestants.
        settings: What is measured.
        progress: Told of each reading.
        known: Whether a contestant has been measured behind so many tokens, and is left out there.
    """
    left = {row.name: [length for length in settings.lengths if not known(row.name, length)] for row in rows}
    starts = starts_of(model, text, sorted(set().union(*left.values())), progress)
    for done, row in enumerate(rows):
        if not left[row.name]:
            continue
        converted = copy_of(model)
        row.convert(converted, text[:, -1024:].view(4, -1))
        runner = Decoder(converted, text, row.cache(converted))
        for length in left[row.name]:
            progress(f"{row.name}: {length} tokens", done, len(rows))
            runner.read(length)
            whole = settings.whole and length == settings.lengths[0]
            yield _reading(row, runner, starts[length], rounds=settings.rounds, whole=whole)


def _reading(row: Contestant, runner: Decoder, start: Start, *, rounds: int, whole: bool) -> StepReading:
    dense = start.dense.fork()
    tokens = dense.at
    token_bytes = dense.cache_bytes // tokens
    finding = checks.check(row, runner, (dense, start.exact), floor=start.floor, whole=whole)
    times: dict[str, float] = {}
    if not finding.wrong:
        dense.step()
        ours, theirs = take_turns((runner.step, dense.step), rounds)
        times["ms"] = statistics.median(ours)
        times["dense_ms"] = statistics.median(theirs)
        times["ratio"] = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    return StepReading(
        name=row.name,
        tokens=tokens,
        must=row.must.get(tokens),
        cache_bytes=runner.cache_bytes,
        token_bytes=token_bytes * runner.at,
        error=finding.error,
        bound=finding.bound,
        wrong=finding.wrong,
        **times,
    )
