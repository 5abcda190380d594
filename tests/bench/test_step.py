"""What a table of decoding steps keeps: each reading as it comes, and of what is wrong the difference and no time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import Tensor

from attnzoo.evaluation.decoding import cache_of
from attnzoo_kernels.errors import ConfigError
from bench.step import __main__ as command
from bench.step import checks, measure, report
from bench.step.decoder import Decoder
from bench.step.kept import Kept
from bench.step.measure import Settings, StepReading
from bench.step.rows import CONTESTANTS, Contestant

WHERE = {"model": "m", "cpu": "c", "code": "abc", "rounds": 2, "date": "2026-01-01"}
MHA = next(row for row in CONTESTANTS if row.name == "mha")


def reading(name: str, tokens: int, **more: Any) -> StepReading:
    of_step = {"ms": 2.0, "dense_ms": 1.0, "ratio": 2.0, "must": None, "cache_bytes": 8, "token_bytes": 4}
    return StepReading(name=name, tokens=tokens, **{**of_step, "error": 1e-7, "bound": 1e-6, **more})


def wrong(name: str, tokens: int) -> StepReading:
    return reading(name, tokens, ms=None, dense_ms=None, ratio=None, error=3e-5, wrong=f"{name}: 3e-05 off")


def test_each_reading_is_on_disk_before_the_next(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "step", WHERE)
    for count, (name, tokens) in enumerate([("s2", 64), ("mha", 128), ("mha", 64)], start=1):
        kept.add(reading(name, tokens))
        assert len(json.loads((tmp_path / "step.json").read_text(encoding="utf-8"))["rows"]) == count
        assert (tmp_path / "step.md").exists()
    # In the order of the table, however they came.
    assert [(one.name, one.tokens) for one in kept.readings] == [("mha", 64), ("mha", 128), ("s2", 64)]
    assert not (tmp_path / "step.png").exists()
    kept.draw()
    assert (tmp_path / "step.png").exists()


def test_a_later_run_goes_on_with_what_is_right(tmp_path: Path) -> None:
    first = Kept(tmp_path / "step", WHERE)
    first.add(reading("mha", 64))
    first.add(wrong("s2", 64))
    again = Kept(tmp_path / "step", {**WHERE, "date": "2026-01-02"})
    assert again.readings == first.readings
    assert again.has("mha", 64)
    assert not again.has("s2", 64)
    assert not again.has("mha", 128)
    again.add(reading("s2", 64))
    assert [one.wrong for one in again.readings] == ["", ""]


@pytest.mark.parametrize("changed", [{"cpu": "another"}, {"code": "def"}, {"rounds": 3}, {"new": 1}])
def test_readings_from_elsewhere_are_neither_mixed_nor_lost(changed: dict[str, Any], tmp_path: Path) -> None:
    Kept(tmp_path / "step", WHERE).add(reading("mha", 64))
    before = (tmp_path / "step.json").read_bytes()
    with pytest.raises(ConfigError, match=f"{next(iter(changed))} .*remove it"):
        Kept(tmp_path / "step", {**WHERE, **changed})
    assert (tmp_path / "step.json").read_bytes() == before


def test_a_file_of_something_else_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "step.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match="a file of this command"):
        Kept(tmp_path / "step", WHERE)


def test_what_is_wrong_has_its_difference_and_no_time(tmp_path: Path) -> None:
    readings = [reading("mha", 64, must=3.0), reading("mha", 128, must=1.0), wrong("s2", 64)]
    assert [one.holds for one in readings] == [True, False, False]
    page = report.markdown(readings, {"model": "m"})
    assert "| mha | 2.00 (<= 3) | 2.00 (<= 1, missed) |" in page
    assert "| s2 | wrong: 3.0e-05 |  |" in page
    assert "Wrong: s2: 3e-05 off" in page
    # A picture of nothing but what is wrong is one of no lines.
    where = {"model": "m", "cpu": "c", "date": "d"}
    report.picture([wrong("s2", 64)], where, tmp_path / "empty.png")


def test_ticks_say_how_many_tokens() -> None:
    readings = [reading("mha", tokens) for tokens in (1024, 4096, 8192, 1000)]
    figure = report.figure(readings, {"model": "m", "cpu": "c", "date": "d"})
    (axes,) = figure.axes
    figure.canvas.draw()
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1,000", "1k", "4k", "8k"]
    assert [label.get_text() for label in axes.get_xticklabels(minor=True)] == []


class Halfway(Decoder):
    """Says something else in steps behind the first length."""

    def step(self) -> Tensor:
        said = super().step()
        return said + (0.01 if self.at == 49 else 0.0)


def test_a_run_goes_on_behind_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "Decoder", Halfway)
    monkeypatch.setattr(checks, "Decoder", Decoder)
    text = torch.randint(64, (1, 2048), generator=torch.Generator().manual_seed(0))
    rows = [MHA, replace(MHA, name="s2")]
    settings = Settings(lengths=(48, 64), rounds=1, whole=False)
    told = run_on(text, rows, settings)
    assert [(one.name, one.tokens, bool(one.wrong), one.ms is None) for one in told] == [
        ("mha", 48, True, True), ("mha", 64, False, False), ("s2", 48, True, True), ("s2", 64, False, False),
    ]  # fmt: skip
    assert "gradients" in told[0].wrong
    assert told[0].error > 100 * told[0].bound
    assert all(one.error <= one.bound for one in told if not one.wrong)
    # What is known is left out.
    (left,) = run_on(text, rows, settings, known=lambda name, tokens: (name, tokens) != ("s2", 64))
    assert (left.name, left.tokens) == ("s2", 64)


def test_steps_agree_with_the_angles_of_the_host_or_with_exact_ones() -> None:
    """Far behind, angles in fp32 are off by more than rounding elsewhere: what has either is right, and no other."""
    torch.manual_seed(0)
    dense = command.tiny_model()
    exact = checks.with_exact_angles(dense)
    text = torch.randint(64, (1, 64), generator=torch.Generator().manual_seed(0))

    class Far(Decoder):
        """Positions begin where angles in fp32 have few digits left."""

        def _call(self, end: int) -> Tensor:
            positions = torch.arange(self.at, end).unsqueeze(0) * 10_007
            with torch.no_grad():
                said = self.model(self.text[:, self.at : end], position_ids=positions, **self.cache, logits_to_keep=1)
            self.cache = cache_of(said)
            self.at = end
            logits: Tensor = said.logits[0, -1]
            return logits

        def slow_step(self) -> Tensor:
            return self.fork().step()

        def fork(self) -> Far:
            other = Far(self.model, self.text, None)
            other.read(self.at)
            return other

    def behind(model: Any) -> Decoder:
        decoder = Far(model, text, None)
        decoder.read(48)
        return decoder

    row = Contestant(name="mha", exact=True)
    for model in (dense, exact):
        references = (behind(dense), behind(exact))
        floor = checks.floor(references[0], checks.in_double(dense))
        assert not checks.check(row, behind(model), references, floor=floor, whole=False).wrong
        alone = [one for one in references if one.model is not model]
        assert "the dense model" in checks.check(row, behind(model), alone, floor=floor, whole=False).wrong


def run_on(text: Tensor, rows: list[Contestant], settings: Settings, **more: Any) -> list[StepReading]:
    return list(measure.run(command.tiny_model(), text, rows, settings, lambda *_: None, **more))


def test_the_exit_code_says_that_something_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(command, "load", lambda quick, longest: (None, None))
    readings = [reading("mha", 48), wrong("s2", 48)]
    monkeypatch.setattr(command, "run", lambda *_, **__: iter(readings))
    given = {"out": tmp_path / "step", "only": ["mha", "s2"], "length": [48], "quick": True}
    with pytest.raises(typer.Exit) as stop:
        command.main(**given)
    assert stop.value.exit_code == 1
    # All is right now, and nothing is left to load or to run.
    Kept(given["out"], json.loads((tmp_path / "step.json").read_text(encoding="utf-8"))["about"]).add(reading("s2", 48))
    monkeypatch.setattr(command, "load", None)
    command.main(**given)
