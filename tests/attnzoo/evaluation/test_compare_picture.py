"""A picture that tells its rows apart: no outlier squeezes the others."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from attnzoo.evaluation import compare_picture
from attnzoo.evaluation.compare import Comparison
from attnzoo.evaluation.compare_report import read

RESULTS = Path(__file__).resolve().parents[3] / "bench" / "results"
DEMO = read((RESULTS / "smollm2-demo.json").read_text(encoding="utf-8")).rows

RATIOS = [
    # One outlier among many is broken, wherever it lies.
    ([row.ratio for row in DEMO], 3.841),
    ([1.0, 1.1, 1.2, 1.3, 1e9], 1.3),
    ([1.0, 0.9, 0.8, 1.25, 1e-6], 1.25),
    # What is no outlier is drawn in full: few rows, many long ones, or nothing but roundings beside it.
    ([1.0, 488.0], 488.0),
    ([1.0, 2.0, 3.0, 4.0, 5.0], 5.0),
    ([1.0, 1.1, 400.0, 500.0, 600.0], 600.0),
    ([1.0, 1.0, 1.0, 1.0001, 1.5], 1.5),
    ([1.0], 1.0),
    # A model that is ruined altogether does not take the picture with it.
    ([1.0, 1.2, math.inf, math.nan], 1.2),
]


@pytest.mark.parametrize(("ratios", "end"), RATIOS)
def test_an_outlier_does_not_squeeze_the_others(ratios: list[float], end: float) -> None:
    assert compare_picture.reach(ratios) == pytest.approx(max(end, math.exp(compare_picture.SHORTEST)), rel=1e-3)


def test_a_broken_bar_says_its_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib import pyplot

    kept = []
    monkeypatch.setattr(pyplot, "close", kept.append)
    rows = [*DEMO, replace(DEMO[0], name="ruined", ratio=math.inf), replace(DEMO[0], name="better", ratio=0.8)]
    compare_picture.picture(Comparison({}, rows), "title", tmp_path / "picture.png")
    left = kept[0].axes[0]
    texts = [text.get_text() for text in left.texts]
    assert texts[[row.name for row in rows].index("mean_pool 3->1")].endswith(" (bar broken)")
    assert texts[-2:] == ["inf (bar broken)", "0.800"]
    assert sum("broken" in text for text in texts) == 2
    # Each loss of 0.03 and more is a bar that can be seen, and every bar ends inside.
    low, high = (math.log(end) for end in left.get_xlim())
    for row, bar in zip(rows, left.patches, strict=True):
        first, last = sorted((bar.get_x(), bar.get_x() + bar.get_width()))
        assert low <= math.log(first) <= math.log(last) <= high
        if abs(row.delta_nll) > 0.03:
            assert (math.log(last) - math.log(first)) / (high - low) > 0.015, row.name
    monkeypatch.undo()
    pyplot.close(kept[0])
