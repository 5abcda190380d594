"""The look of pictures: lines that differ in black and white, round marks, labels of lines that keep apart."""

from __future__ import annotations

import math
from itertools import combinations, pairwise

import pytest

from attnzoo.reporting import charts, labels


@pytest.mark.parametrize(("count", "keys"), [(32, ("color", "marker", "linestyle")), (32, ("marker", "linestyle"))])
def test_no_two_lines_share_more_than_one_mark_of_theirs(count: int, keys: tuple[str, ...]) -> None:
    for one, other in combinations([charts.look(i) for i in range(count)], 2):
        assert sum(one[key] == other[key] for key in keys) <= 1, (one, other)


@pytest.mark.parametrize(
    ("low", "high", "marks"),
    [
        (0.05, 20, [0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20]),
        (0.9, 1.6, [0.9, 1, 1.2, 1.5]),
        (7.4, 16, [8, 9, 10, 12, 15]),
        (1, 1e6, [1, 10, 100, 1e3, 1e4, 1e5, 1e6]),
    ],
)
def test_marks_are_round_and_few(low: float, high: float, marks: list[float]) -> None:
    assert charts.ladder(low, high, most=9) == marks


def test_numbers_are_written_as_people_write_them() -> None:
    assert [charts.plain(x) for x in (0.05, 1, 488.2, 16188)] == ["0.05", "1", "488", "16,188"]
    assert [charts.tokens(x) for x in (512, 1000, 1024, 65536)] == ["512", "1,000", "1k", "64k"]


@pytest.mark.parametrize("count", [1, 2, 30])
def test_labels_at_the_ends_of_lines_keep_apart_and_in_order(count: int) -> None:
    with charts.style():
        figure = charts.sheet(8, max(4.0, 0.2 * count), "title")
        axes = figure.subplots()
        for i in range(count):
            # They end close to each other, the last one before the others.
            axes.plot([1, 2, 3], [i, 1, math.nan if i == 0 else 50 + i / 10], label=f"line {i}", **charts.look(i))
        axes.plot([1, 3], [0, 0])
        made = labels.at_ends(axes)
        figure.canvas.draw()
    assert [label.get_text() for label in made] == [f"line {i}" for i in range(count)]
    boxes = [label.get_window_extent() for label in made]
    assert all(lower.y1 <= higher.y0 for lower, higher in pairwise(boxes))
    frame = figure.bbox
    assert all(box.x0 > axes.get_window_extent().x1 and box.x1 <= frame.x1 for box in boxes)
    assert all(box.y0 >= 0 and box.y1 <= frame.y1 for box in boxes)
