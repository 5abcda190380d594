"""Measurements in order of worth, each in a process of its own; then tiles; and last the form that may hang.

Our own time comes first and FlexAttention's after all of ours: compiling it takes longer than measuring a cell.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path

from bench.gpu import report
from bench.gpu.contact import CELLS, SPECIALISED, TINY, TINY_SPECIALISED, Item
from bench.gpu_first.child import Child
from bench.gpu_first.parts import PLANTED_SECONDS, REHEARSED_SECONDS, read
from bench.gpu_first.run import Outcome, Run

CELL_SECONDS = 45.0
LEAST_SECONDS = 8.0
"""No cell starts with less."""
HANGS = 2
"""After so many in a row that did not end the device is taken to hang."""
TILES_WIDTHS = ("128", "64")
TILES_PASSES = ("forward", "key", "query", "decode")


class Spares:
    """Processes that have imported all they need, one ahead."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._made = 0
        self._next: Child | None = None

    def _make(self) -> Child:
        self._made += 1
        log = self._run.work / "logs" / "cells" / f"{self._made}.log"
        return self._run.start("bench.gpu_first.cell_worker", log=log, told=True)

    def take(self, *, more: bool) -> Child:
        """A process, and the next one begun if there is ``more``."""
        mine = self._next or self._make()
        self._next = self._make() if more else None
        return mine

    def close(self) -> None:
        """Ends the one that nobody needs."""
        if self._next is not None:
            self._next.kill()
            self._next = None


def cells(run: Run, outcome: Outcome) -> None:
    """Forward, backward and decoding, the dearest first."""
    _measure(run, outcome, TINY if run.rehearse else CELLS, hangs=HANGS)
    _write_report(run)


def specialised(run: Run, outcome: Outcome) -> None:
    """The form of the forward loop that has never run: given up after one hang."""
    _measure(run, outcome, TINY_SPECIALISED if run.rehearse else SPECIALISED, hangs=1)
    _write_report(run)


def _measure(run: Run, outcome: Outcome, items: tuple[Item, ...], *, hangs: int) -> None:
    if not run.triton:
        outcome.said = "not run: triton was not asked for"
        outcome.wrong(outcome.said)
        return
    spares = Spares(run)
    end = time.monotonic() + (len(items) * REHEARSED_SECONDS if run.rehearse else outcome.allowed)
    found: list[dict[str, str]] = []
    outcome.data = found
    hung = 0
    try:
        for place, item in enumerate(items):
            left = end - time.monotonic()
            if hung >= hangs or left < run.clock.scaled(LEAST_SECONDS):
                why = "given up: what went before it did not end" if hung >= hangs else "the time was up"
                _note(run, outcome, item, "not run", why)
                continue
            # Nobody waits for what comes after an item that may be the last.
            child = spares.take(more=hangs > 1 and place + 1 < len(items))
            ended, line = _one(run, item, child, left)
            hung = hung + 1 if ended == "hung" else 0
            _note(run, outcome, item, ended, line)
            run.keep()
    finally:
        spares.close()
    right = sum(one["outcome"] == "right" for one in found)
    outcome.said = f"{right} of {len(items)} right"


def _note(run: Run, outcome: Outcome, item: Item, ended: str, line: str) -> None:
    outcome.data.append({"name": item.label, "outcome": ended, "line": line})
    # Cells are many more than there is time for: what was merely not reached is no finding, unless it is the form's.
    if ended not in ("right", "not run") or "given up" in line:
        outcome.wrong(f"{item.label}: {ended}: {line}")
    if ended != "not run":
        run.say(f"  {item.label}: {line if ended == 'right' else f'{ended}: {line}'}")


def _one(run: Run, item: Item, child: Child, left: float) -> tuple[str, str]:
    """How a cell ended, and what is to be told of it."""
    folder = run.work / "cells"
    target = folder / f"{item.name}.json"
    before = target.stat().st_mtime_ns if target.exists() else None
    what = ["--max-seconds", "0"] if item.name == "machine" else ["--cell", item.name]
    tiny = ["--tiny"] if run.rehearse else []
    arguments = ["--out", str(folder), "--device", run.device, *tiny, *what, *item.arguments]
    child.tell(json.dumps({"arguments": arguments, "plant": item.plant}))
    seconds = min(run.clock.scaled(CELL_SECONDS), left)
    if run.rehearse:
        seconds = PLANTED_SECONDS if item.plant == "hang" else REHEARSED_SECONDS
    code = child.wait(seconds)
    if code is None:
        return "hung", f"no end after {seconds:.0f} s, {child.last_words()}"
    data = report.read(target)
    if code not in (0, 1) or data is None or target.stat().st_mtime_ns == before:
        return "crashed", f"exit code {code}: {child.last_words()}"
    if item.name == "machine":
        speeds = ", ".join(f"{name} {value:.3g}/s" for name, value in data["measured"].items())
        return "right", f"measured here: {speeds or 'nothing'}"
    line = report.line(data, read(folder / "machine.json") or {"peak": {}})
    return "wrong" if data.get("wrong") else "right", line


def _write_report(run: Run) -> None:
    """The table of cells as ``bench.gpu`` writes it; charts come at the end."""
    folder = run.work / "cells"
    if (folder / "machine.json").exists():
        (folder / "report.md").write_text(report.markdown(*report.load(folder)), encoding="utf-8")


def draw(run: Run) -> Iterable[Path]:
    """The charts, where there is something to draw and matplotlib to draw it."""
    folder = run.work / "cells"
    if not (folder / "machine.json").exists():
        return []
    child = run.start("bench.gpu.report", str(folder), log=run.work / "logs" / "charts.log")
    child.wait(max(1.0, min(20.0, run.clock.left)) if not run.rehearse else REHEARSED_SECONDS)
    return sorted(folder.glob("*.png"))


def tiles(run: Run, outcome: Outcome) -> None:
    """Which tiles are the fastest on this device, entry by entry of its table, as far as time allows."""
    device = run.facts.get("device")
    architecture = device["tiles"] if device else "sm_90"
    table = run.work / "tiles.json"
    arguments = ["--architecture", architecture, "--sizes", "2", "--table", str(table)]
    if run.rehearse:
        # Without a device only what compiles is asked, outside of the interpreter.
        arguments += ["--widths", "32", "--passes", "decode"]
    else:
        arguments += ["--measure", "--widths", *TILES_WIDTHS, "--passes", *TILES_PASSES]
    log = run.work / "logs" / "tiles.log"
    child = run.start("bench.tune", *arguments, log=log, TRITON_INTERPRET="0")
    code = child.wait(REHEARSED_SECONDS if run.rehearse else outcome.allowed)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    outcome.data = [line for line in lines if line.startswith((f"{architecture} ", "  ("))]
    entries = [line for line in outcome.data if not line.startswith(" ")]
    outcome.said = f"{len(entries)} entries of the table" + ("" if code is not None else ", then the time was up")
    # An entry has no time of its own: running out of it is no finding, unless nothing came of it.
    if code not in (0, None) or not entries:
        outcome.wrong(f"exit code {code}: {child.last_words()}")
