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
from attnzoo.evaluation.compare_report import cells, markdown
from attnzoo.evaluation.model_scores import Decoding, Score
from tests.attnzoo.surgery.tiny import assert_untouched, calibration, ids, snapshot, tiny

PROBE = torch.arange(1.0, 13.0).view(3, 4)
MHA = (ConversionSpec("mha", {}),)


def figures(spec: VariantSpec, probe: Tensor, *, density: float = 1.0, nll: float = 2.0) -> compare.Row:
    """A row of made-up scores beside a dense model of NLL 1.5."""
    comparer = Comparer(None, ids(1, 8), None)
    comparer._dense = (Score((1.5, 1.5), 1.0, PROBE), Decoding(10.0, 1.0))
    return comparer._figures(spec, Score((nll, nll), density, probe), Decoding(7.0, 0.25), 1.26)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surgery, "cache_bytes", lambda model: 4096)


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
    assert (row.decode_tokens_per_s, row.convert_seconds) == (7.0, 1.3)
    assert cells(row) == ["a", "7.39", "1.649", "+0.5000", "0.500", "4,096", "1,024", "7.0", ""]
    line = markdown(compare.Comparison({"windows": [2, 8]}, [row])).splitlines()[4]
    assert line == "| " + " | ".join(cells(row)) + " |"


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
        VariantSpec("window", (ConversionSpec("mha", {"window": 9, "sink": 2}),)),
        VariantSpec("mean", (ConversionSpec("lowrank_gqa", {"method": "mean", "num_kv_heads": 1}),)),
        VariantSpec("expand", (ConversionSpec("lowrank_gqa", {"method": "expand", "num_kv_heads": 6}),)),
        VariantSpec("merged", (merged,)),
        VariantSpec("twice", (ConversionSpec("lowrank_gqa", {"method": "expand", "num_kv_heads": 6}), merged)),
    ]
    with warnings.catch_warnings():
        # A comparison shows what is lost; it must not warn of it too.
        warnings.simplefilter("error")
        found = Comparer(model, ids(1, 48), torch.cat(calibration())).run(specs, {})
    assert_untouched(model, before)
    rows = {row.name: row for row in found.rows}
    assert [row.name for row in found.rows] == [spec.name for spec in specs]
    held = {name: row.kv_bytes_held for name, row in rows.items()}
    dense = 2 * 64 * 4
    assert held == {
        "dense": dense, "window": dense, "mean": dense / 2,
        "expand": 3 * dense, "merged": dense / 2, "twice": dense / 2,
    }  # fmt: skip
    assert rows["dense"].flags == rows["mean"].flags == rows["window"].flags == []
    assert rows["expand"].flags == ["NO-OP"]
    assert rows["dense"].ratio == 1.0 and rows["window"].density < 1 == rows["mean"].density
    # Collected once, of the model as it was; what was converted before is calibrated anew.
    assert len(collected) == 1
    assert used[3] is collected[0]
    assert isinstance(used[-1], list)
