"""Measuring: contestants take turns in one process, and what counts is the median, of ratios as of times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many CPU threads until the end of the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def medians(
    contestants: Mapping[str, Callable[[], Any]], *, wall: bool, seconds: float = 6.0, least: int = 5, most: int = 41
) -> dict[str, float]:
    """Milliseconds of each contestant, the median of :func:`rounds`."""
    return middle(rounds(contestants, wall=wall, seconds=seconds, least=least, most=most))


def middle(found: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each contestant's rounds."""
    return {name: statistics.median(values) for name, values in found.items()}


def paired(found: Mapping[str, list[float]], first: str, second: str) -> float:
    """The median ratio of two contestants in the same round: a machine that is slow for a while is so for both."""
    return statistics.median(a / b for a, b in zip(found[first], found[second], strict=True))


def by_wall(device: torch.device) -> bool:
    """Whether wall time counts: of one thread on a shared machine, the time that it really ran says more."""
    return device.type != "cpu" or torch.get_num_threads() > 1


def rounds(
    contestants: Mapping[str, Callable[[], Any]],
    *,
    wall: bool,
    seconds: float = 6.0,
    least: int = 5,
    most: int = 41,
    before: Mapping[str, Callable[[], Any]] | None = None,
) -> dict[str, list[float]]:
    """Milliseconds of each contestant, round by round; in a round each runs once.

    Args:
        contestants: By name; each is warmed up once.
        wall: Whether wall time counts; else the calling thread's CPU time, which on a shared machine says more about
            one thread.
        seconds: About how long to measure.
        least: Fewest rounds.
        most: Most rounds.
        before: What some contestants need done before each of their runs, by name; it is not timed.
    """
    clock = time.perf_counter if wall else time.thread_time
    before = before or {}

    def timed(name: str) -> float:
        if name in before:
            before[name]()
        start = clock()
        contestants[name]()
        return (clock() - start) * 1e3

    for name in contestants:
        timed(name)
    found: dict[str, list[float]] = {name: [] for name in contestants}
    begin = time.perf_counter()
    for done in range(most):
        for name in contestants:
            found[name].append(timed(name))
        if done + 1 >= least and time.perf_counter() - begin > seconds:
            break
    return found
