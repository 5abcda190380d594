"""Each benchmark is one command: it starts from a clean process, and says what it takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "COLUMNS": "120"}
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    "name", ["cpu", "crossover", "gpu", "gpu_first", "moh", "longheads", "aot", "kernel_cache", "pages", "step", "tune"]
)
def test_a_benchmark_says_what_it_takes(name: str) -> None:
    done = run(f"bench.{name}", "--help")
    assert done.returncode == 0, done.stderr
    assert "--out" in done.stdout or "--measure" in done.stdout


@pytest.mark.parametrize("name", ["cpu", "moh", "longheads", "step"])
def test_an_unknown_part_is_refused_before_anything_is_measured(name: str, tmp_path: Path) -> None:
    done = run(f"bench.{name}", "--out", str(tmp_path / "never"), "--only", "nothing of that name")
    assert done.returncode == 2
    assert "expected one of" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_part_writes_what_it_measured(tmp_path: Path) -> None:
    done = run("bench.cpu", "--out", str(tmp_path / "rows"), "--only", "few rows")
    # A bound may be missed on a machine that others use: then the exit code says so.
    assert done.returncode in (0, 1), done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.json", "rows.md", "rows.png"]
    assert "a call of few rows" in done.stdout


def test_a_step_of_every_conversion_is_checked_and_written(tmp_path: Path) -> None:
    rows = ["mha", "latent 128", "dense, our cache"]
    words = [word for row in rows for word in ("--only", row)]
    done = run("bench.step", "--quick", "--rounds", "2", "--out", str(tmp_path / "step"), *words)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step.json", "step.md", "step.png"]
    found = json.loads((tmp_path / "step.json").read_text(encoding="utf-8"))["rows"]
    assert [(row["name"], row["tokens"]) for row in found] == [(name, length) for name in rows for length in (96, 160)]
    assert all(row["error"] <= 1e-5 and row["ratio"] > 0 for row in found)
