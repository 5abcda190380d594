"""Edges of caches: the last slot of a ragged one, and rings before they have come round."""

from __future__ import annotations

import pytest
import torch

import attnzoo
from attnzoo.cache.streams import CROP_MARGIN, Ring
from tests.attnzoo.cases import tokens


def test_the_last_slot_of_a_ragged_cache_is_read() -> None:
    layer = attnzoo.create("mha", dim=16, num_heads=2, dtype=torch.float64)
    x = tokens(layer, 2, 12)
    padding = torch.zeros(2, 12, dtype=torch.bool)
    padding[0, :5] = True
    with torch.no_grad():
        expected = layer(x, key_padding=padding)
        cache = layer.new_cache(2, 12)
        first = layer(x[:, :7], key_padding=padding[:, :7], cache=cache)
        rest = [layer(x[:, t : t + 1], cache=cache) for t in range(7, 12)]
    torch.testing.assert_close(torch.cat([first, *rest], 1), expected, rtol=1e-10, atol=1e-10)


def ring(history: int, rows: int, batch: int = 2) -> Ring:
    """A ring whose memory holds numbers that no token has."""
    return Ring(history, torch.full((batch, 1, rows + 1, 1), -7.0))


def values(first: int, count: int, batch: int = 2) -> torch.Tensor:
    """Token s of item b has the value ``100 b + s + 1``."""
    token = torch.arange(first, first + count).float() + 1
    return (token + 100 * torch.arange(batch).unsqueeze(1)).view(batch, 1, count, 1)


@pytest.mark.parametrize("tensor", [False, True], ids=["common", "ragged"])
@pytest.mark.parametrize("length", [0, 1, 3, 5, 9])
def test_before_the_first_token_there_are_zeros(length: int, tensor: bool) -> None:
    held = ring(4, 8)
    if length:
        held.write(values(0, length), torch.zeros(2, dtype=torch.int64) if tensor else 0, length)
    found = held.last(4, torch.full((2,), length) if tensor else length)
    for item in range(2):
        wanted = [100 * item + s + 1 if s >= 0 else 0 for s in range(length - 4, length)]
        assert found[item, 0, :, 0].tolist() == wanted


def test_chosen_items_take_their_margins_along() -> None:
    rows = 4 + CROP_MARGIN
    held = ring(4, rows)
    lengths = torch.tensor([rows + 9, 6])
    held.write(values(0, rows + 9), torch.zeros(2, dtype=torch.int64), lengths)
    assert isinstance(held.oldest, torch.Tensor) and held.oldest.tolist() == [9, 0]
    swapped = held.select(torch.tensor([1, 0]))
    assert isinstance(swapped.oldest, torch.Tensor) and swapped.oldest.tolist() == [0, 9]
    # The longer item forgot its first tokens: it cannot be cropped to where they would be history.
    assert swapped.can_crop(lengths.flip(0), torch.tensor([3, 13]))
    assert not swapped.can_crop(lengths.flip(0), torch.tensor([3, 12]))
    assert not held.can_crop(lengths, torch.tensor([12, 3]))


def test_a_call_longer_than_a_ring_leaves_its_last_tokens() -> None:
    for before in (0, 3, 5):
        held = ring(4, 6)
        if before:
            held.write(values(0, before), 0, before)
        held.write(values(before, 11), before, 11)
        assert held.last(4, before + 11)[1, 0, :, 0].tolist() == [100 + before + s + 1 for s in range(7, 11)]
        assert held.oldest == before + 5
