"""Moving rows: against loops over tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnzoo.base.padding import Alignment, add_front, drop_front, front_positions, take_rows

PADDING = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
ROWS = 8
FRONTS: list[int | Tensor] = [0, 2, 3, torch.tensor([0, 3, 1, 2])]


def numbers(*shape: int) -> Tensor:
    return torch.arange(1, 1 + torch.Size(shape).numel()).view(shape)


def test_real_tokens_come_first_in_their_order_and_find_back() -> None:
    moved = Alignment.of(PADDING)
    x = numbers(4, 5, 1)
    rows = take_rows(x, moved.order)
    for item, padding in enumerate(PADDING):
        real = x[item][~padding]
        assert torch.equal(rows[item, : len(real)], real)
        assert int(moved.lengths[item]) == len(real)
        assert torch.equal(rows[item][moved.row_index[item][~padding]], real)
        assert sorted(moved.order[item].tolist()) == list(range(5))


@pytest.mark.parametrize("front", FRONTS, ids=str)
def test_rows_in_front_are_put_there_and_taken_away_again(front: int | Tensor) -> None:
    q = numbers(4, 2, 5, 3)
    whole = add_front(q, front, ROWS)
    assert whole.shape == (4, 2, ROWS, 3)
    for item in range(4):
        first = int(front[item]) if isinstance(front, Tensor) else front
        assert torch.equal(whole[item, :, first : first + 5], q[item])
    assert torch.equal(drop_front(whole, front, 5), q)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("items", [1, 4])
@pytest.mark.parametrize("front", FRONTS, ids=str)
def test_rows_in_front_and_behind_stand_nowhere(front: int | Tensor, items: int, heads: int) -> None:
    q_pos = numbers(items, heads, 5).int()
    found = front_positions(q_pos, front, ROWS)
    assert found is not None
    for item in range(found.shape[0]):
        first = int(front[item]) if isinstance(front, Tensor) else front
        expected = torch.full((heads, ROWS), -1, dtype=torch.int32)
        expected[:, first : first + 5] = q_pos[item if items > 1 else 0]
        assert torch.equal(found[item], expected)


def test_where_nothing_is_added_nothing_moves() -> None:
    q = numbers(4, 2, 5, 3)
    assert add_front(q, 0, 5) is q
    assert drop_front(q, 0, 5) is q
    assert front_positions(None, 3, ROWS) is None
