"""Many short items in a few processes: one that hangs or crashes costs its own item, and the rest go on in a new one.

A worker gets a file of names and a file for its news, and writes there ``begin`` and ``end`` of each item, one JSON
object a line. It exits with POISONED where its device can no longer be used.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.gpu_first.child import Child

POISONED = 70
GOOD = ("passed", "skipped")
PAUSE = 0.1


@dataclass(frozen=True)
class Result:
    """What became of an item.

    Attributes:
        name: Which.
        outcome: "passed", "skipped", "failed", "hung", "crashed" or "not run".
        reason: Why, in a line.
        text: All that was said of it.
        seconds: How long it took.
    """

    name: str
    outcome: str
    reason: str = ""
    text: str = ""
    seconds: float = 0.0

    @property
    def bad(self) -> bool:
        """Whether it says something against the kernels."""
        return self.outcome not in GOOD


class News:
    """The worker's side: items as they begin and end, written at once."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def write(self, event: str, name: str, **more: Any) -> None:
        """Writes one event."""
        self._file.write(json.dumps({"event": event, "name": name, **more}) + "\n")
        self._file.flush()


@dataclass
class _Worker:
    left: list[str]
    number: int
    child: Child | None = None
    news: Path = Path()
    read: int = 0
    current: str | None = None
    since: float = 0.0
    begun: int = field(default=0)


class Pool:
    """Deals items out to workers, and watches them.

    Args:
        start: Starts a worker for (file of names, file of news, log).
        folder: For files of names, of news, and logs.
        limit: Seconds of an item, by name; of the worker's start, for an empty name.
        told: Called with each result at once.
    """

    def __init__(
        self,
        start: Callable[[Path, Path, Path], Child],
        folder: Path,
        limit: Callable[[str], float],
        told: Callable[[Result], None],
    ) -> None:
        self._start = start
        self._folder = folder
        self._limit = limit
        self._told = told
        self._started = 0
        self.results: list[Result] = []

    def run(self, names: Sequence[str], workers: int, seconds: float, meanwhile: Callable[[], None]) -> list[Result]:
        """Every item's result; those that time did not allow are "not run"."""
        end = time.monotonic() + seconds
        self._folder.mkdir(parents=True, exist_ok=True)
        count = max(1, min(workers, len(names)))
        running = [_Worker(list(names[i::count]), i) for i in range(count) if names[i::count]]
        for worker in running:
            self._launch(worker)
        while running and time.monotonic() < end:
            running = [worker for worker in running if self._look(worker)]
            meanwhile()
            time.sleep(PAUSE)
        for worker in running:
            self._read(worker)
            if worker.child is not None:
                worker.child.kill()
            for name in worker.left:
                under_way = f" after {time.monotonic() - worker.since:.0f} s of it" if name == worker.current else ""
                self._tell(Result(name, "not run", f"the time was up{under_way}"))
        return self.results

    def _launch(self, worker: _Worker) -> None:
        stem = f"{worker.number}-{self._started}"
        self._started += 1
        names = self._folder / f"{stem}.names.json"
        names.write_text(json.dumps(worker.left), encoding="utf-8")
        worker.news = self._folder / f"{stem}.news.jsonl"
        worker.news.touch()
        worker.child = self._start(names, worker.news, self._folder / f"{stem}.log")
        worker.read = 0
        worker.begun = 0
        worker.current = None
        worker.since = time.monotonic()

    def _look(self, worker: _Worker) -> bool:
        """Reads a worker's news; restarts it where it must be; whether it has something left."""
        child = worker.child
        assert child is not None
        code = child.code
        self._read(worker)
        if not worker.left:
            # What it does after its last item concerns nobody, but it must not stay.
            late = time.monotonic() - worker.since > self._limit("")
            if code is None and late:
                child.kill()
            return code is None and not late
        if code is not None:
            return self._ended(worker, code)
        allowed = self._limit(worker.current or "")
        if time.monotonic() - worker.since > allowed:
            child.kill()
            if worker.current is None:
                return self._give_up(worker, f"no item began within {allowed:.0f} s")
            self._finish(worker, worker.current, "hung", f"no end after {allowed:.0f} s, {child.last_words()}")
            return self._again(worker)
        return True

    def _ended(self, worker: _Worker, code: int) -> bool:
        child = worker.child
        assert child is not None
        said = f"exit code {code}: {child.last_words()}"
        if worker.current is not None:
            self._finish(worker, worker.current, "crashed", said)
        elif not worker.begun or code != POISONED:
            # It would do the same again.
            return self._give_up(worker, said)
        return self._again(worker)

    def _again(self, worker: _Worker) -> bool:
        if worker.left:
            self._launch(worker)
        return bool(worker.left)

    def _give_up(self, worker: _Worker, reason: str) -> bool:
        for name in list(worker.left):
            self._finish(worker, name, "not run", reason)
        return False

    def _read(self, worker: _Worker) -> None:
        with worker.news.open("rb") as file:
            file.seek(worker.read)
            fresh = file.read()
        whole = fresh.rpartition(b"\n")[0]
        worker.read += len(whole) + (1 if whole else 0)
        for line in whole.splitlines():
            event = json.loads(line)
            if event["event"] == "begin":
                worker.current = event["name"]
                worker.begun += 1
            else:
                text = event.get("text", "")
                self._finish(worker, event["name"], event["outcome"], event.get("reason", ""), text)
                worker.current = None
            worker.since = time.monotonic()

    def _finish(self, worker: _Worker, name: str, outcome: str, reason: str, text: str = "") -> None:
        worker.left.remove(name)
        self._tell(Result(name, outcome, reason, text, time.monotonic() - worker.since))

    def _tell(self, result: Result) -> None:
        self.results.append(result)
        self._told(result)
