"""The ranges in which a tile reads its slots: disjoint, complete, and none without a slot of each row."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from attnzoo_kernels.cpu import row_tiles

NUMBERS = st.integers(0, 600)


@given(NUMBERS, NUMBERS, NUMBERS, NUMBERS)
def test_every_row_has_a_slot_in_every_range(first: int, late: int, inside: int, early: int) -> None:
    # Rows begin at slots from first to highest, and end before slots from least to last.
    highest = first + late
    least = highest + 1 + inside
    last = least + early
    ranges = row_tiles._key_ranges(first, highest, (least, last))
    assert ranges[0].first == first and ranges[-1].last == last
    assert all(one.last == other.first for one, other in pairwise(ranges))
    for keys in ranges:
        assert keys.first < keys.last
        # A row without a slot of its own in a range would have no softmax there.
        assert keys.last > highest or not keys.late
        assert keys.first < least or not keys.early
        # What has no mask is seen by all rows.
        assert keys.late or keys.first >= highest
        assert keys.early or keys.last <= least


def test_one_range_serves_few_slots() -> None:
    assert len(row_tiles._key_ranges(0, 10, (10 + row_tiles.LEAST_INSIDE, 300))) == 1
    assert len(row_tiles._key_ranges(0, 10, (12 + row_tiles.LEAST_INSIDE, 300))) == 3


@given(st.integers(0, 50), st.integers(1, 400), st.integers(1, 300))
def test_the_ranges_of_rows_behind_a_window_hold_what_each_of_them_sees(first: int, window: int, rows: int) -> None:
    # Row i sees the slots from first + i to first + i + window - 1.
    ends = (first + window, first + window + rows - 1)
    ranges = row_tiles._key_ranges(first, first + rows - 1, ends, straight=True)
    assert ranges[0].first == first and ranges[-1].last == ends[1]
    assert all(one.last == other.first for one, other in pairwise(ranges))
    for row in (0, rows // 2, rows - 1):
        seen = 0
        for keys in ranges:
            last = keys.first + row + 1 if keys.causal else keys.last
            if keys.early:
                last = min(last, first + row + window)
            begin = max(keys.first, first + row) if keys.late else keys.first
            assert begin < last <= keys.last and begin >= first + row
            seen += last - begin
        assert seen == window
