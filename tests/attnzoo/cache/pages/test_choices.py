"""Pages that a row has chosen for those behind it: what becomes of them as tokens are taken back and beams chosen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnzoo.cache.pages.cache import PagedCache
from attnzoo.cache.policies.reading import Pages
from tests.attnzoo.base.paged.paged_calls import empty_cache, run, sequences

POLICY = Pages(page=2, budget=8, reuse=4)
PROMPT = [[19, 13]]
ROWS = {
    "together": [[1, 1]] * 3,
    "apart": [[1, 1], [1, 0], [0, 1], [1, 1]],
    "late": [[1, 0], [1, 0], [1, 1]],
}
REST = [[1, 1]] * 5


def behind(tensors: tuple[Tensor, ...], calls: list[list[int]], items: list[int] | None = None) -> list[Tensor]:
    """What comes behind some calls, of some items: other tokens than came before, where any were taken back."""
    done = [sum(column) for column in zip(*calls, strict=True)]
    items = list(range(len(done))) if items is None else items
    return [torch.stack([x[item, :, done[item] : done[item] + len(REST)] for item in items]) for x in tensors]


def cache_behind(tensors: tuple[Tensor, ...], calls: list[list[int]]) -> PagedCache:
    cache = empty_cache(POLICY, 2)
    run(cache, tensors, calls)
    return cache


def forgetful(cache: PagedCache) -> PagedCache:
    """The same, with nothing chosen."""
    copy = cache.fork()
    copy.choice = None
    return copy


@pytest.mark.parametrize("index", [[1, 0], [1], [0, 0, 1, 1, 0]], ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_chosen_items_read_what_they_have_chosen(rows: str, index: list[int]) -> None:
    tensors = sequences(2, 40, 6)
    calls = PROMPT + ROWS[rows]
    cache = cache_behind(tensors, calls)
    chosen = cache.fork()
    chosen.reorder(torch.tensor(index))
    expected = run(forgetful(cache), behind(tensors, calls), REST)[index]
    calls_of_each = [[lengths[item] for item in index] for lengths in REST]
    found = run(chosen, behind(tensors, calls, index), calls_of_each)
    # The control: a new choice is another one.
    assert not torch.allclose(found, expected)
    expected = run(cache, behind(tensors, calls), REST)[index]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("back", [1, 2, 3])
@pytest.mark.parametrize("rows", ROWS)
def test_a_choice_stays_as_long_as_the_row_that_made_it(rows: str, back: int) -> None:
    """As if the rows that are taken back had never come, pages that they have begun among it."""
    tensors = sequences(2, 40, 6)
    calls = PROMPT + ROWS[rows]
    left = PROMPT + ROWS[rows][:-back]
    cache = cache_behind(tensors, calls)
    cache.crop(torch.tensor([sum(column) for column in zip(*left, strict=True)]))
    other = cache_behind(tensors, left)
    rest = behind(sequences(2, 40, 7), left)
    expected = run(other, rest, REST)
    if back < len(ROWS[rows]) - 1:
        # The control: a new choice is another one.
        assert not torch.allclose(run(forgetful(cache), rest, REST), expected)
    torch.testing.assert_close(run(cache, rest, REST), expected, rtol=0, atol=1e-12)


def test_taking_back_what_had_chosen_chooses_anew() -> None:
    tensors = sequences(2, 40, 6)
    calls = PROMPT + [[1, 1]] * 5
    cache = cache_behind(tensors, calls)
    assert cache.choice is not None
    assert cache.choice.uses == 1
    cache.crop(cache.lengths - 1)
    assert cache.choice is None
