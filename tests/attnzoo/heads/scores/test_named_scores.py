"""Scores by their names: each is what it says, against plain loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnzoo import heads
from attnzoo.heads.scores import attention_rows
from attnzoo.heads.scores.repeated import reordered, repeated_tokens
from tests.attnzoo.heads.scores.plain_scores import eager_attention, plain_previous_and_duplicate
from tests.attnzoo.surgery.tiny import tiny

SMALL: dict[str, Any] = {"length": 7, "repeats": 3}


def test_orders_differ_and_slots_lead_to_the_same_tokens() -> None:
    ids = repeated_tokens(tiny(), batch=2, seed=3, **SMALL)
    found, places = reordered(ids, 7, seed=4)
    assert places.shape == (2, 7, 2)
    for row, slots in zip(found, places, strict=True):
        for place in range(7):
            assert set(row[slots[place]].tolist()) == {int(row[14 + place])}
        assert not torch.equal(row[:7], row[7:14])
        assert not torch.equal(row[7:14], row[14:])
    assert torch.equal(found.sort(1).values, ids.sort(1).values)


@pytest.mark.parametrize("kind", ["previous", "duplicate"])
def test_scores_are_those_of_plain_loops(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Several chunks of rows, of which the last is shorter.
    monkeypatch.setattr(attention_rows, "CHUNK_VALUES", 2 * 6 * 21 * 4)
    model = tiny()
    ids = repeated_tokens(model, batch=2, seed=3, **SMALL)
    if kind == "duplicate":
        ids, _ = reordered(ids, 7, seed=4)
    expected = [plain_previous_and_duplicate(weights, ids, 7)[kind] for weights in eager_attention(model, ids)]
    found = getattr(heads.scores, kind)(model, 7, 3, 3, batch=2)
    torch.testing.assert_close(found[kind].double(), torch.stack(expected), atol=1e-6, rtol=0)
    assert found.kinds == (kind,)


@pytest.mark.parametrize("kind", ["echo", "induction", "previous", "duplicate"])
def test_a_score_by_its_name_is_the_method_of_that_name(kind: str) -> None:
    model = tiny()
    named = getattr(heads.scores, kind)(model, **SMALL)
    assert torch.equal(named[kind], heads.score_heads(model, kind, **SMALL)[kind])
