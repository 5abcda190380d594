"""Putting landmarks into a batch and taking their outputs out: against lists, for any lengths, padding and calls."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attnzoo
from attnzoo.variants.landmark.tokens import (
    LandmarkGrid,
    WithLandmarks,
    insert_landmarks,
    length_with_landmarks,
    mean_embedding,
)
from tests.attnzoo.cases import assert_same, build, tokens

MARK = 999


def by_hand(ids: list[int], size: int, offset: int) -> list[tuple[int, int]]:
    """Of one item without padding: id and position of each token."""
    rows, seen = [], offset
    for token in ids:
        rows.append((token, seen + seen // (size - 1)))
        seen += 1
        if seen % (size - 1) == 0:
            rows.append((MARK, rows[-1][1] + 1))
    return rows


def real(found: WithLandmarks, x: Tensor, item: int) -> list[Any]:
    """An item's entries that are no padding."""
    rows = x[item]
    kept: list[Any] = (rows if found.key_padding is None else rows[~found.key_padding[item]]).tolist()
    return kept


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_ids_are_those_of_a_loop(data: st.DataObject) -> None:
    size, batch, length = data.draw(st.integers(2, 6)), data.draw(st.integers(1, 3)), data.draw(st.integers(0, 17))
    ids = torch.arange(1, batch * length + 1).view(batch, length)
    padded, each = data.draw(st.booleans()), data.draw(st.booleans())
    seed = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    key_padding = torch.rand(batch, length, generator=seed) < 0.4 if padded else None
    offsets = torch.randint(0, 20, (batch,), generator=seed)
    offset: Any = offsets if each else int(offsets[0])
    shared = data.draw(st.booleans())
    found = insert_landmarks(
        ids,
        MARK,
        block_size=size,
        key_padding=key_padding,
        labels=ids,
        positions=(ids * 3) if shared else None,
        offset=offset,
    )
    kept = torch.ones_like(ids, dtype=torch.bool) if key_padding is None else ~key_padding
    assert torch.equal(found.drop(found.tokens)[kept], ids[kept])
    assert torch.equal(found.drop(found.is_landmark), torch.zeros_like(ids, dtype=torch.bool))
    for item in range(batch):
        expected = by_hand(ids[item][kept[item]].tolist(), size, int(offsets[item]) if each else offset)
        assert real(found, found.tokens, item) == [row[0] for row in expected]
        assert real(found, found.is_landmark, item) == [row[0] == MARK for row in expected]
        places = [row[1] for row in expected]
        if shared:
            places = [3 * (token if token != MARK else expected[at - 1][0]) for at, (token, _) in enumerate(expected)]
        assert real(found, found.positions, item) == places
        assert real(found, found.labels, item) == [-100 if row[0] == MARK else row[0] for row in expected]
        if padded:
            gone = found.key_padding[item]
            assert (found.tokens[item][gone] == 0).all()
            assert (found.labels[item][gone] == -100).all()


@pytest.mark.parametrize("size", [51, 64])
@pytest.mark.parametrize("length", [0, 1, 49, 50, 51, 63, 64, 200])
def test_any_length_becomes_what_the_formula_says(size: int, length: int) -> None:
    found = insert_landmarks(torch.ones(2, length, dtype=torch.int64), MARK, block_size=size)
    assert found.tokens.shape == (2, length_with_landmarks(length, size))
    assert found.key_padding is None
    assert torch.equal(found.is_landmark, (torch.arange(found.tokens.shape[1]) % size == size - 1).expand(2, -1))


