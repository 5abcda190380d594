"""The parts in which a strip reads its slots: disjoint, complete, and none without a slot of each row."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from attnzoo_kernels.cpu import row_tiles

NUMBERS = st.integers(0, 600)


@given(NUMBERS, NUMBERS, NUMBERS, NUMBERS)
def test_every_row_has_a_slot_in_every_part(first: int, late: int, inside: int, early: int) -> None:
    # Rows begin at slots from first to highest, and end before slots from least to last.
    highest = first + late
    least = highest + 1 + inside
    last = least + early
    parts = row_tiles._parts(first, highest, least, last)
    assert parts[0].first == first and parts[-1].last == last
    assert all(one.last == other.first for one, other in pairwise(parts))
    for part in parts:
        assert part.first < part.last
        # A row without a slot of its own in a part would have no softmax there.
        assert part.last > highest or not part.late
        assert part.first < least or not part.early
        # What has no mask is seen by all rows.
        assert part.late or part.first >= highest
        assert part.early or part.last <= least


def test_one_part_serves_few_slots() -> None:
    assert len(row_tiles._parts(0, 10, 10 + row_tiles.LEAST_INSIDE, 300)) == 1
    assert len(row_tiles._parts(0, 10, 12 + row_tiles.LEAST_INSIDE, 300)) == 3
