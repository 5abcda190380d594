"""What a conversion will take is said before it starts, and what clearly does not fit is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import attnzoo
from attnzoo import surgery
from attnzoo.surgery.streaming import estimate
from tests.attnzoo.surgery.tiny import calibration, tiny

LAYERS = 3
LATENT: dict[str, Any] = {"method": "latent", "latent_dim": 20}
COMMUTING: dict[str, Any] = {"method": "commuting", "num_kv_heads": 1}
WIDTH, VALUES = 96, 64
SITE = 8 * (3 * WIDTH**2 + VALUES**2)
"""Bytes of one site's statistics with gradients."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("estimates") / "model"
    tiny(layers=LAYERS, dtype=torch.bfloat16).save_pretrained(path, max_shard_size="60KB")
    return path


def stored(source: Path) -> int:
    return sum(p.numel() * 2 for p in tiny(layers=LAYERS, dtype=torch.bfloat16).parameters())


def test_runs_disk_and_statistics_are_counted(source: Path) -> None:
    text = calibration(2)
    tokens = sum(batch.numel() for batch in text)
    inputs = LAYERS * tokens * WIDTH * 2
    latent = surgery.what_it_takes(source, "lowrank_gqa", calibration=text, **LATENT)
    assert (latent.forward, latent.backward, latent.tokens) == (2, 1, tokens)
    assert latent.weights == latent.result == stored(source)
    assert latent.disk == inputs
    refitted = surgery.what_it_takes(source, "lowrank_gqa", calibration=text, **COMMUTING)
    assert (refitted.forward, refitted.backward) == (4, 1)
    assert refitted.disk == inputs + LAYERS * SITE
    plain = surgery.what_it_takes(source, "lowrank_gqa", calibration=text, gradients=False, **LATENT)
    assert (plain.forward, plain.backward, plain.disk) == (1, 0, 0)
    # All sites' statistics at once, or one site's.
    one = surgery.what_it_takes(source, "lowrank_gqa", calibration=text, one_site_at_a_time=True, **LATENT)
    assert latent.in_memory - one.in_memory == (LAYERS - 1) * SITE
    assert latent.by_layers < latent.in_memory
    assert latent.seconds is not None
    assert latent.seconds > 0
    nothing = surgery.what_it_takes(source, "lowrank_gqa", method="expand", num_kv_heads=6)
    assert (nothing.forward, nothing.backward, nothing.disk, nothing.seconds) == (0, 0, 0, None)


def test_a_run_in_fp32_is_counted_as_such(source: Path) -> None:
    given: dict[str, Any] = {"variant": "lowrank_gqa", "calibration": calibration(1), **LATENT}
    dtypes = surgery.Dtypes(run=torch.float32)
    assert surgery.what_it_takes(source, dtypes=dtypes, **given).weights == 2 * stored(source)


@pytest.mark.parametrize("enough", [False, True])
def test_memory_that_is_clearly_missing_is_refused_before_anything_is_written(
    enough: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"variant": "lowrank_gqa", "calibration": calibration(1), **LATENT}
    least = surgery.what_it_takes(source, **given).least
    monkeypatch.setattr(estimate, "available_bytes", lambda: least - 1 + int(enough))
    if enough:
        surgery.convert_folder(source, tmp_path / "out", **given)
        return
    with pytest.raises(attnzoo.ConfigError, match=r"^memory: expected .* for one layer and its statistics, got"):
        surgery.convert_folder(source, tmp_path / "out", **given)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_refused_and_unknown_memory_is_not(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "available_bytes", lambda: None)
    needs = surgery.what_it_takes(source, "lowrank_gqa", calibration=calibration(1), **LATENT)
    needs.check(tmp_path / "out")
    assert ("memory that is free", "unknown") in needs.grid().rows
    usage = type("Usage", (), {"free": needs.disk + needs.result - 1})
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(attnzoo.ConfigError, match=r"^out: expected room for .* in .*, got "):
        needs.check(tmp_path / "deep" / "out")
