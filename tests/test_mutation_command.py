"""The command that makes mistakes on purpose: what it calls killed is killed, and what it calls undecided is that."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import typer

from tests.mutants import __main__ as command
from tests.mutants.catalogue import areas
from tests.mutants.record import Mutant, NeedsNewPlaceError
from tests.mutants.runner import run
from tests.mutants.verdicts import Verdict, holds, share_killed

CODE = "def half(n):\n    return n // 2\n\n\ndef third(n):\n    return n // 3\n"
TESTS = (
    "import toy\n\ndef test_half():\n    assert toy.half(5) == 2\n"
    "\ndef test_third():\n    assert toy.third(9) == 3\n\ndef test_red():\n    assert False\n"
)


def mutant(name: str, old: str, new: str, tests: str, **more: bool | str) -> Mutant:
    return Mutant(name, "toy.py", old=old, new=new, wrong="on purpose", tests=tests, **more)


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module and its tests; children load no plugins of pytest, which take longer than these."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    (tmp_path / "toy.py").write_text(CODE)
    (tmp_path / "test_toy.py").write_text(TESTS)
    return tmp_path


def judged(toy: Path, *mutants: Mutant) -> list[Verdict]:
    return run(mutants, root=toy, parts=("toy.py", "test_toy.py"), warm=("pytest",), jobs=1)


def test_what_dies_what_lives_and_what_decides_nothing(toy: Path) -> None:
    half, third = "test_toy.py::test_half", "test_toy.py::test_third"
    mutants = [
        # Of the same length, one after the other: compiled code of the last one must not be run.
        mutant("two", "n // 2", "n // 3", half),
        mutant("round", "n // 2", "n // 1", half),
        mutant("float", "n // 3", "n / 3", third),
        mutant("spin", "return n // 3", "return third(n) if n else n", third),
        mutant("import", "def half(n):", "import missing_module\ndef half(n):", half),
        mutant("import-meant", "def half(n):", "import missing_module\ndef half(n):", half, at_import=True),
        mutant("red", "n // 2", "n // 4", "test_toy.py -k red"),
        mutant("gone", "n // 5", "n // 4", half),
    ]
    outcomes = {verdict.mutant.name: verdict.outcome for verdict in judged(toy, *mutants)}
    assert outcomes == {
        "two": "killed", "round": "killed", "float": "survived", "spin": "killed", "import": "error",
        "import-meant": "killed", "red": "undecided", "gone": "error",
    }  # fmt: skip
    assert (toy / "toy.py").read_text() == CODE


def test_a_child_that_hangs_is_ended(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.mutants.runner.LEAST_SECONDS", 1.0)
    hangs = mutant("hangs", "return n // 2", "while n:\n        pass", "test_toy.py::test_half")
    (found,) = judged(toy, hangs)
    assert found.outcome == "timed out"


def test_a_place_is_looked_for_in_one_function(toy: Path) -> None:
    (toy / "toy.py").write_text(CODE.replace("// 3", "// 2"))
    with pytest.raises(NeedsNewPlaceError, match="2 times"):
        mutant("both", "n // 2", "n // 4", "").applied_to(toy)
    text = mutant("one", "n // 2", "n // 4", "", within="third").applied_to(toy)
    assert text.count("n // 2") == 1
    assert text.endswith("n // 4\n")
    for wrong in (
        mutant("nowhere", "n // 2", "n // 4", "", within="quarter"),
        mutant("same", "def half(n):", "def half(n):  # of n", ""),
        mutant("no-python", "def half(n):", "def half(n:", ""),
    ):
        with pytest.raises(NeedsNewPlaceError):
            wrong.applied_to(toy)


def test_what_lives_without_a_reason_is_red() -> None:
    dies, lives = (Verdict(mutant(name, "a", "b", ""), "killed", "", 0.0) for name in ("dies", "lives"))
    lives = replace(lives, outcome="survived")
    argued = replace(lives, mutant=replace(lives.mutant, survives="no test can tell"))
    assert holds([dies])
    assert not holds([*[dies] * 99, lives])
    assert holds([*[dies] * 19, argued])
    assert not holds([*[dies] * 18, argued])
    assert not holds([dies, replace(dies, outcome="undecided")])
    assert share_killed([dies, lives]) == 0.5


def test_the_catalogue_is_large_spread_and_says_what_is_wrong() -> None:
    """Whether each has its place, ``--list`` says: a change of code must not have to ask the catalogue first."""
    catalogue = [mutant for mutants in areas().values() for mutant in mutants]
    assert len(catalogue) >= 150
    assert all(mutant.wrong and mutant.tests and mutant.old != mutant.new for mutant in catalogue)
    packages = Counter(mutant.file.partition("/")[0] for mutant in catalogue)
    assert min(packages["attnzoo"], packages["kernels"]) >= 60
    assert len({mutant.file for mutant in catalogue}) >= 60


def test_a_list_with_a_lost_place_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    there = Mutant("there", "tests/child.py", old="timeout=120", new="timeout=1", wrong="too short", tests="t.py")
    monkeypatch.setattr(command, "areas", lambda: {"a": (there,)})
    command.main(as_list=True)
    monkeypatch.setattr(command, "areas", lambda: {"a": (there, replace(there, name="lost", old="nowhere"))})
    with pytest.raises(typer.Exit) as stop:
        command.main(as_list=True)
    assert stop.value.exit_code == 1
    printed = capsys.readouterr().out
    assert "there: too short" in printed and "NEEDS A NEW PLACE lost" in printed
