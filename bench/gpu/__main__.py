"""The GPU table in one command: ``python -m bench.gpu``; needs torch and triton alone.

One JSON file a cell appears in ``--out``, whole or not at all. Run it again and it goes on where it stopped; charts and
Markdown are made from the files, here or on another machine: ``python -m bench.gpu.report OUT``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.gpu import cells as gpu_cells
from bench.gpu import machine as gpu_machine
from bench.gpu import report
from bench.gpu.cells import Cell

MACHINE = "machine.json"
FORM_SECONDS = 180
"""A form of the loop that has not been checked may hang: it runs in a process of its own, for so long."""


def write(path: Path, data: dict[str, Any]) -> None:
    """Writes JSON that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    part.replace(path)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder of results")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="cells whose name holds TEXT")
    parser.add_argument("--max-seconds", type=float, default=None, help="start no cell after so long")
    parser.add_argument("--tuned", action="store_true", help="FlexAttention with max-autotune: minutes a cell")
    parser.add_argument("--without", action="append", default=[], metavar="NAME", help="leave a contestant out")
    parser.add_argument("--again", action="store_true", help="measure also what is there")
    parser.add_argument("--dry-run", action="store_true", help="list the cells, measure nothing")
    parser.add_argument("--tiny", action="store_true", help="toy sizes: the machinery alone")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu together with --tiny")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    found = parser.parse_args(given)
    if torch.device(found.device).type == "cpu" and not found.dry_run:
        if not found.tiny:
            parser.error("--device cpu: expected --tiny with it")
        if os.environ.get("TRITON_INTERPRET") != "1":
            parser.error("--device cpu: expected TRITON_INTERPRET=1 in the environment")
    elif not found.dry_run and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    return found


def chosen(given: argparse.Namespace) -> list[Cell]:
    """The cells that are asked for."""
    cells = gpu_cells.tiny() if given.tiny else gpu_cells.every()
    return [cell for cell in cells if not given.only or any(text in cell.name for text in given.only)]


def is_done(given: argparse.Namespace, cell: Cell) -> bool:
    """Whether a cell's result lies there."""
    return not given.again and report.read(given.out / f"{cell.name}.json") is not None


def measure(cell: Cell, device: torch.device, given: argparse.Namespace) -> dict[str, Any]:
    """A cell's result, in a process of its own where the cell may hang."""
    if cell.what == "form" and given.cell is None and device.type == "cuda":
        return _apart(cell, given)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        if cell.bytes_held > free:
            reason = f"needs about {cell.bytes_held >> 30} GiB, {free >> 30} are free"
            return {"cell": asdict(cell), "ms": {}, "errors": {}, "reasons": {"ours": reason}}
    from bench.gpu import run as gpu_run

    try:
        return gpu_run.measure(cell, device, tuned=given.tuned, without=given.without)
    except torch.OutOfMemoryError as error:
        first = str(error).splitlines()[0]
        return {"cell": asdict(cell), "ms": {}, "errors": {}, "reasons": {"ours": f"out of memory: {first}"}}
    except Exception as error:  # hours of cells must not be lost for one; it is told, and the exit code is 1
        traceback.print_exc()
        first = (str(error).strip().splitlines() or [""])[0]
        reason = f"exit: {type(error).__name__}: {first[:300]}"
        return {"cell": asdict(cell), "ms": {}, "errors": {}, "wrong": True, "reasons": {"ours": reason}}


def _apart(cell: Cell, given: argparse.Namespace) -> dict[str, Any]:
    target = given.out / f"{cell.name}.json"
    command = [
        sys.executable,
        "-m",
        "bench.gpu",
        "--out",
        str(given.out),
        "--device",
        given.device,
        "--cell",
        cell.name,
    ]
    command += ["--tiny"] if given.tiny else []
    failed: dict[str, Any] = {"cell": asdict(cell), "ms": {}, "errors": {}, "wrong": True}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=FORM_SECONDS)
    except subprocess.TimeoutExpired:
        return failed | {"reasons": {cell.form: f"no end after {FORM_SECONDS} s"}}
    data = report.read(target)
    if data is None or done.returncode not in (0, 1):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return failed | {"reasons": {cell.form: f"exit code {done.returncode}: {last[:300]}"}}
    return data


def check_folder(given: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The machine's description, written to the folder.

    Raises:
        SystemExit: If results of another machine or other versions lie there.
    """
    there = report.read(given.out / MACHINE)
    here = gpu_machine.settings(device, tuned=given.tuned)
    if there is not None:
        other = [name for name, value in here.items() if there.get(name) != value]
        if other:
            told = ", ".join(f"{name} {there.get(name)!r}, here {here[name]!r}" for name in other)
            raise SystemExit(f"bench.gpu: {given.out} holds results of another setting: {told}; choose another --out")
        return there
    about = gpu_machine.about(device, tuned=given.tuned)
    write(given.out / MACHINE, about)
    return about


def run(given: argparse.Namespace, cells: list[Cell]) -> tuple[int, bool]:
    """Measures; how many cells are left, and whether something was wrong."""
    device = torch.device(given.device)
    about = check_folder(given, device)
    begin = time.monotonic()
    wrong = False
    for place, cell in enumerate(cells):
        data = report.read(given.out / f"{cell.name}.json") if is_done(given, cell) else None
        if data is None:
            spent = time.monotonic() - begin
            if given.max_seconds is not None and spent >= given.max_seconds:
                return sum(not is_done(given, left) for left in cells[place:]), wrong
            print(f"[{place + 1}/{len(cells)}, {spent:.0f} s] {cell.name} ...", end=" ", flush=True)
            start = time.monotonic()
            data = measure(cell, device, given) | {"seconds": round(time.monotonic() - start, 2)}
            write(given.out / f"{cell.name}.json", data)
            print(report.line(data, about), flush=True)
            if data.get("wrong") and device.type == "cuda":
                # After an illegal access nothing runs in this process any more: this raises, and the next run goes on.
                torch.cuda.synchronize(device)
        wrong = wrong or bool(data.get("wrong"))
    return 0, wrong


def main(given: list[str] | None = None) -> int:
    """Runs the command line; 1 where something computes wrongly."""
    options = arguments(given)
    cells = chosen(options)
    if options.cell is not None:
        cell = next(cell for cell in cells if cell.name == options.cell)
        data = measure(cell, torch.device(options.device), options)
        write(options.out / f"{cell.name}.json", data)
        return int(bool(data.get("wrong")))
    if options.dry_run:
        for cell in cells:
            print(cell.name, "(done)" if is_done(options, cell) else "")
        print(f"{len(cells)} cells")
        return 0
    left, wrong = run(options, cells)
    written = report.write(options.out)
    print(f"written: {', '.join(str(path) for path in written)}")
    if left:
        print(f"{left} cells are left; the same command goes on with them")
    if wrong:
        print("WRONG: at least one cell computes wrongly; see the files")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
