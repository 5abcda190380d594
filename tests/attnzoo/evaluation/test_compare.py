"""Rows of a comparison: what is flagged, whose figures they are, and that the model is left as it was."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from attnzoo import surgery
from attnzoo.evaluation import compare
from attnzoo.evaluation.compare import Comparer, ConversionSpec, VariantSpec
from attnzoo.evaluation.compare_report import cells, markdown, read, to_json
from attnzoo.evaluation.decoding import STEPS, Continuation, Decoding
from attnzoo.evaluation.model_scores import Score
from tests.attnzoo.surgery.tiny import assert_untouched, calibration, ids, snapshot, tiny

PROBE = torch.arange(1.0, 13.0).view(3, 4)
MHA = (ConversionSpec("mha", {}),)


def figures(spec: VariantSpec, probe: Tensor, *, density: float = 1.0, nll: float = 2.0) -> compare.Row:
    """A row of made-up scores beside a dense model of NLL 1.5."""
    comparer = Comparer(None, ids(1, 8), None)
    sequence = Continuation(None)
    comparer._dense = Score((1.5, 1.5), 1.0, PROBE, sequence)
    decodings = [Decoding(8, 7.0, 1.43, 0.25), Decoding(32, 5.0, 0.51, 0.125)]
    return comparer._figures(spec, Score((nll, nll), density, probe, sequence), decodings, 1.26)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surgery, "cache_bytes", lambda model: 4096)
    monkeypatch.setattr(compare, "policy_on", lambda model: None)


NEAR, FAR = PROBE * (1 + 5e-6), PROBE + 1e-3
FLAGS = [
    (VariantSpec("a", MHA), NEAR, 1.0, ["NO-OP"]),
    # Weights may change where all pairs are read, and pairs may be left out that change no logit.
    (VariantSpec("a", MHA), FAR, 1.0, []),
    (VariantSpec("a", MHA), NEAR, 0.9, []),
    (VariantSpec("a", MHA, exact=True), NEAR, 1.0, ["certificate holds"]),
    (VariantSpec("a", MHA, exact=True), FAR, 1.0, ["CERTIFICATE FAILS"]),
    (VariantSpec("a", MHA, exact=True), NEAR, 0.9, ["certificate holds"]),
    (VariantSpec("a", MHA, control=True), FAR, 0.9, ["negative control"]),
    (VariantSpec("dense"), PROBE, 1.0, []),
]


@pytest.mark.usefixtures("made_up")
@pytest.mark.parametrize(("spec", "probe", "density", "flags"), FLAGS)
def test_flags_say_what_density_and_logits_say_together(
    spec: VariantSpec, probe: Tensor, density: float, flags: list[str]
) -> None:
    assert figures(spec, probe, density=density).flags == flags


@pytest.mark.usefixtures("made_up")
def test_figures_are_those_of_the_row_beside_the_dense_model() -> None:
    row = figures(VariantSpec("a", MHA), FAR, density=0.5)
    assert row.perplexity == pytest.approx(math.exp(2.0))
    assert row.ratio == pytest.approx(math.exp(0.5))
    assert row.delta_nll == pytest.approx(0.5)
    assert (row.kv_bytes_held, row.kv_bytes_read) == (4096, 1024)
    assert row.max_logit_diff == pytest.approx(1e-3, rel=1e-3)
    assert (row.decode_tokens_per_s, row.decode_times_dense, row.convert_seconds) == (7.0, 1.43, 1.3)
    assert row.longer == [compare.LongDecoding(32, 5.0, 0.51, 512)]
    assert cells(row) == ["a", "7.39", "1.649", "+0.5000", "0.500", "4,096", "1,024", "7.0", "1.43", ""]
    comparison = compare.Comparison({"windows": [2, 8]}, [row])
    lines = markdown(comparison).splitlines()
    assert lines[4] == "| " + " | ".join(cells(row)) + " |"
    assert lines[6] == "Decoding behind 32 tokens:"
    assert lines[10] == "| a | 4,096 | 512 | 5.0 | 0.51 |"
    assert read(to_json(comparison)) == comparison


def test_each_row_decodes_beside_a_dense_model_that_has_read_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(dtype=torch.float32)
    text = ids(1, 120)[0]
    seen: list[tuple[int, int, bool, bool]] = []
    expected = [Continuation(model) for _ in range(2)]
    for sequence, length in zip(expected, (48, 90), strict=True):
        sequence.read(text[:length])

    def race(mine: Continuation, dense: Continuation) -> Decoding:
        assert dense.model is not model
        right = torch.equal(dense._next, expected[dense.tokens == 90]._next)
        seen.append((mine.tokens, dense.tokens, right, mine.model is model))
        for sequence in (mine, dense):
            for _ in range(STEPS):
                sequence.step()
        return Decoding(mine.tokens, 1.0, 1.0, 1.0)

    monkeypatch.setattr(compare, "race", race)
    specs = [VariantSpec("dense"), VariantSpec("in place", own_cache=True), VariantSpec.parse("mha:window=9,sink=2")]
    Comparer(model, text[:48].unsqueeze(0), None, longer=[text[:90]]).run(specs, {})
    assert seen == [(length, length, True, row > 0) for row in range(3) for length in (48, 90)]


def test_rows_are_of_the_converted_model_which_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(dtype=torch.float32)
    before, collected, used = snapshot(model), list[Any](), list[Any]()
    real_collect, real_convert = surgery.collect, surgery.convert

    def collect(*arguments: Any, **options: Any) -> Any:
        collected.append(real_collect(*arguments, **options))
        return collected[-1]

    def convert(model: Any, variant: str, *, calibration: Any = None, **options: Any) -> Any:
        used.append(calibration)
        return real_convert(model, variant, calibration=calibration, **options)

    monkeypatch.setattr(surgery, "collect", collect)
    monkeypatch.setattr(surgery, "convert", convert)
    merged = ConversionSpec("lowrank_gqa", {"method": "commuting", "num_kv_heads": 1, "refit": False})
    specs = [
        VariantSpec("dense"),
        VariantSpec("in place", own_cache=True),
        VariantSpec("window", (ConversionSpec("mha", {"window": 9, "sink": 2}),), long=False),
        VariantSpec("mean", (ConversionSpec("lowrank_gqa", {"method": "mean", "num_kv_heads": 1}),)),
        VariantSpec("expand", (ConversionSpec("lowrank_gqa", {"method": "expand", "num_kv_heads": 6}),)),
        VariantSpec("merged", (merged,)),
        VariantSpec("twice", (ConversionSpec("lowrank_gqa", {"method": "expand", "num_kv_heads": 6}), merged)),
    ]
    with warnings.catch_warnings():
        # A comparison shows what is lost; it must not warn of it too.
        warnings.simplefilter("error")
        windows, longer = ids(1, 48), [ids(1, 90)[0], ids(1, 120)[0]]
        found = Comparer(model, windows, torch.cat(calibration()), longer=longer).run(specs, {})
    assert_untouched(model, before)
    rows = {row.name: row for row in found.rows}
    assert [row.name for row in found.rows] == [spec.name for spec in specs]
    held = {name: row.kv_bytes_held for name, row in rows.items()}
    dense = 2 * 64 * 4
    assert held == {
        "dense": dense, "in place": dense, "window": dense, "mean": dense / 2,
        "expand": 3 * dense, "merged": dense / 2, "twice": dense / 2,
    }  # fmt: skip
    assert rows["dense"].flags == rows["mean"].flags == rows["window"].flags == []
    assert rows["expand"].flags == ["NO-OP"]
    assert rows["dense"].ratio == 1.0 and rows["window"].density < 1 == rows["mean"].density
    for row in found.rows:
        assert row.decode_times_dense is not None and row.decode_times_dense > 0
        assert [one.tokens for one in row.longer] == ([] if row.name == "window" else [90, 120])
    # Collected once, of the model as it was; what was converted before is calibrated anew.
    assert len(collected) == 1
    assert used[3] is collected[0]
    assert isinstance(used[-1], list)
