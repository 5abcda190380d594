"""Numbers of tokens that items share, and numbers of each: the same for both kinds, and what is known of them."""

from __future__ import annotations

import copy
import pickle
from itertools import product

import pytest
import torch
from torch import Tensor

from attnzoo.cache.lengths import Lengths

BATCH = 3
KINDS = [4, 0, torch.tensor([4, 0, 7])]


def items(value: int | Tensor) -> list[int]:
    """The number of each item."""
    return torch.as_tensor(value).expand(BATCH).tolist()


@pytest.mark.parametrize("value", KINDS)
def test_only_a_shared_number_is_known(value: int | Tensor) -> None:
    lengths = Lengths(value)
    assert lengths.differ == isinstance(value, Tensor)
    assert lengths.shared == (None if isinstance(value, Tensor) else value)
    assert lengths.each is (value if isinstance(value, Tensor) else None)
    assert lengths.most(9) == (9 if isinstance(value, Tensor) else value)


@pytest.mark.parametrize("value", KINDS)
def test_slots_before_the_end_hold_tokens(value: int | Tensor) -> None:
    held = Lengths(value).holds(torch.arange(6)).expand(BATCH, -1)
    assert held.tolist() == [[slot < count for slot in range(6)] for count in items(value)]


@pytest.mark.parametrize("value", KINDS)
def test_a_column_goes_beside_any_dimensions(value: int | Tensor) -> None:
    for dims in (1, 2, 4):
        column = Lengths(value).column(dims)
        if isinstance(value, Tensor):
            assert isinstance(column, Tensor)
            assert column.shape == (BATCH, *[1] * (dims - 1))
        else:
            assert column is value
        assert items(torch.as_tensor(column).flatten()) == items(value)


@pytest.mark.parametrize(("one", "other"), list(product(KINDS, [*KINDS, 5, torch.tensor([6, 2, 1])])))
def test_larger_and_smaller_numbers_are_those_of_each_item(one: int | Tensor, other: int | Tensor) -> None:
    pairs = list(zip(items(one), items(other), strict=True))
    larger = Lengths(one).maximum(Lengths(other))
    smaller = Lengths(one).minimum(Lengths(other))
    assert items(larger.value) == [max(pair) for pair in pairs]
    assert items(smaller.value) == [min(pair) for pair in pairs]
    assert larger.differ == smaller.differ == (isinstance(one, Tensor) or isinstance(other, Tensor))


@pytest.mark.parametrize("value", KINDS)
def test_items_are_chosen_and_numbers_travel(value: int | Tensor) -> None:
    index = torch.tensor([2, 0, 2])
    chosen = Lengths(value).select(index)
    assert items(chosen.value) == [items(value)[item] for item in index.tolist()]
    for same in (Lengths(value).to(torch.device("cpu")), copy.deepcopy(chosen), pickle.loads(pickle.dumps(chosen))):
        assert same.differ == chosen.differ
    assert Lengths(value).to(torch.device("meta")).differ == isinstance(value, Tensor)


def test_one_program_serves_all_shared_numbers() -> None:
    def padded(x: Tensor, count: int) -> Tensor:
        least = Lengths(count).maximum(Lengths(2))
        most = least.minimum(Lengths(5))
        return torch.where(most.holds(torch.arange(x.shape[1])), x + most.column(), 0)

    torch._dynamo.reset()
    graphs: list[object] = []

    def count_graphs(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(padded, fullgraph=True, dynamic=True, backend=count_graphs)
    x = torch.arange(12.0).view(2, 6)
    for count in (2, 3, 4, 5, 6, 9):
        assert torch.equal(compiled(x, count), padded(x, count))
    assert len(graphs) == 1
