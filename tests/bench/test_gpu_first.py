"""The first contact with a GPU, where there is none: the whole of it rehearsed, and each of its promises alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.gpu import cells as gpu_cells
from bench.gpu import contact
from bench.gpu_first import __main__ as first
from bench.gpu_first import cells, child, parts, pytest_worker
from bench.gpu_first.child import Child
from bench.gpu_first.pool import POISONED, Pool, Result
from bench.gpu_first.results import Results
from bench.gpu_first.run import SHARES, WHOLE, Clock, Outcome, Run

ROOT = Path(__file__).resolve().parents[2]
IMPLS = ("reference", "blocked", "triton")


@pytest.mark.slow
@pytest.mark.long
def test_the_whole_of_it_is_rehearsed_with_faults_that_are_planted(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    out = tmp_path / "out"
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "TMPDIR": str(tmp_path)}
    line = [sys.executable, "-m", "bench.gpu_first", "--rehearse", "--cores", "1", "--out", str(out)]
    done = subprocess.run(line, env=env, capture_output=True, text=True, check=False, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads((out / "gpu-first.json").read_text(encoding="utf-8"))
    assert [part["part"] for part in told["parts"]] == list(SHARES)
    found = {part["part"]: part for part in told["parts"]}
    assert found["self-test"]["reasons"] == []
    assert {row["outcome"] for row in found["self-test"]["data"]} == {"passed"}
    by_name = {row["name"].rpartition("::")[2]: row for row in found["tests"]["data"]}
    assert by_name["test_planted_failure"]["outcome"] == "failed"
    assert "planted on purpose" in by_name["test_planted_failure"]["reason"]
    assert "in test_planted_hang" in by_name["test_planted_hang"]["reason"]
    assert by_name["test_planted_crash"]["outcome"] == "crashed"
    # What comes after a fault runs.
    assert by_name["test_after_a_crash"]["outcome"] == "passed"
    assert sum(row["outcome"] == "passed" for row in by_name.values()) >= 3
    ended = [row["outcome"] for row in found["cells"]["data"]]
    assert ended == ["right", "right", "crashed"]
    assert [row["outcome"] for row in found["specialised"]["data"]] == ["hung", "not run"]
    assert found["tiles"]["data"][-1].startswith("sm_90 decode/32/2: ")
    # Reasons were told when they came up, each line with the seconds left; and they lead the page.
    lines = done.stdout.splitlines()
    early = next(i for i, one in enumerate(lines) if "planted_failure: failed" in one)
    assert lines[early].startswith("[") and " s left]" in lines[early]
    assert early < next(i for i, one in enumerate(lines) if "cells: " in one and " right (" in one)
    page = (out / "gpu-first.md").read_text(encoding="utf-8")
    assert page.index("planted on purpose") < page.index("| part | seconds | of | what |")
    assert str(ROOT) not in page
    with tarfile.open(out / "gpu-first.tar.gz") as archive:
        packed = archive.getnames()
    for name in ("gpu-first.md", "gpu-first.json", "cells/report.md", "tiles.json", "logs/tests/0-0.log"):
        assert f"gpu-first/{name}" in packed
    # Nothing else comes out, and nothing stays behind.
    assert sorted(path.name for path in out.iterdir()) == ["gpu-first.json", "gpu-first.md", "gpu-first.tar.gz"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("gpu-first-")] == []


WORKER = f"""
import json, os, sys, time
names, news = json.load(open(sys.argv[1])), open(sys.argv[2], "a")
def tell(**event):
    news.write(json.dumps(event) + "\\n"); news.flush()
for name in names:
    kind = name.split()[0]
    if kind == "silent":
        sys.exit("no such name")
    tell(event="begin", name=name)
    if kind == "hang":
        time.sleep(60)
    if kind == "crash":
        print("illegal memory access", flush=True); os._exit(9)
    tell(event="end", name=name, outcome="failed" if kind in ("fail", "poison") else "passed", reason=kind)
    if kind == "poison":
        os._exit({POISONED})
