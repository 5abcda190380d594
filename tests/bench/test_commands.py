"""Each benchmark is one command: it starts from a process with nothing of ours in it, and says what it takes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.forks import forks

Run = Callable[..., CompletedProcess[str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with forks(tmp_path_factory.mktemp("forks"), COLUMNS="120") as those:
        yield those.run


@pytest.mark.parametrize(
    "name",
    [
        "cpu",
        "crossover",
        "gpu",
        "gpu_first",
        "heads",
        "moh",
        "longheads",
        "aot",
        "compiled",
        "kernel_cache",
        "large",
        "pages",
        "policies",
        "step",
        "trained",
        "tune",
    ],
)
def test_a_benchmark_says_what_it_takes(name: str, run: Run) -> None:
    done = run(f"bench.{name}", "--help")
    assert done.returncode == 0, done.stderr
    assert "--out" in done.stdout or "--measure" in done.stdout


@pytest.mark.parametrize("name", ["cpu", "moh", "longheads", "policies", "step", "trained"])
def test_an_unknown_part_is_refused_before_anything_is_measured(name: str, tmp_path: Path, run: Run) -> None:
    done = run(f"bench.{name}", "--out", str(tmp_path / "never"), "--only", "nothing of that name")
    assert done.returncode == 2
    assert "expected one of" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_part_writes_what_it_measured(tmp_path: Path, run: Run) -> None:
    done = run("bench.cpu", "--out", str(tmp_path / "rows"), "--only", "few rows")
    # A bound may be missed on a machine that others use: then the exit code says so.
    assert done.returncode in (0, 1), done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.json", "rows.md", "rows.png"]
    assert "a call of few rows" in done.stdout


def test_a_step_of_every_conversion_is_checked_and_written(tmp_path: Path, run: Run) -> None:
    rows = ["mha", "latent 128", "dense, our cache"]
    words = [word for row in rows for word in ("--only", row)]
    done = run("bench.step", "--quick", "--rounds", "2", "--out", str(tmp_path / "step"), *words)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step.json", "step.md", "step.png"]
    found = json.loads((tmp_path / "step.json").read_text(encoding="utf-8"))["rows"]
    assert [(row["name"], row["tokens"]) for row in found] == [(name, length) for name in rows for length in (96, 160)]
    assert all(row["error"] <= row["bound"] <= 1e-5 and row["ratio"] > 0 for row in found)


def test_policies_are_scored_and_go_on_where_they_stopped(tmp_path: Path, run: Run) -> None:
    out = tmp_path / "policies"
    words = ["--quick", "--out", str(out), "--part", "quality", "--part", "masks"]
    done = run("bench.policies", *words, "--only", "duo: 40 %")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policies.json", "policies.md", "policies.png"]
    before = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    done = run("bench.policies", *words, "--go-on", "--only", "duo: 40 %", "--only", "everything")
    assert done.returncode == 0, done.stderr
    after = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    assert after["rows"][:2] == before["rows"]
    assert [row["name"] for row in after["rows"]] == ["dense", "duo: 40 %", "everything"]
    assert after["rows"][2]["flags"] == ["HOLDS EVERYTHING"]
    # Two bounds are on what was measured here; its control was not.
    assert {line["id"]: line["verdict"] for line in after["acceptance"]}["A1"] == "not measured"


def test_experiments_on_heads_are_kept_and_go_on(tmp_path: Path, run: Run) -> None:
    out = tmp_path / "heads"
    done = run("bench.heads", "--quick", "--out", str(out), "--only", "ablations")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heads.json", "heads.md", "heads.png"]
    before = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))["outcomes"]
    done = run("bench.heads", "--quick", "--out", str(out), "--go-on", "--only", "paths")
    assert done.returncode == 0, done.stderr
    after = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))["outcomes"]
    # They are told in one order, whatever order they ran in.
    assert list(after) == ["paths", "ablations"]
    assert after["ablations"] == before["ablations"]
    assert "# What single heads do" in out.with_suffix(".md").read_text(encoding="utf-8")
