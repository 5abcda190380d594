"""A picture of quality against cost: outliers are cut off and named, and every row can be told from the others."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any

import pytest
from matplotlib.figure import Figure

from attnzoo.evaluation import compare_picture
from attnzoo.evaluation.compare import Comparison, LongDecoding, Row
from attnzoo.evaluation.compare_report import read
from attnzoo.reporting import charts

RESULTS = Path(__file__).resolve().parents[3] / "bench" / "results"
DEMO = read((RESULTS / "smollm2-demo.json").read_text(encoding="utf-8")).rows
DENSE = DEMO[0]
S2 = next(row for row in DEMO if row.name == "s2 with sink")

RATIOS = [
    # One outlier among many is cut off, wherever it lies.
    ([row.ratio for row in DEMO], 3.841),
    ([1.0, 1.1, 1.2, 1.3, 1e9], 1.3),
    ([1.0, 0.9, 0.8, 1.25, 1e-6], 1.25),
    # What is no outlier is drawn: few rows, many that are far, or nothing but roundings beside it.
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
    rows = [replace(DENSE, ratio=ratio) for ratio in ratios]
    found = charts.reach([abs(compare_picture.loss(row)) for row in rows], compare_picture.SHORTEST)
    assert math.exp(found) == pytest.approx(max(end, math.exp(compare_picture.SHORTEST)), rel=1e-3)


def drawn(rows: list[Row]) -> Figure:
    """The picture of these rows, after it has been drawn as into a file."""
    with charts.style():
        figure = compare_picture.draw(Comparison({}, rows), "title")
        figure.canvas.draw()
    return figure


@cache
def demo() -> Figure:
    """Of the demo, of a row whose output is no number, and of one that nobody timed."""
    more = [
        replace(S2, name="ruined", ratio=math.inf),
        replace(S2, name="nobody timed it", decode_times_dense=None),
    ]
    return drawn([*DEMO, *more])


def texts(figure: Figure) -> list[list[str]]:
    """What is written beside the points of each panel, in one line each."""
    return [[text.get_text().replace("\n", " ") for text in axes.texts if text.get_text()] for axes in figure.axes]


def test_outliers_are_cut_off_and_named_with_an_arrow() -> None:
    figure = demo()
    for axes, told in zip(figure.axes, texts(figure), strict=True):
        assert [text for text in told if "mean_pool" in text] == ["mean_pool 3->1 at 488 x is beyond the axis"]
        assert any("ruined at inf x is beyond the axis" in text for text in told)
        assert sum("beyond" in text for text in told) == 2
        # An arrow for each; its head is at the edge of the axes.
        heads = [text.xy for text in axes.texts if not text.get_text()]  # type: ignore[attr-defined]
        assert [y for _, y in heads] == [axes.get_ylim()[1]] * 2
        assert axes.get_ylim()[1] < math.log(488)
    # What is cut off is not among the points, and what is not is: with a loss of 0.03 it is seen to be above dense.
    marks: list[Any] = [line.get_ydata() for line in figure.axes[0].lines if line.get_linestyle() == "None"]
    points = {float(mark[0]) for mark in marks}
    losses = {compare_picture.loss(row) for row in DEMO}
    assert points == {loss for loss in losses if loss < 6}
    low, high = (figure.axes[0].transData.transform((0, y))[1] for y in (0.0, 0.03))
    assert high - low > 0.1 * figure.axes[0].get_window_extent().height


def many(count: int) -> list[Row]:
    """Made-up rows, an outlier of time among them; the first is dense."""
    random = Random(0)
    found = [DENSE]
    for i in range(count - 1):
        row = replace(
            S2,
            name=f"s2:local_blocks={i},vert_stride=4",
            ratio=1 + 2 * random.random() ** 3,
            kv_bytes_held=int(46080 * random.random()),
            decode_times_dense=50.0 if i == 0 else 0.5 + random.random(),
            flags=["negative control"] if i % 5 == 0 else [],
        )
        found.append(row)
    return found


@cache
def made_up(count: int) -> Figure:
    """Of so many rows."""
    return drawn(many(count))


@pytest.mark.parametrize("rows", [1, 2, 30])
def test_no_label_covers_another_or_leaves_the_picture(rows: int) -> None:
    told_apart(made_up(rows))


def test_labels_of_the_demo_can_be_told_apart() -> None:
    told_apart(demo())


def told_apart(figure: Figure) -> None:
    """Every text by the boxes that the renderer gives it."""
    from matplotlib.text import Text

    for axes in figure.axes:
        frame = axes.get_window_extent().padded(1)
        boxes = [Text.get_window_extent(text) for text in axes.texts if text.get_text()]
        assert boxes
        for box in boxes:
            assert frame.containsx(box.x0)
            assert frame.containsx(box.x1)
            assert frame.containsy(box.y0)
            assert frame.containsy(box.y1)
        for one, other in combinations(boxes, 2):
            assert not one.overlaps(other), (one, other)


def test_every_row_is_named_or_numbered_in_every_panel() -> None:
    for told in texts(demo()):
        for row in DEMO:
            assert any(row.name in text for text in told), row.name
    bytes_held, steps = demo().axes
    assert "nobody timed it" in " ".join(texts(demo())[0])
    assert steps.get_title(loc="left") == "not measured: nobody timed it"
    assert bytes_held.get_title(loc="left") == ""
    figure = made_up(30)
    for told in texts(figure):
        numbers = [number for text in told for number in text.split(" at ")[0].replace(";", "").split()]
        assert sorted(map(int, numbers)) == list(range(1, 31))
    listed = [text.get_text() for text in figure.legends[-1].get_texts()]
    assert listed[:2] == ["1  dense", "2  s2:local_blocks=0,vert_stride=4"]
    assert any(text == "2 at 50 x dense is beyond the axis" for text in texts(figure)[1])


def test_dense_and_controls_look_different_from_variants() -> None:
    kinds = [compare_picture.kind(row) for row in DEMO]
    assert kinds[:3] == [compare_picture.DENSE, compare_picture.DENSE, compare_picture.EXACT]
    assert kinds.count(compare_picture.CONTROL) == 2
    broken = replace(DEMO[2], flags=["CERTIFICATE FAILS"])
    assert compare_picture.kind(broken) == compare_picture.BROKEN
    assert len({look["marker"] for look in compare_picture.KINDS.values()}) == len(compare_picture.KINDS)


def test_what_was_not_measured_has_no_panel_and_each_longer_prompt_one() -> None:
    untimed = [replace(row, decode_times_dense=None) for row in DEMO]
    assert len(drawn(untimed).axes) == 1
    longer = [replace(row, longer=[LongDecoding(4096, 10.0, 0.5, 1)]) for row in DEMO[:4]]
    labels = [axes.get_xlabel() for axes in drawn(longer).axes]
    assert len(labels) == 3
    assert "behind 4,096 tokens" in labels[2]


def test_the_line_is_of_rows_that_no_other_beats() -> None:
    points = [(3.0, 1.0), (1.0, 5.0), (2.0, 2.0), (2.0, 3.0), (4.0, 1.0), (1.0, 5.0), (3.0, 4.0)]
    assert compare_picture.pareto(points) == [(1.0, 5.0), (2.0, 2.0), (3.0, 1.0)]
    assert compare_picture.pareto([]) == []


def test_a_picture_leaves_the_callers_settings_alone(tmp_path: Path) -> None:
    import matplotlib

    backend = matplotlib.get_backend()
    with matplotlib.rc_context({"figure.facecolor": "black", "text.color": "white"}):
        before = dict(matplotlib.rcParams)
        compare_picture.picture(Comparison({}, DEMO[:2]), "title", tmp_path / "picture.png")
        assert dict(matplotlib.rcParams) == before
    assert matplotlib.get_backend() == backend
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
