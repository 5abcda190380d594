"""The five jobs beside other packages: one rule counts lines, and the stored table is of the programs that stand."""

from __future__ import annotations

from bench.pages import RESULTS
from bench.walks.jobs import JOBS, PACKAGES, code_lines
from bench.walks.report import read, table

PROGRAM = '''"""Not counted."""

# Nor this.
import os  # but this


def f():
    """Nor
    this."""
    return (
        "this",
        2,
    )
'''


def test_lines_that_hold_code_are_counted() -> None:
    assert code_lines(PROGRAM) == 6
    assert code_lines("") == code_lines("# x\n\n") == 0


def test_every_package_has_a_program_or_a_reason() -> None:
    for job in JOBS:
        assert {*job.programs, *job.reasons} == set(PACKAGES)
        assert not job.programs.keys() & job.reasons.keys()


def test_the_stored_table_is_of_the_programs_that_stand() -> None:
    results = read(RESULTS / "walks.json")
    assert [row["job"] for row in results["rows"]] == [job.title for job in JOBS]
    for row, job in zip(results["rows"], JOBS, strict=True):
        assert row["reasons"] == job.reasons
        lines = {name: code_lines(path.read_text(encoding="utf-8")) for name, path in job.programs.items()}
        assert {name: done["lines"] for name, done in row["done"].items()} == lines
        assert all(done["seconds"] > 0 for done in row["done"].values())
    assert "\n".join(table(results)) in (RESULTS / "walks.md").read_text(encoding="utf-8")
