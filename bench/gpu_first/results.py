"""What comes out: one archive, a page and a file of data, each there whole or not at all, after every part."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.gpu_first.run import Outcome, Run

NOT_PACKED = ("triton", "inductor", "kernels")
"""Folders of caches."""


def verdict(run: Run) -> str:
    """In a few words."""
    found = sum(len(outcome.reasons) for outcome in run.outcomes)
    return f"{found} reasons" if found else "all parts ran, and were right"


def markdown(run: Run) -> str:
    """The page: reasons first."""
    about = run.facts.get("device") or {"name": run.device}
    have = run.facts.get("versions", {})
    lines = [
        f"# First contact: {about['name']}",
        "",
        f"{time.strftime('%F')}, torch {have.get('torch')}, triton {have.get('triton')}: {verdict(run)}",
    ]
    for outcome in run.outcomes:
        if outcome.reasons:
            lines += ["", f"## {outcome.part}: what is wrong", ""]
            lines += [f"- {_cell(reason)}" for reason in outcome.reasons]
    lines += ["", *table(run)]
    for name in ("cells", "specialised", "tiles"):
        lines += _list(name, next((one for one in run.outcomes if one.part == name), None))
    page = run.work / "cells" / "report.md"
    if page.exists():
        lines += ["", "## bench.gpu", "", page.read_text(encoding="utf-8").replace("\n## ", "\n### ").strip()]
    return "\n".join(lines) + "\n"


def table(run: Run) -> list[str]:
    """One row a part."""
    lines = ["| part | seconds | of | what |", "| --- | --- | --- | --- |"]
    for outcome in run.outcomes:
        lines.append(f"| {outcome.part} | {outcome.seconds:.0f} | {outcome.allowed:.0f} | {_cell(outcome.said)} |")
    return lines


def _list(name: str, outcome: Outcome | None) -> list[str]:
    if outcome is None or not outcome.data:
        return []
    rows = [row if isinstance(row, str) else f"{row['name']}: {row['outcome']}: {row['line']}" for row in outcome.data]
    return ["", f"## {name}", "", *(f"- {_cell(row.strip())}" for row in rows)]


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("<", "&lt;").replace("\n", " ")


def data(run: Run) -> dict[str, Any]:
    """Everything as plain data."""
    return {
        "verdict": verdict(run),
        "reasons": [f"{outcome.part}: {reason}" for outcome in run.outcomes for reason in outcome.reasons],
        "seconds": round(run.clock.spent, 1),
        "of": run.clock.seconds,
        "machine": run.facts,
        "parts": [vars(outcome) for outcome in run.outcomes],
    }


class Results:
    """The files of one run in a folder.

    Args:
        folder: Where they lie.
        name: What they are called.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name
        folder.mkdir(parents=True, exist_ok=True)

    def keep(self, run: Run, charts: Iterable[Path] = ()) -> list[Path]:
        """Writes all of them; what lay there before stays until the new one is whole."""
        page = markdown(run)
        values = json.dumps(data(run), indent=1) + "\n"
        written = [self._write(".md", page.encode()), self._write(".json", values.encode())]
        written += [self._copy(chart) for chart in charts]
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as archive:
            for path in sorted(run.work.rglob("*")):
                inner = path.relative_to(run.work)
                if inner.parts[0] not in NOT_PACKED and path.is_file():
                    archive.add(path, f"{self.name}/{inner}", recursive=False)
            for path in written[:2]:
                archive.add(path, f"{self.name}/{path.name}")
        return [self._write(".tar.gz", packed.getvalue()), *written]

    def _write(self, ending: str, content: bytes) -> Path:
        target = self.folder / f"{self.name}{ending}"
        part = self.folder / f".{self.name}{ending}.{os.getpid()}"
        part.write_bytes(content)
        part.replace(target)
        return target

    def _copy(self, chart: Path) -> Path:
        target = self.folder / f"{self.name}-{chart.name}"
        shutil.copyfile(chart, target)
        return target
