"""Where the search for groups has a choice: neighbours stay together unless something is won."""

from __future__ import annotations

import pytest

from attnzoo.surgery.lowrank import grouping

PAIRS = {(0, 1): 1.0, (2, 3): 1.0, (0, 2): 0.0, (1, 3): 2.0, (0, 3): 1.5, (1, 2): 1.5}
"""Greedy seeds with heads 0 and 2, which leaves 1 and 3: as dear as neighbours."""


@pytest.mark.parametrize("won", [0.0, 1e-13, -1e-13, 1e-11, 1e-3])
def test_neighbours_stay_together_unless_more_than_rounding_is_won(won: float) -> None:
    costs = {**PAIRS, (1, 3): 2.0 - won}
    found = grouping.find_groups(4, 2, lambda group: costs[tuple(sorted(group))])  # type: ignore[index]
    assert found == (((0, 2), (1, 3)) if won == 1e-3 else ((0, 1), (2, 3)))


@pytest.mark.parametrize(("lost", "asks"), [(0.0, False), (1e-13, False), (1e-6, True)])
def test_neighbours_that_lose_nothing_are_not_compared_with_others(lost: float, asks: bool) -> None:
    costs = {(0, 1): lost, (2, 3): 0.0, (0, 2): 0.0, (1, 3): 0.0, (0, 3): 1.0, (1, 2): 1.0}
    asked: set[tuple[int, ...]] = set()

    def cost(group: tuple[int, ...]) -> float:
        asked.add(tuple(sorted(group)))
        return costs[tuple(sorted(group))]  # type: ignore[index]

    assert grouping.find_groups(4, 2, cost) == (((0, 2), (1, 3)) if asks else ((0, 1), (2, 3)))
    assert ((0, 2) in asked) is asks


def test_swaps_that_win_nothing_are_not_made() -> None:
    asked: list[tuple[int, ...]] = []

    def cost(group: tuple[int, ...]) -> float:
        asked.append(group)
        return 1.0

    groups = [[0, 3], [1, 2]]
    assert grouping._improve(groups, cost) == ((0, 3), (1, 2))
    # One sweep of four swaps that change nothing, each with two costs before and two afterwards.
    assert len(asked) == 16


def test_a_swap_that_loses_is_taken_back_and_one_that_wins_is_kept() -> None:
    def cost(group: tuple[int, ...]) -> float:
        return 0.0 if set(group) in ({0, 1}, {2, 3}) else 1.0

    a, b = [0, 3], [1, 2]
    assert not grouping._try_swap(a, 0, [*b], 0, lambda group: float(group != (0, 3)))
    assert a == [0, 3]
    assert grouping._try_swap(a, 1, b, 0, cost)
    assert (a, b) == ([0, 1], [3, 2])


def test_a_group_is_filled_with_whoever_is_closest_to_its_members() -> None:
    near = {(0, 1): 0.0, (2, 3): 1.0}
    pairs = {(i, j): near.get((i, j), 5.0 + i + j) for i in range(6) for j in range(i + 1, 6)}
    pairs[1, 5] = pairs[0, 5] = 0.5
    assert grouping._greedy(6, 3, pairs) == [[0, 1, 5], [2, 3, 4]]
