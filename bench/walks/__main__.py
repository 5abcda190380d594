"""``python -m bench.walks --peers PYTHON --out FILES``: each program in a process of its own, in turns."""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

import attnzoo
from attnzoo.doctor import cpu_model
from attnzoo.reporting.outputs import write_together
from bench.walks.jobs import JOBS, PACKAGES, ROOT, Job, code_lines
from bench.walks.report import table


def cpu_seconds(python: Path, program: Path) -> float:
    """What a program takes in a process of its own, imports included; it must end well.

    Raises:
        RuntimeError: If it does not.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if python == Path(sys.executable):
        environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'kernels'}"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [python, program], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0:
        raise RuntimeError(f"{program.name}: exit code {done.returncode}\n{done.stderr}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measured(job: Job, pythons: dict[str, Path], rounds: int) -> dict[str, dict[str, Any]]:
    """Lines and seconds of every program of a job."""
    times: dict[str, list[float]] = {name: [] for name in job.programs}
    for _ in range(rounds):
        for name, program in job.programs.items():
            times[name].append(cpu_seconds(pythons[name], program))
    return {
        name: {
            "lines": code_lines(program.read_text(encoding="utf-8")),
            "seconds": round(statistics.median(times[name]), 1),
        }
        for name, program in job.programs.items()
    }


def versions(peers: Path) -> dict[str, str]:
    """Of the packages, by name."""
    asked = "from importlib.metadata import version; print(version('x-transformers'), version('peft'))"
    found = subprocess.run([peers, "-c", asked], capture_output=True, text=True, check=True).stdout.split()
    return dict(zip(PACKAGES, (attnzoo.__version__, *found), strict=True))


def main(
    peers: Annotated[Path, typer.Option(help="A Python that has x-transformers, peft and transformers.")],
    out: Annotated[Path, typer.Option(help="Where .json and .md go.")],
    rounds: Annotated[int, typer.Option(min=1, help="How often each program runs.")] = 3,
) -> None:
    """Runs every program, and writes the table."""
    pythons = {"attnzoo": Path(sys.executable), "x-transformers": peers, "peft": peers}
    rows = []
    for job in JOBS:
        done = measured(job, pythons, rounds)
        typer.echo(f"{job.title}: {done}")
        rows.append({"job": job.title, "done": done, "reasons": job.reasons})
    results = {"machine": f"{cpu_model()}, one thread", "versions": versions(peers), "rows": rows}
    page = ["# Five jobs, beside other packages", "", "`python -m bench.walks`", "", *table(results), ""]
    written = {"json": json.dumps(results, indent=1) + "\n", "md": "\n".join(page)}
    write_together(out, {suffix: partial(Path.write_text, data=text) for suffix, text in written.items()})


if __name__ == "__main__":
    typer.run(main)
