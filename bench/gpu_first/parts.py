"""The first parts: the machine, the doctor's self-test, the tests. Imports no torch: children do, all at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.gpu.report import read
from bench.gpu_first.child import Child
from bench.gpu_first.pool import Pool, Result
from bench.gpu_first.run import Outcome, Run

TESTS = ("tests/attnzoo_kernels/gpu/test_gpu_runtime.py", "tests/attnzoo_kernels/gpu/test_gpu.py")
PLANTED_TESTS = "tests/bench/planted_faults.py"
REHEARSED = ("[16-16-float32]", "test_bad_input", "planted_faults")
REHEARSED_CHECKS = ("triton, float64, decoding", "blocked, float32, plain")
ITEM_SECONDS = {"self-test": 25.0, "tests": 60.0}
LENT_SECONDS = 60.0
START_SECONDS = 50.0
"""Until a worker's first item: many at once import torch from a cold disk."""
REHEARSED_SECONDS = 90.0
PLANTED_SECONDS = 2.0
SHOWN = 5
"""Failures that are printed at once."""
KEEP_EVERY = 15.0


def machine(run: Run, outcome: Outcome) -> None:
    """Asks the machine what it is; meanwhile lists what will be tried."""
    work = run.work
    facts = work / "machine.json"
    brought = [str(run.kernels)] if run.kernels is not None else []
    files = [*TESTS[1 if run.rehearse else 0 :], *([PLANTED_TESTS] if run.rehearse else [])]
    asked = [str(facts), str(work / "self-test.names.json"), run.device, *brought]
    children = {"machine": run.start("bench.gpu_first.machine", *asked, log=work / "logs" / "machine.log")}
    if run.triton:
        children["tests"] = run.start(
            "bench.gpu_first.pytest_worker", "--list", str(work / "tests.names.json"), *files,
            log=work / "logs" / "tests.list.log", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1",
        )  # fmt: skip
    # Nothing can be tried before it is listed: a cold disk may take of the next parts' time.
    end = time.monotonic() + (REHEARSED_SECONDS if run.rehearse else outcome.allowed + run.clock.scaled(LENT_SECONDS))
    codes = {name: child.wait(end - time.monotonic()) for name, child in children.items()}
    for name, code in codes.items():
        if code != 0:
            ending = "no end in time" if code is None else f"exit code {code}"
            outcome.wrong(f"{name}: {ending}: {children[name].last_words()}")
    run.facts = read(facts) or {}
    outcome.data = run.facts
    device = run.facts.get("device")
    # What took too long may still be there.
    run.blind = not run.rehearse and device is None and (bool(run.facts) or codes["machine"] is not None)
    if run.blind:
        outcome.wrong("torch finds no CUDA device")
    have = run.facts.get("versions", {})
    named = ", ".join(f"{name} {have.get(name) or 'missing'}" for name in ("python", "torch", "triton", "pytest"))
    outcome.said = f"{device['name'] if device else run.device}; {named}; {run.cores} cores"
    _brought(run, outcome)
    for finding in run.facts.get("doctor", []):
        if finding.startswith("problem") and not run.rehearse:
            outcome.wrong(f"the doctor: {finding}")


def _brought(run: Run, outcome: Outcome) -> None:
    against = run.facts.get("kernels")
    if run.kernels is None or against is None:
        return
    if against:
        outcome.said += f"; kernels brought along do not fit, and are compiled here: {'; '.join(against)}"
    else:
        outcome.said += "; kernels brought along fit"


class Told:
    """Prints the first failures as they come, a reason once, and counts."""

    def __init__(self, run: Run, outcome: Outcome) -> None:
        self._run = run
        self._outcome = outcome
        self._shown: set[str] = set()
        self.count: dict[str, int] = {}

    def __call__(self, result: Result) -> None:
        self.count[result.outcome] = self.count.get(result.outcome, 0) + 1
        if not result.bad:
            return
        self._outcome.wrong(f"{result.name}: {result.outcome}: {result.reason}")
        reason = result.reason[:60]
        if result.outcome != "not run" and reason not in self._shown and len(self._shown) < SHOWN:
            self._shown.add(reason)
            self._run.say(f"  {self._outcome.part}: {self._outcome.reasons[-1]}")

    @property
    def said(self) -> str:
        """How many of each outcome."""
        return ", ".join(f"{number} {outcome}" for outcome, number in sorted(self.count.items())) or "nothing ran"


def _pooled(run: Run, outcome: Outcome, names: list[str], start: Callable[[Path, Path, Path], Child]) -> None:
    part = outcome.part
    told = Told(run, outcome)
    kept = time.monotonic()

    def limit(name: str) -> float:
        if run.rehearse:
            return PLANTED_SECONDS if name.endswith("planted_hang") else REHEARSED_SECONDS
        return run.clock.scaled(ITEM_SECONDS[part] if name else START_SECONDS)

    def results() -> list[dict[str, Any]]:
        return [vars(result) for result in pool.results]

    def meanwhile() -> None:
        nonlocal kept
        if time.monotonic() - kept > KEEP_EVERY:
            outcome.data = results()
            run.keep()
            kept = time.monotonic()

    pool = Pool(start, run.work / "logs" / part, limit, told)
    seconds = max(outcome.allowed, REHEARSED_SECONDS) if run.rehearse else outcome.allowed
    pool.run(names, run.cores, seconds, meanwhile)
    outcome.data = results()
    outcome.said = told.said


def self_test(run: Run, outcome: Outcome) -> None:
    """The doctor's self-test on the device: each implementation against the reference in fp64."""
    names = read(run.work / "self-test.names.json")
    if names is None:
        outcome.said = "not run: its items could not be listed"
        outcome.wrong(outcome.said)
        return
    # The kernels first: the others cost little, and say less.
    names = [name for impl in run.impls[::-1] for name in names if name.startswith(f"{impl},")]
    if run.rehearse:
        names = [name for name in names if name in REHEARSED_CHECKS]

    def start(listed: Path, news: Path, log: Path) -> Child:
        return run.start("bench.gpu_first.selftest_worker", str(listed), str(news), run.device, log=log)

    _pooled(run, outcome, names, start)


def tests(run: Run, outcome: Outcome) -> None:
    """The tests on the GPU."""
    names = read(run.work / "tests.names.json")
    if not run.triton or names is None:
        missing = run.facts.get("versions", {}).get("pytest") is None
        why = "pytest is not installed" if missing else "they could not be listed"
        outcome.said = f"not run: {why if run.triton else 'triton was not asked for'}"
        outcome.wrong(outcome.said)
        return
    if run.rehearse:
        names = [name for name in names if any(text in name for text in REHEARSED)]

    def start(listed: Path, news: Path, log: Path) -> Child:
        return run.start(
            "bench.gpu_first.pytest_worker", str(listed), str(news), log=log,
            PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", TORCHINDUCTOR_COMPILE_THREADS="1",
        )  # fmt: skip

    _pooled(run, outcome, names, start)
