"""The picture of LongHeads tells its rows apart: no two lines look the same."""

from __future__ import annotations

import json
from itertools import combinations, pairwise
from pathlib import Path

import pytest

from attnzoo.reporting import labels
from bench.longheads import picture
from bench.longheads.rows import Reading

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
LONG = [Reading(**row) for row in json.loads((RESULTS / "smollm2-longheads.json").read_text(encoding="utf-8"))["rows"]]


def test_no_two_lines_of_longheads_look_the_same() -> None:
    looks = [
        (line.label, line.style["color"], line.style["marker"], line.style["linestyle"])
        for line in picture.close_up(LONG)
    ]
    assert len(looks) == 8
    for one, other in combinations(looks, 2):
        assert sum(x == y for x, y in zip(one, other, strict=True)) <= 1, (one, other)


@pytest.mark.parametrize("heights", [[0.5] * 8, [0.0, 1.0, 0.99, 0.98], [-0.2, 1.3], [0.3, 0.31, 0.9], []])
def test_labels_keep_apart_and_in_order(heights: list[float]) -> None:
    moved = labels.spread(heights, gap=0.05)
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    assert all(moved[b] - moved[a] > 0.0499 for a, b in pairwise(order))
    assert all(-1e-9 <= height <= 1 for height in moved)
