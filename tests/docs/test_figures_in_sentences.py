"""Figures that pages tell in sentences are roundings of what is stored."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEADS = json.loads((ROOT / "bench" / "results" / "heads.json").read_text(encoding="utf-8"))["outcomes"]
POLICIES = json.loads((ROOT / "bench" / "results" / "policies.json").read_text(encoding="utf-8"))
TOLD = {
    "five digits that were told": ("retrieval",),
    "of 39 capitals": ("conflict",),
    'answers such as "[Lima/Peru]"': ("lofit",),
    "where random tokens come again": ("paths",),
    "of 270 heads 119": ("act",),
    "the best head, (23, 3)": ("successor",),
    "behind a sentence that contradicts": ("divergence",),
    "the tokens of a number, hidden": ("reading",),
    "all 270 scores": ("ablations", "estimates"),
}
"""How each paragraph of what came out begins, and which experiments it tells of."""
FIGURE = re.compile(r"(?<!beta )(?<!at least )(?<![\w.-])(-?\d*\.\d+|\d+ %|\d+ CPU seconds)(?!\w)")
"""No setting of a method, and no bound."""


def paragraph(page: str, begin: str) -> str:
    """The paragraph of a page that tells what came out, by its first words."""
    found = [part for part in page.split("\n\n") if part.startswith("What came out") and begin in part]
    assert len(found) == 1, begin
    return " ".join(found[0].split())


def stored(outcome: dict[str, Any]) -> list[float]:
    """All figures of an experiment, and what each adds to that of the unedited model."""
    rows = [row["figures"] for row in outcome["rows"]]
    plain = [value for row in rows for value in row.values()]
    added = [row[key] - rows[0][key] for row, key in product(rows[1:], rows[0]) if key in row]
    return [*plain, *added, *(claim["found"] for claim in outcome["claims"]), outcome["cpu_seconds"]]


def told_well(figure: str, values: list[float]) -> bool:
    """Whether a figure is one of the values, rounded as it is written."""
    number, _, unit = figure.partition(" ")
    places = len(number.partition(".")[2])
    half = 0.5 * 10**-places + 1e-9
    return any(abs(float(number) - value * (100 if unit == "%" else 1)) <= half for value in values)


@pytest.mark.parametrize("begin", TOLD)
def test_what_came_out_of_experiments_on_heads_is_what_is_stored(begin: str) -> None:
    text = paragraph((ROOT / "docs" / "heads.md").read_text(encoding="utf-8"), begin)
    values = [value for name in TOLD[begin] for value in stored(HEADS[name])]
    figures = FIGURE.findall(text)
    assert figures
    assert [figure for figure in figures if not told_well(figure, values)] == []


def test_every_experiment_is_told() -> None:
    assert {name for names in TOLD.values() for name in names} == set(HEADS)


def grown(name: str) -> str:
    """By how many MiB a process has grown behind 8,192 tokens."""
    (cost,) = (cost for cost in POLICIES["costs"] if cost["name"] == name)
    return f"{(cost['peak_bytes'] - cost['start_bytes']) / 2**20:.0f}"


def test_what_duo_holds_is_what_is_stored() -> None:
    (row,) = (row for row in POLICIES["rows"] if row["name"] == "duo: 40 %")
    (cost,) = (cost for cost in POLICIES["costs"] if cost["name"] == "duo: 40 %")
    behind = f"{100 * cost['held_bytes'] / cost['dense_bytes']:.0f} %"
    pages = {
        name: (ROOT / "docs" / "policies" / name).read_text(encoding="utf-8") for name in ("duo.md", "evaluation.md")
    }
    told = {name: " ".join(page.split()) for name, page in pages.items()}
    assert (
        f"{100 * row['held_share']:.0f} % of the cache is held behind 1,024 tokens and {behind} behind 8,192"
        in told["duo.md"]
    )
    assert (
        f"Duo holds {behind} of the bytes, its process has grown by {grown('duo: 40 %')} MiB" in told["evaluation.md"]
    )
    assert f"where the dense model's has by {grown('dense')}," in told["evaluation.md"]


def test_another_figure_is_noticed() -> None:
    values = stored(HEADS["retrieval"])
    assert told_well("2.23", values) and not told_well("2.24", values) and not told_well("2.22", values)
    assert FIGURE.findall("it is .03, -.34, 89 % of (23, 4) in 91 CPU seconds.") == [
        ".03",
        "-.34",
        "89 %",
        "91 CPU seconds",
    ]
