"""From which length a layer is quicker: how curves are read, when they end, and that none is drawn of a wrong layer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer

from attnzoo.evaluation import layer_costs
from attnzoo.evaluation.cost_setting import KINDS, Cost, CostSetting
from bench.crossover import __main__ as command
from bench.crossover import curves as measuring
from bench.crossover import picture, report
from bench.crossover.curves import Curve, crossing, measure

SMALL = CostSetting(tokens=32, dim=16, num_heads=2, seconds=0.0)
CROSSINGS = [
    # On a line between the two lengths, in logarithms: 2 -> 0.9, 0.97 lies at 0.906 of the way.
    ([512, 1024, 2048], [2.0, 0.9, 0.5], "about 960"),
    ([512, 1024, 2048, 4096], [3.0, 2.0, 0.97 / 2 * 0.97, 0.1], "about 1,400"),
    ([512, 1024], [0.9, 0.8], "512 or less"),
    ([512, 1024], [2.0, 1.5], "never up to 1,024"),
    # What is as quick but for noise is not quicker, and only the last crossing counts.
    ([512, 1024], [1.1, 0.98], "never up to 1,024"),
    ([512, 1024, 2048], [0.5, 1.94, 0.485], "about 1,400"),
    ([512], [0.5], "512 or less"),
    ([], [], "not measured"),
]


def quiet(*_: object) -> None:
    pass


@pytest.mark.parametrize(("tokens", "ratios", "words"), CROSSINGS)
def test_from_which_length_on_a_layer_is_quicker(tokens: list[int], ratios: list[float], words: str) -> None:
    curve = Curve("mha", "forward", tokens=tokens, times_baseline=ratios)
    assert curve.quicker_from == words
    if tokens:
        assert crossing(tokens, ratios) == words


@pytest.fixture(autouse=True)
def _short_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "CHECKED", 24)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Times as a clock of our own says: a layer takes a second for each thousand tokens, the baseline half of it."""
    asked: list[tuple[str, int]] = []

    def compete(kind: str, layer: Any, baseline: Any, setting: CostSetting, **_: Any) -> dict[str, list[float]]:
        asked.append((kind, setting.tokens))
        return {"this": [setting.tokens / 1.0] * 3, "baseline": [setting.tokens / 2.0] * 3}

    monkeypatch.setattr(measuring, "compete", compete)
    return asked


def test_a_curve_ends_before_a_length_that_takes_too_long(made_up: list[tuple[str, int]]) -> None:
    # A pair of 1,000 tokens takes 1.5 s: at 2,000 four times as long at most, four rounds of it, 24 s.
    for limit, ends in ((23.9, {"forward": 1000, "step": 1000, "decode": 2000}), (24.0, dict.fromkeys(KINDS, 2000))):
        made_up.clear()
        (found,) = measure(replace(SMALL, tokens=2000), ["mha"], (1000, 2000), limit, quiet)
        assert {curve.kind: curve.tokens[-1] for curve in found} == ends
        assert [(curve.kind, tokens) for curve in found for tokens in curve.tokens] == made_up
        assert all(curve.times_baseline[-1] == 2.0 and curve.tokens[0] == 1000 for curve in found)
    (found,) = measure(SMALL, ["mha"], (16, 32), 0.0, quiet)
    assert [curve.tokens for curve in found] == [[16]] * 3


def test_layers_are_checked_and_measured_in_turns_with_ten_lines_of_torch() -> None:
    found = list(measure(SMALL, ["mha:window=5", "longheads:chunk_size=4,attention_length=16"], (16, 32), 1e9, quiet))
    for curves in found:
        assert [curve.kind for curve in curves] == list(KINDS)
        for curve in curves:
            assert (curve.problem, curve.tokens) == (None, [16, 32])
            assert min(*curve.times_baseline, *curve.milliseconds) > 0
    assert [curves[0].layer for curves in found] == ["mha:window=5", "longheads:chunk_size=4,attention_length=16"]


@pytest.mark.parametrize("who", ["check", "check_baseline"])
def test_no_curve_is_measured_where_a_layer_or_the_baseline_is_wrong(who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, who, lambda *_: Cost("x", problem="wrong"))
    monkeypatch.setattr(measuring, "compete", None)
    (found,) = measure(SMALL, ["mha"], (16,), 1e9, quiet)
    assert [(curve.problem, curve.tokens) for curve in found] == [("wrong", [])] * 3


WHERE = {
    "cpu": "A processor", "class": "avx2", "threads": 1, "torch": "2.13", "date": "today", "dim": 512, "num_heads": 8,
    "dtype": "float32",
}  # fmt: skip


def drawn() -> list[Curve]:
    """All default layers, made up: the last one is wrong."""
    found = []
    for i, spec in enumerate(layer_costs.SPECS):
        for kind in KINDS:
            found.append(Curve(spec, kind, None, [512, 1024], [2.0 + i, 0.5], [1.0, 2.0]))
    last = [Curve("broken", kind, "wrong") for kind in KINDS]
    return [*found, *last]


def test_tables_say_what_the_curves_say_and_json_carries_them() -> None:
    found = drawn()
    assert report.read(report.to_json(found, WHERE)) == (found, WHERE)
    lines = report.summary(found)
    assert lines[0] == "| layer | forward | training step | decoding step |"
    assert lines[2] == "| `mha` | about 740 | about 740 | about 740 |"
    assert lines[-1] == "| `broken` | not measured | not measured | not measured |"
    assert report.of_variant(found, "mha")[:6] == [
        "`mha`:", "",
        "| tokens | 512 | 1,024 | quicker from |", "| --- | --- | --- | --- |",
        "| forward | 2.00 | 0.50 | about 740 |", "| training step | 2.00 | 0.50 | about 740 |",
    ]  # fmt: skip
    assert "`mha:window=512,sink=4`:" in report.of_variant(found, "mha")
    assert "- broken, forward: wrong" in report.markdown(found, WHERE)


def test_the_picture_tells_its_lines_apart(tmp_path: Path) -> None:
    for axes in picture.draw(drawn(), "title").axes:
        lines = [line for line in axes.lines if not str(line.get_label()).startswith("_")]
        assert [line.get_label() for line in lines] == list(layer_costs.SPECS)
        assert len({(line.get_marker(), line.get_linestyle()) for line in lines}) == len(lines)
        # Named at their ends, options where two layers are of one variant.
        assert [text.get_text() for text in axes.texts][:3] == ["mha", "mha:window=512", "s2"]
    picture.picture(drawn(), "title", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_what_was_measured_of_other_layers_is_kept_on_the_same_machine_alone(tmp_path: Path) -> None:
    where = {**WHERE, "batch": 1}
    report.write(drawn(), where, tmp_path / "a.b")
    found = command.kept(tmp_path / "a.b", {**where, "date": "tomorrow"}, ["mha", "new"])
    assert found == [curve for curve in drawn() if curve.layer != "mha"]
    added = [Curve(name, "forward") for name in ("new", "mha")]
    assert [curve.layer for curve in command.in_order([*added, *found])][:2] == ["mha", layer_costs.SPECS[1]]
    assert command.in_order([*added, *found])[-1].layer == "broken"
    with pytest.raises(typer.BadParameter, match="expected threads 1"):
        command.kept(tmp_path / "a.b", {**where, "threads": 2}, ["mha"])