"""


def pooled(tmp_path: Path, names: list[str], workers: int, seconds: float = 60.0) -> dict[str, Result]:
    told: list[Result] = []

    def start(listed: Path, news: Path, log: Path) -> Child:
        return Child(["-c", WORKER, str(listed), str(news)], log, dict(os.environ))

    def limit(name: str) -> float:
        return 1.0 if name.startswith("hang") else 30.0

    pool = Pool(start, tmp_path, limit, told.append)
    pool.run(names, workers, seconds, lambda: None)
    assert len(told) == len(names)
    return {result.name: result for result in told}


@pytest.mark.parametrize("workers", [1, 3])
def test_an_item_that_hangs_or_crashes_costs_itself_alone(workers: int, tmp_path: Path) -> None:
    names = ["ok 1", "hang", "ok 2", "crash", "fail", "poison", "ok 3"]
    found = pooled(tmp_path, names, workers)
    assert {name: result.outcome for name, result in found.items()} == {
        "ok 1": "passed", "hang": "hung", "ok 2": "passed", "crash": "crashed", "fail": "failed", "poison": "failed",
        "ok 3": "passed",
    }  # fmt: skip
    assert "exit code 9: illegal memory access" in found["crash"].reason
    assert "no end after 1 s" in found["hang"].reason


def test_a_worker_that_cannot_begin_is_not_started_for_ever(tmp_path: Path) -> None:
    found = pooled(tmp_path, ["ok", "silent", "ok too"], 1)
    assert [found[name].outcome for name in ("ok", "silent", "ok too")] == ["passed", "not run", "not run"]
    assert "no such name" in found["silent"].reason


def test_what_time_does_not_allow_is_told(tmp_path: Path) -> None:
    begin = time.monotonic()
    found = pooled(tmp_path, ["ok", "hang", "ok too"], 1, seconds=0.6)
    assert time.monotonic() - begin < 10
    assert found["ok too"].outcome == "not run"
    assert all(result.bad for name, result in found.items() if name != "ok")


def test_a_child_is_killed_with_what_it_started(tmp_path: Path) -> None:
    program = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
    log = tmp_path / "log"
    hanging = Child(["-c", program], log, dict(os.environ))
    while not log.read_text():
        time.sleep(0.02)
    grandchild = int(log.read_text())
    assert hanging.wait(0.1) is None
    status = Path(f"/proc/{grandchild}/stat")
    for _ in range(200):
        # Dead, or dead and not yet reaped by whoever inherits it.
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.02)
    raise AssertionError("the grandchild lives")


def test_children_see_nothing_that_would_make_other_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/nowhere")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("PYTHONPATH", "/site")
    seen = child.environment(tmp_path)
    assert {name for name in seen if name.startswith("TRITON_")} == {"TRITON_CACHE_DIR", "TRITON_DEFAULT_FP_FUSION"}
    assert seen["PYTHONPATH"].split(os.pathsep) == [str(ROOT), str(ROOT / "kernels"), "/site"]


def test_what_a_part_leaves_over_the_next_has(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    clock = Clock()
    assert 480 <= clock.seconds == WHOLE <= 540
    assert (SHARES["self-test"], SHARES["tests"], SHARES["cells"] + SHARES["specialised"]) == (60, 180, 150)
    now += 5
    assert clock.left_for("self-test") == SHARES["machine"] + 60 - 5
    now += 200
    assert clock.left_for("self-test") == 0
    half = Clock(WHOLE / 2)
    assert half.left_for("machine") == SHARES["machine"] / 2
    assert half.scaled(45) == 22.5


def test_cells_come_in_order_of_worth_and_what_may_hang_last() -> None:
    known = {cell.name for cell in gpu_cells.every()}
    items = (*contact.CELLS, *contact.SPECIALISED)
    assert {item.name for item in items} - known == {"machine"}
    assert cells.CELL_SECONDS <= 45
    whats = [item.name.partition("-")[0] for item in contact.CELLS]
    assert whats[:6] == ["machine", "forward", "forward", "decode", "backward", "backward"]
    assert not [item for item in contact.CELLS if "specialised" in item.name]
    assert all(item.name.startswith("form-specialised-") for item in contact.SPECIALISED)
    assert list(first.PARTS) == list(SHARES)
    assert list(SHARES)[-1] == "specialised"
    # FlexAttention is compiled beside a cell only when our own time of it is known.
    beside = [i for i, item in enumerate(contact.CELLS) if item.arguments == contact.BESIDE]
    assert beside
    for i in beside:
        assert contact.CELLS[i].name in [item.name for item in contact.CELLS[:i]]
    tiny = {cell.name for cell in gpu_cells.tiny()}
    assert {item.name for item in (*contact.TINY, *contact.TINY_SPECIALISED)} - tiny == {"machine"}


def run_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **own: Callable[[Run, Outcome], None]) -> int:
    def nothing(run: Run, outcome: Outcome) -> None:
        outcome.said = "fine"

    def machine(run: Run, outcome: Outcome) -> None:
        run.facts = {"device": {"name": "toy"}}

    monkeypatch.setattr(first, "PARTS", {**dict.fromkeys(SHARES, nothing), "machine": machine, **own})
    return first.main(["--out", str(tmp_path)])


def test_the_exit_code_says_whether_all_ran_and_was_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(run: Run, outcome: Outcome) -> None:
        outcome.wrong(f"{ROOT}/bench/gpu: differs")

    def broken(run: Run, outcome: Outcome) -> None:
        raise ValueError("a mistake of ours")

    assert run_with(monkeypatch, tmp_path) == 0
    assert run_with(monkeypatch, tmp_path, cells=wrong) == 1
    assert run_with(monkeypatch, tmp_path, tests=broken) == 1
    told = json.loads((tmp_path / "gpu-first.json").read_text(encoding="utf-8"))
    assert told["reasons"] == ["tests: the part itself failed: ValueError: a mistake of ours"]
    assert [part["said"] for part in told["parts"]][-1] == "fine"


def test_nothing_is_tried_without_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def machine(run: Run, outcome: Outcome) -> None:
        run.blind = True
        outcome.wrong("torch finds no CUDA device")

    assert run_with(monkeypatch, tmp_path, machine=machine) == 1
    told = json.loads((tmp_path / "gpu-first.json").read_text(encoding="utf-8"))
    assert [part["part"] for part in told["parts"]] == ["machine"]


def test_a_run_that_is_cut_off_leaves_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cells_(run: Run, outcome: Outcome) -> None:
        outcome.data = [{"name": "first", "outcome": "right", "line": "4.2 ms"}]
        raise SystemExit(143)

    with pytest.raises(SystemExit):
        run_with(monkeypatch, tmp_path, cells=cells_)
    assert "first: right: 4.2 ms" in (tmp_path / "gpu-first.md").read_text(encoding="utf-8")
    with tarfile.open(tmp_path / "gpu-first.tar.gz") as archive:
        kept = json.load(archive.extractfile("gpu-first/gpu-first.json"))  # type: ignore[arg-type]
    assert kept["reasons"] == ["cells: cut off"]


def toy(tmp_path: Path, **more: object) -> Run:
    return Run(tmp_path, Clock(), rehearse=False, impls=IMPLS, cores=1, **more)  # type: ignore[arg-type]


def test_files_are_whole_or_those_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = toy(tmp_path / "work")
    (tmp_path / "work" / "triton").mkdir(parents=True)
    (tmp_path / "work" / "triton" / "cache").write_text("large")
    results = Results(tmp_path / "out", "h200")
    results.keep(run)
    before = (tmp_path / "out" / "h200.tar.gz").read_bytes()
    with tarfile.open(tmp_path / "out" / "h200.tar.gz") as archive:
        assert sorted(archive.getnames()) == ["h200/h200.json", "h200/h200.md"]
    monkeypatch.setattr(tarfile, "open", lambda **_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        results.keep(run)
    assert (tmp_path / "out" / "h200.tar.gz").read_bytes() == before


@pytest.mark.parametrize(
    ("impls", "versions", "why"),
    [(IMPLS, {"pytest": None}, "pytest is not installed"), (IMPLS[:2], {"pytest": "9"}, "triton was not asked for")],
)
def test_tests_that_cannot_run_say_so(
    impls: tuple[str, ...], versions: dict[str, str], why: str, tmp_path: Path
) -> None:
    run = toy(tmp_path)
    run.impls = impls
    run.facts = {"versions": versions}
    outcome = Outcome("tests", allowed=1.0)
    parts.tests(run, outcome)
    assert outcome.reasons == [f"not run: {why}"]


def test_workers_say_that_pytest_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pytest", None)
    assert pytest_worker.main(["names", "news"]) == 3
    assert capsys.readouterr().out == "pytest is not installed\n"


def test_a_rehearsal_is_right_only_with_what_was_planted(tmp_path: Path) -> None:
    run = toy(tmp_path)
    run.outcomes = [Outcome(part, reasons=list(first.PLANTS.get(part, ()))) for part in SHARES]
    assert first.is_as_planted(run)
    run.outcomes[1].wrong("triton, float64, plain: failed")
    assert not first.is_as_planted(run)
    run.outcomes[1].reasons.clear()
    run.outcomes[2].reasons.pop()
    assert not first.is_as_planted(run)


@pytest.mark.parametrize(("given", "told"), [(["--impl", "cuda"], "--impl"), (["--seconds", "0"], "--seconds")])
def test_a_wrong_call_is_refused(given: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        first.main(given)
    assert stop.value.code == 2
    assert told in capsys.readouterr().err


def test_the_parent_needs_no_torch() -> None:
    program = (
        "import sys\n"
        "for name in ('torch', 'triton', 'pytest', 'matplotlib', 'numpy'): sys.modules[name] = None\n"
        "from bench.gpu_first import __main__\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=60)


@pytest.mark.parametrize(("seconds", "blind"), [(0.5, False), (60.0, True)])
def test_a_machine_that_is_slow_to_answer_is_not_taken_to_have_no_device(
    seconds: float, blind: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a child that ended and found none says so."""
    monkeypatch.setattr(parts, "LENT_SECONDS", 0.0)
    program = "raise SystemExit('no driver')" if blind else "import time; time.sleep(60)"
    monkeypatch.setattr(
        Run, "start", lambda self, module, *given, log, **more: Child(["-c", program], log, dict(os.environ))
    )
    run = toy(tmp_path)
    outcome = Outcome("machine", allowed=seconds)
    parts.machine(run, outcome)
    assert run.blind is blind
    assert ("torch finds no CUDA device" in outcome.reasons) is blind
    assert "no driver" in outcome.reasons[0] if blind else "no end in time" in outcome.reasons[0]