@settings(max_examples=20, deadline=None)
@given(ends=st.sets(st.integers(1, 29), max_size=5), padded=st.booleans())
def test_call_by_call_is_at_once(ends: set[int], padded: bool) -> None:
    ids = torch.arange(1, 61).view(2, 30)
    key_padding = torch.rand(2, 30, generator=torch.Generator().manual_seed(0)) < 0.4 if padded else None
    whole = insert_landmarks(ids, MARK, block_size=4, key_padding=key_padding)
    seen: Any = torch.zeros(2, dtype=torch.int64) if padded else 0
    rows: list[list[tuple[int, int]]] = [[], []]
    for a, b in pairwise([0, *sorted(ends), 30]):
        part = None if key_padding is None else key_padding[:, a:b]
        found = insert_landmarks(ids[:, a:b], MARK, block_size=4, key_padding=part, offset=seen)
        for item in range(2):
            rows[item] += zip(real(found, found.tokens, item), real(found, found.positions, item), strict=True)
        seen = seen + ((b - a) if part is None else (~part).sum(1))
    for item in range(2):
        assert rows[item] == list(zip(real(whole, whole.tokens, item), real(whole, whole.positions, item), strict=True))


def test_embeddings_take_their_places_and_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 7, 5, generator=generator, requires_grad=True)
    mark = torch.randn(5, generator=generator, requires_grad=True)
    found = insert_landmarks(x, mark, block_size=3, key_padding=torch.arange(7) < torch.tensor([[0], [3]]))
    assert (found.tokens[found.is_landmark] == mark).all()
    assert torch.equal(found.drop(found.tokens)[0], x[0])
    weight = torch.randn(found.tokens.shape, generator=generator)
    dx, dmark = torch.autograd.grad((found.tokens * weight).sum(), (x, mark))
    assert torch.equal(dx[0], found.drop(weight)[0])
    assert (dx[1, :3] == 0).all()
    assert torch.allclose(dmark, weight[found.is_landmark].sum(0))


def test_labels_may_have_the_landmarks_and_positions_are_shared_with_the_token_before() -> None:
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    found = insert_landmarks(
        ids, MARK, block_size=3, labels=ids, landmark_label=MARK, positions=torch.tensor([10, 20, 30, 40, 50])
    )
    assert found.labels is not None
    assert found.labels.tolist() == [[5, 6, MARK, 7, 8, MARK, 9]]
    assert found.positions.tolist() == [[10, 20, 20, 30, 40, 40, 50]]


