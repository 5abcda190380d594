"""What ``bench.trained`` is made of: the text, the training, controls, certificates that stop figures, and results."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from attnzoo import surgery
from attnzoo_kernels.errors import ConfigError
from bench.trained import measure, report
from bench.trained.conversions import BLOCK, KINDS, at_random, conversions
from bench.trained.healing import Healing, average_chosen
from bench.trained.hosts import HOSTS, MHA, ModelSizes, build
from bench.trained.measure import HostTable
from bench.trained.results import (
    CERTIFICATE,
    CONTROL,
    CONVERSION,
    ORIGINAL,
    TrainedResults,
    TrainedRow,
    from_json,
    to_json,
)
from bench.trained.run import setting_for
from bench.trained.texts import HELD_OUT, STRETCH, texts
from bench.trained.training import Schedule, next_token_nll, train

TEXTS = texts()
SIZES = ModelSizes(width=32, heads=4, layers=1, context=64)


@pytest.fixture(scope="module")
def table() -> HostTable:
    model = build(HOSTS["GPT-NeoX-like"], replace(SIZES, heads=8), 0).eval()
    return HostTable("GPT-NeoX-like", model, TEXTS, context=64, any_length=False, most=2)


@pytest.fixture(scope="module")
def rows(table: HostTable) -> list[TrainedRow]:
    return list(table.rows(lambda what, done, total: None))


def test_windows_of_any_length_are_of_one_text_that_no_training_sees() -> None:
    assert torch.equal(TEXTS.windows(64).flatten(), TEXTS.windows(STRETCH).flatten())
    assert TEXTS.windows(64, 3).shape == (3, 64)
    whole = torch.cat([TEXTS.training, TEXTS.held_out])
    assert len(TEXTS.held_out) == 2 * HELD_OUT
    assert len(whole) > 90_000
    training = bytes(TEXTS.training.tolist())
    assert not any(bytes(window.tolist()) in training for window in TEXTS.windows(64))


def test_batches_are_of_a_seed() -> None:
    first, same, other = (next(TEXTS.batches(32, 2, seed)) for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_a_schedule_ends_with_time_or_with_steps() -> None:
    schedule = Schedule(seconds=10, steps=4)
    assert schedule.done(5, 1) == 0.5
    assert schedule.done(1, 4) == 1
    assert schedule.rate_at(0.05) == schedule.rate
    assert schedule.rate_at(1) == pytest.approx(0)
    assert 0 < schedule.rate_at(0) < schedule.rate
    for wrong in ({}, {"seconds": 0}, {"steps": -1}):
        with pytest.raises(ConfigError, match=r"seconds|steps"):
            Schedule(**wrong)


def test_training_of_so_many_steps_is_the_same_every_time() -> None:
    schedule = Schedule(steps=3, length=32, batch=2)
    models = [build(MHA, SIZES, 0) for _ in range(2)]
    window = TEXTS.windows(64, 1)
    with torch.no_grad():
        before = float(next_token_nll(models[0], window))
    seen: list[int] = []
    found = [train(model, TEXTS, schedule, after=seen.append) for model in models]
    assert [one.steps for one in found] == [3, 3]
    assert seen == [1, 2, 3, 1, 2, 3]
    with torch.no_grad():
        after = [float(next_token_nll(model, window)) for model in models]
    assert after[0] == after[1] < before


@pytest.mark.parametrize("name", [*HOSTS, "MHA"])
def test_every_model_is_of_a_family_that_is_known(name: str) -> None:
    spec = MHA if name == "MHA" else HOSTS[name]
    sites = surgery.find(build(spec, replace(SIZES, layers=2), 0))
    assert [site.heads for site in sites] == [4, 4]
    assert [site.kv_heads for site in sites] == [4 // (spec.kv_share or 1)] * 2
    assert [site.window for site in sites] == ([None, None] if spec.windows is None else [8, None])


def test_a_control_reads_itself_the_first_and_as_many_as_it_should() -> None:
    (window,) = [one for one in conversions(_site(), 64) if one.name == "window 8, sink 1"]
    assert window.reads is not None
    mask = at_random(window.reads, 4, 40, seed=0)
    assert mask.shape == (1, 4, 40, 40)
    assert not mask.triu(1).any()
    assert mask[..., 0].all()
    assert mask.diagonal(dim1=-2, dim2=-1).all()
    assert mask.sum(-1).tolist() == [[[min(place + 1, 9) for place in range(40)]] * 4]
    assert not torch.equal(mask[0, 0], mask[0, 1])


def test_a_control_of_shards_reads_what_the_heads_read_on_average() -> None:
    (shards,) = [one for one in conversions(_site(), 256) if one.kind == "s2" and one.reads is not None]
    model = build(MHA, replace(SIZES, context=256), 0).eval()
    table = HostTable("MHA", model, TEXTS, context=256, any_length=False, most=1)
    (mine, control) = list(table._converted(shards))
    assert mine.density == pytest.approx(control.density, rel=0.02)
    assert shards.options["block_size"] == BLOCK


def _site() -> surgery.Site:
    return surgery.Site(path="x", host="llama", layer=0, heads=4, kv_heads=4, head_dim=8, width=32)


def test_all_kinds_have_a_certificate_and_controls(rows: list[TrainedRow]) -> None:
    assert {row.kind for row in rows if row.role == CERTIFICATE} == set(KINDS)
    assert all(row.holds and row.undone for row in rows if row.role == CERTIFICATE)
    measured = [row for row in rows if row.role == CONVERSION and row.problem is None]
    assert {row.kind for row in measured} >= {"window", "s2", "latent", "moh"}
    for place, row in enumerate(rows):
        if row in measured:
            assert rows[place + 1].role == CONTROL
            assert rows[place + 1].kind == row.kind
            assert row.undone
    # Chunks of 16 are too long for a text of 64, and that is said.
    assert all(row.problem for row in rows if row.kind == "longheads" and row.role == CONVERSION)


def test_a_latent_beside_averaged_heads_remembers_as_much(rows: list[TrainedRow]) -> None:
    pairs = [
        (row, rows[place + 1]) for place, row in enumerate(rows) if row.kind == "latent" and row.role == CONVERSION
    ]
    assert [(a.values, b.values) for a, b in pairs] == [(32, 32), (16, 16)]


def test_figures_stop_where_a_certificate_fails(table: HostTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "BOUND", -1.0)
    kept = [one for one in conversions(table.sites[0], 64) if one.kind == "window"]
    monkeypatch.setattr(measure, "conversions", lambda site, context: kept)
    found = list(table.rows(lambda what, done, total: None))
    assert [row.role for row in found] == [ORIGINAL, CERTIFICATE, CONVERSION, CONVERSION]
    assert not found[1].holds
    assert all(row.nll is None and "is not the model itself" in str(row.problem) for row in found[2:])
    results = TrainedResults({}, {table.host: TOLD}, {table.host: found})
    assert not results.holds
    assert "FAILS" in report.markdown(results)


TOLD: dict[str, Any] = {"says": "", "parameters": 1, "steps": 1, "seconds": 1.0, "nll": 1.0}


def test_conversions_are_trained_further_from_one_model_in_one_order() -> None:
    model = build(MHA, SIZES, 0).eval()
    before = deepcopy(model.state_dict())
    healing = Healing(0, model, TEXTS, setting_for(1, quick=True).healing, 2)
    known = {name for name in healing.ways if name not in (ORIGINAL, "4 to 1: mean", "4 to 1: mean, groups chosen")}
    found = {row.name: row for row in healing.rows(known, progress=lambda what, done, total: None)}
    assert set(found) == set(healing.ways) - known
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    # In one group there is nothing to choose.
    assert found["4 to 1: mean"].nll == found["4 to 1: mean, groups chosen"].nll
    assert found["4 to 1: mean"].values == found[ORIGINAL].values // 4
    average_chosen(model, healing.known, 2)
    assert surgery.find(model)[0].kv_heads == 2


def test_results_are_read_back_and_joined(rows: list[TrainedRow]) -> None:
    mine = TrainedResults({"cpu": "one"}, {"GPT-NeoX-like": TOLD}, {"GPT-NeoX-like": rows})
    again = from_json(to_json(mine))
    assert to_json(again) == to_json(mine)
    other = TrainedResults({"cpu": "other"}, {"Qwen3-like": TOLD}, {"Qwen3-like": [], "GPT-NeoX-like": []})
    other.take(mine)
    assert other.about == {"cpu": "other"}
    assert set(other.trainings) == {"Qwen3-like", "GPT-NeoX-like"}
    assert other.rows["GPT-NeoX-like"] == []
    mine.drop(["GPT-NeoX-like"], [0])
    assert mine.rows == {}


def test_tables_say_what_the_rows_say(rows: list[TrainedRow], tmp_path: Path) -> None:
    results = TrainedResults({"cpu": "one"}, {"GPT-NeoX-like": TOLD}, {"GPT-NeoX-like": rows})
    report.write(results, tmp_path / "trained")
    text = (tmp_path / "trained.md").read_text(encoding="utf-8")
    (original,) = [row.nll for row in rows if row.role == ORIGINAL]
    assert original is not None
    assert f"| original | all | {math.exp(original):,.0f} | 1.000 |" in text
    assert "window 8, sink 1: at random" in text
    assert "attention_length: expected at least 4 whole chunks of 16, got 32" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trained.json", "trained.md", "trained.png"]
    (shown,) = [line for line in report.summary(results) if line.startswith("| window 8, sink 1 |")]
    (mine, control) = [row.nll for row in rows if row.name.startswith("window 8")]
    assert f"{report.perplexity(mine)} ({report.perplexity(control)})" in shown
