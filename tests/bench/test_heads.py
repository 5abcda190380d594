"""Experiments on heads: controls are controls, answers are read where they are, and what came out is kept whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from attnzoo import heads
from attnzoo.heads import lofit
from bench.heads import outcome
from bench.heads.experiments.copying import copy_task
from bench.heads.experiments.format_task import batches
from bench.heads.facts import CAPITALS, QUESTIONS, Conflicts, answers, conflicts, last_logits, padded
from bench.heads.outcome import HeadOutcome, HeadResults, HeadRow
from bench.heads.setting import HeadSetting, best, quick_setting, scaled


@pytest.fixture(scope="module")
def setting() -> HeadSetting:
    return quick_setting()


def test_random_heads_are_others(setting: HeadSetting) -> None:
    layers, width = setting.sizes
    kept = [(layer, head) for layer in range(layers) for head in range(width)][: layers * width - 3]
    found = setting.others(3, 0, kept)
    assert found == setting.others(3, 0, kept)
    assert not set(found) & set(kept)
    assert setting.others(3, 0) != setting.others(3, 1)


def test_the_best_of_a_table_come_first() -> None:
    table = torch.tensor([[0.0, 3.0], [-2.0, 1.0]])
    assert best(table, 2) == [(0, 1), (1, 1)]
    assert best(table, 2, largest=False) == [(1, 0), (0, 0)]


def test_what_is_said_behind_padded_rows_is_what_is_said_behind_each(setting: HeadSetting) -> None:
    rows = [setting.text[:9], setting.text[20:34]]
    together = last_logits(setting.model, *padded(rows))
    for row, said in zip(rows, together, strict=True):
        with torch.no_grad():
            alone = setting.model(row.unsqueeze(0)).logits[0, -1]
        torch.testing.assert_close(said, alone, rtol=1e-4, atol=1e-5)


def test_a_conflict_names_another_countrys_capital(setting: HeadSetting) -> None:
    countries = list(CAPITALS)[:10]
    items = conflicts(setting.encode, countries, shift=3)
    assert (items.known != items.told).all()
    first = bytes(items.ids[0][: int(items.last[0]) + 1].tolist()).decode()
    assert first.startswith("The capital of France is Madrid.")
    assert first.endswith(QUESTIONS.format(country="France"))
    assert len(items.half(0).ids) + len(items.half(1).ids) == len(items.ids)
    said = last_logits(setting.model, items.ids, items.mask)
    sure = Conflicts(items.ids, items.mask, said.argmin(-1), said.argmax(-1))
    found = answers(setting.model, sure)
    assert (found.prefers, found.told, found.known) == (1.0, 1.0, 0.0)
    with heads.edited(setting.model, scaled([(0, 0)], 1.0)):
        assert answers(setting.model, sure) == found


def test_answers_alone_are_learned(setting: HeadSetting) -> None:
    learned, kept = batches(setting)
    assert learned
    assert kept
    batch = learned[0]
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        scored = labels != lofit.IGNORED
        assert torch.equal(ids[scored], labels[scored])
        assert not scored[mask == 0].any()
        text = bytes(ids[scored].tolist()).decode()
        assert text[:2] == " ["
        assert text.endswith("]")
    assert not {str(one["input_ids"].tolist()) for one in learned} & {str(one["input_ids"].tolist()) for one in kept}


def test_another_order_has_another_answer(setting: HeadSetting) -> None:
    clean, corrupt, right, wrong = copy_task(setting, length=12)
    assert (right != wrong).all()
    for text, other, answer, instead in zip(clean, corrupt, right, wrong, strict=True):
        cue = text[-1]
        assert text[int((text[:12] == cue).nonzero()) + 1] == answer
        assert other[int((other[:12] == cue).nonzero()) + 1] == instead
        assert text[:12].sort().values.equal(other[:12].sort().values)
        assert torch.equal(text[12:], other[12:])


def test_outcomes_are_read_as_they_were_written(tmp_path: Path) -> None:
    rows = [HeadRow("as it is", {"loss": 1.0}), HeadRow("without", {"loss": 2.0, "text": 3.0}, control=True)]
    claims = [outcome.at_least("a", 1.0, 1.0), outcome.at_most("b", 2.0, 1.0), outcome.above("c", 1.0, 1.0)]
    assert [claim.met for claim in claims] == [True, False, False]
    found = HeadOutcome("t", "s", "x", "loss", rows, claims, {"few": [(0, 1)]}, {"map": [[0.0, 1.0]]}, 2.0)
    assert found.columns == ["loss", "text"]
    results = HeadResults({"model": "m"}, {"one": found})
    path = tmp_path / "heads.json"
    path.write_text(results.to_json(), encoding="utf-8")
    assert outcome.read(path) == results
    assert json.loads(results.to_json())["outcomes"]["one"]["claims"][0]["met"] is True
