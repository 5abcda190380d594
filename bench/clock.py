"""Measuring: contestants take turns in one process, and what counts is the median.

On a shared machine the time that a thread really ran says more than a clock on the wall, so that single-threaded rows
go by that. Peak memory is measured in a process of its own.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def threads(count: int) -> Any:
    """Runs with so many threads."""
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


def rounds(
    contestants: Mapping[str, Callable[[], Any]], *, wall: bool, seconds: float = 6.0, least: int = 5, most: int = 41
) -> dict[str, list[float]]:
    """Milliseconds of each contestant, round by round; in a round each runs once.

    Args:
        contestants: By name; each is warmed up once.
        wall: Whether wall time counts; else the calling thread's CPU time.
        seconds: About how long to measure.
        least: Fewest rounds.
        most: Most rounds.
    """
    clock = time.perf_counter if wall else time.thread_time
    for run in contestants.values():
        run()
    found: dict[str, list[float]] = {name: [] for name in contestants}
    begin = time.perf_counter()
    for done in range(most):
        for name, run in contestants.items():
            start = clock()
            run()
            found[name].append((clock() - start) * 1e3)
        if done + 1 >= least and time.perf_counter() - begin > seconds:
            break
    return found


def peak_growth(program: str, *arguments: str) -> float:
    """MiB by which memory peaks above what is held when a program calls ``ready()``; a process of its own.

    Args:
        program: Python source; ``ready()`` marks the point from which growth counts.
        *arguments: For ``sys.argv``.
    """
    prelude = (
        "import sys\n"
        "def memory(name):\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024\n"
        "held = None\n"
        "def ready():\n"
        "    global held\n"
        "    open('/proc/self/clear_refs', 'w').write('5')\n"  # the peak starts anew from what is held
        "    held = memory('VmRSS')\n"
    )
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    source = f"{prelude}{program}\nprint(memory('VmHWM') - held)\n"
    done = subprocess.run(
        [sys.executable, "-c", source, *arguments], env=env, check=True, capture_output=True, text=True, cwd=ROOT
    )
    return float(done.stdout.strip().splitlines()[-1])
