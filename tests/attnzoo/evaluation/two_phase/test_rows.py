"""Rows of policies beside the dense model, and the model as it was behind them; tables, files and the picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from attnzoo import policies
from attnzoo.evaluation.two_phase import report
from attnzoo.evaluation.two_phase.picture import families
from attnzoo.evaluation.two_phase.readers import PolicyReader, bytes_read
from attnzoo.evaluation.two_phase.rows import CONTROL, HOLDS_ALL, PolicyComparer, PolicyComparison, PolicyRow
from attnzoo.evaluation.two_phase.scores import DenseReader, prefill_nll, score_case
from attnzoo.evaluation.two_phase.specs import PolicySpec, fit
from attnzoo.evaluation.two_phase.tasks import Case, Probe, text_case
from attnzoo.policies import LayerHeld
from tests.attnzoo.surgery.tiny import assert_untouched, ids, snapshot, tiny

TEXT = ids(1, 160)[0]
HALF = "duo:keep=0.5,sink=8,window=16,block=8,heads=random"
ALL = "duo:keep=1.0,sink=8,window=16,block=8,heads=random"


def cases() -> list[Case]:
    text = text_case("some", TEXT, context=96, encode=lambda text: TEXT[:0], continuation=16, spans=1, span=16)
    key = Case("key", TEXT[:48], (Probe("key", TEXT[100:108], torch.arange(4, 8)),))
    return [text, key]


@pytest.fixture(scope="module")
def comparison() -> PolicyComparison:
    model = tiny()
    before = snapshot(model)
    specs = [
        PolicySpec.parse(HALF, "half"),
        PolicySpec.parse(ALL, "all"),
        PolicySpec.parse("streaming:sink=8,window=16,block=8", "none", control=True),
    ]
    told: list[str] = []
    comparer = PolicyComparer(model, cases(), progress=lambda what, done, total: told.append(what))
    found = comparer.run(fit(model, specs), {"model": "tiny"})
    assert_untouched(model, before)
    assert told == [f"{row}: {case}" for row in ("dense", "half", "all", "none") for case in ("some", "key")]
    return found


def test_a_policy_that_holds_everything_says_what_the_dense_model_says(comparison: PolicyComparison) -> None:
    dense, half, everything, none = comparison.rows
    for kind in ("text", "recall", "key"):
        assert everything.figure(kind) == pytest.approx(dense.figure(kind), rel=1e-6)
        assert abs(comparison.above(half, kind) or 0) > 1e-4
        assert abs(comparison.above(none, kind) or 0) > 1e-4
    assert [row.flags for row in comparison.rows] == [[], [], [HOLDS_ALL], [CONTROL]]
    assert [row.keys_asked for row in comparison.rows] == [1] * 4


def test_bytes_are_the_buffers_of_the_longest_context(comparison: PolicyComparison) -> None:
    dense, half, everything, none = comparison.rows
    assert dense.bytes_per_token == 2 * 2 * 2 * 16 * 8
    assert everything.held_share == 1
    # A sink block, and of the near ones those that a next row can read: 8 + 16 tokens of 96.
    assert none.held_share == pytest.approx(24 / 96)
    assert half.held_share == pytest.approx((1 + 24 / 96) / 2)
    assert half.read_share == half.held_share
    assert all(row.room_share >= row.held_share for row in comparison.rows)


def test_what_a_static_policy_says_does_not_depend_on_how_it_is_read() -> None:
    model = tiny()
    policy = policies.Streaming(sink=8, window=16, block=8)
    text = TEXT[:97]
    probe = Case("last", text[:96], (Probe("text", text[95:97], torch.tensor([1])),))
    with policies.applied(model, policy) as run:
        reader = PolicyReader(run)
        whole = prefill_nll(reader, text) * 96
        parts = prefill_nll(reader, text[:96]) * 95
    last = Case("last", text[:95], probe.probes)
    with policies.applied(model, policy) as run:
        found = score_case(PolicyReader(run), last)
    assert found.nll["text"][0] == pytest.approx(whole - parts, rel=1e-5)
    assert prefill_nll(DenseReader(model), text) * 96 != pytest.approx(whole, rel=1e-4)


def test_bytes_read_are_those_of_the_pages_that_are_chosen() -> None:
    # Two KV heads of 100 tokens, rows of 10 bytes, and 160 bytes of bounds beside them.
    held = LayerHeld(layer=0, tokens=100, rows=200, dense_rows=200, held_bytes=2160, dense_bytes=2000, pool_bytes=3000)
    assert bytes_read(policies.Pages(page=10, budget=40), held) == 960
    assert bytes_read(policies.Pages(page=10, budget=1000), held) == 2160


def test_tables_and_files_say_what_the_rows_say(comparison: PolicyComparison, tmp_path: Path) -> None:
    report.write(comparison, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.md", "out.png"]
    assert report.read((tmp_path / "out.json").read_text(encoding="utf-8")) == comparison
    lines = (tmp_path / "out.md").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "tiny behind 48 and 96 tokens of some, key"
    assert lines[4].startswith(f"| dense | 1.000 | 1.000 | 1,024 | {comparison.dense.text:.3f} |")
    above = comparison.above(comparison.rows[1], "recall")
    assert f"| {above:+.3f} |" in lines[5]
    grid = report.grid(comparison)
    assert grid.bad == {2}
    assert all(len(row) == len(grid.heads) for row in grid.rows)


def made_up(name: str, held: float, read: float = 1.0, **more: Any) -> PolicyRow:
    return PolicyRow(name, "x", {}, 1.0, 1.0, 1.0, 0, 0, held, 1.0, held, min(held, read), **more)


def test_rows_of_one_policy_are_one_line_and_a_control_is_its_own() -> None:
    rows = [
        made_up("dense", 1.0),
        made_up("duo: 40 %", 0.4),
        made_up("duo, random heads: 40 %", 0.4, flags=[CONTROL]),
        made_up("duo: 10 %", 0.1),
        made_up("pages: 20 %", 1.0, 0.2),
        made_up("snapkv:share=0.4,window=8", 0.4),
        made_up("duo:keep=0.5", 0.6),
    ]
    found = families(PolicyComparison({}, rows))
    assert {name: [row.name for row in own] for name, own in found.items()} == {
        "duo": ["duo: 10 %", "duo: 40 %", "duo:keep=0.5"],
        "duo, random heads": ["duo, random heads: 40 %"],
        "pages": ["pages: 20 %"],
        "snapkv": ["snapkv:share=0.4,window=8"],
    }