def test_a_new_landmark_is_the_mean_of_the_embeddings() -> None:
    weight = torch.nn.Embedding(50, 8).weight
    mean = mean_embedding(weight)
    assert not mean.requires_grad
    assert torch.allclose(mean, weight.mean(0))
    assert mean_embedding(weight.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("mode", ["soft", "topk"])
def test_without_gates_inserted_landmarks_change_nothing(mode: Any) -> None:
    """Landmarks that take no position, with weight 0 beside blocks that weigh what they hold: plain attention."""
    config = attnzoo.LandmarkConfig(
        dim=32, num_heads=4, num_kv_heads=2, block_size=6, top_k=20, mode=mode, gate_mix=0.0, landmark_positions=False
    )
    layer = build(config, dtype=torch.float64)
    plain = attnzoo.create(attnzoo.MHAConfig(dim=32, num_heads=4, num_kv_heads=2)).double()
    plain.load_state_dict(layer.state_dict())
    x = tokens(layer, 3, 61)
    mark = tokens(layer, 1, 1, seed=1)[0, 0]
    key_padding = torch.rand(3, 61, generator=torch.Generator().manual_seed(0)) < 0.3
    for padding in (None, key_padding):
        found = insert_landmarks(x, mark, block_size=6, key_padding=padding)
        y = found.drop(layer.attend(found.tokens, key_padding=found.key_padding).out)
        assert_same(y, plain.attend(x, key_padding=padding).out)
    parts: list[Tensor] = []
    cache, seen = layer.new_cache(3, 80), torch.zeros(3, dtype=torch.int64)
    with torch.no_grad():
        for part, padding in zip(x.split(7, 1), key_padding.split(7, 1), strict=True):
            found = insert_landmarks(part, mark, block_size=6, key_padding=padding, offset=seen)
            outs = found.drop(layer.attend(found.tokens, key_padding=found.key_padding, cache=cache).out)
            parts.append(outs)
            seen += (~padding).sum(1)
        assert_same(torch.cat(parts, 1), plain.attend(x, key_padding=key_padding).out)
        assert torch.equal(cache.lengths, length_with_landmarks(seen, 6))


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_grid_keeps_order_and_puts_landmarks_last(data: st.DataObject) -> None:
    batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 20))
    seed = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    is_landmark = torch.rand(batch, length, generator=seed) < data.draw(st.sampled_from([0.0, 0.2, 0.7, 1.0]))
    lengths = torch.randint(0, length + 1, (batch,), generator=seed)
    grid = LandmarkGrid.of(is_landmark, lengths)
    assert grid.slots % grid.block == 0
    longest = 1
    for item in range(batch):
        slots = grid.slot[item, : lengths[item]].tolist()
        assert (grid.slot[item, lengths[item] :] == -1).all()
        assert slots == sorted(set(slots))
        assert all(slot < grid.slots for slot in slots)
        marks = is_landmark[item, : lengths[item]].tolist()
        assert [slot % grid.block == grid.block - 1 for slot in slots] == marks
        assert [slot // grid.block for slot in slots] == [sum(marks[:t]) for t in range(len(marks))]
        run = 0
        for mark in marks:
            run = 0 if mark else run + 1
            longest = max(longest, run + 1)
        assert (~grid.holes[item]).nonzero().flatten().tolist() == slots
    assert grid.block == longest or not length


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"block_size": 1}, ValueError, "block_size: expected an int >= 2, got 1"),
        ({"block_size": 2.0}, ValueError, r"block_size: expected an int >= 2, got 2\.0"),
        ({"tokens": torch.ones(2, 5)}, ValueError, r"tokens: expected ids \[B, T\]"),
        ({"tokens": torch.ones(2, 5, 3, dtype=torch.int64)}, ValueError, r"tokens: expected ids \[B, T\]"),
        ({"landmark": torch.ones(3)}, TypeError, "landmark: expected an int"),
        ({"landmark": True}, TypeError, "landmark: expected an int"),
        ({"tokens": torch.ones(2, 5, 3)}, TypeError, "landmark: expected a Tensor"),
        (
            {"tokens": torch.ones(2, 5, 3), "landmark": torch.ones(4)},
            ValueError,
            r"landmark: expected \[3\], got \[4\]",
        ),
        ({"key_padding": torch.zeros(2, 5)}, TypeError, r"key_padding: expected torch\.bool"),
        ({"key_padding": torch.zeros(2, 4, dtype=torch.bool)}, ValueError, r"key_padding: expected \[2, 5\]"),
        ({"labels": torch.zeros(2, 5)}, TypeError, r"labels: expected torch\.int64"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, ValueError, r"labels: expected \[2, 5\]"),
        ({"offset": torch.zeros(3, dtype=torch.int64)}, ValueError, r"offset: expected an int or \[2\]"),
        ({"offset": torch.zeros(2)}, TypeError, r"offset: expected torch\.int64"),
        ({"offset": True}, TypeError, "offset: expected an int, got True"),
        ({"offset": -1}, ValueError, "offset: expected at least 0, got -1"),
        ({"positions": torch.arange(6)}, ValueError, r"positions: expected \[2, 5\], got \[6\]"),
        ({"positions": torch.zeros(3, 5, dtype=torch.int64)}, ValueError, r"positions: expected \[2, 5\]"),
        ({"positions": torch.zeros(5)}, TypeError, r"positions: expected torch\.int64"),
        ({"landmark_label": 1.5}, TypeError, r"landmark_label: expected an int, got 1\.5"),
        ({"tokens": [[1, 2]]}, TypeError, "tokens: expected a Tensor, got list"),
        ({"key_padding": [[True] * 5] * 2}, TypeError, r"key_padding: expected torch\.bool, got list"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change: dict[str, Any], error: Any, match: str) -> None:
    given = {"tokens": torch.ones(2, 5, dtype=torch.int64), "landmark": MARK, "block_size": 3, **change}
    with pytest.raises(error, match=match):
        insert_landmarks(given.pop("tokens"), given.pop("landmark"), **given)
    found = insert_landmarks(torch.ones(2, 5, dtype=torch.int64), MARK, block_size=3)
    with pytest.raises(ValueError, match=r"y: expected \[2, 7, '\.\.\.'\], got \[2, 5\]"):
        found.drop(torch.ones(2, 5))
