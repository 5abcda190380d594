"""Folders converted layer by layer on the command line: on request, or where the model does not fit; and dry runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from attnzoo import surgery
from attnzoo.surgery.lowrank import one_site
from tests.attnzoo.cli.cli_support import call, write_model, write_text

LATENT = "lowrank_gqa:method=latent,latent_dim=12"
EXPAND = "lowrank_gqa:method=expand,num_kv_heads=6"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    file = write_text(tmp_path_factory.mktemp("texts") / "calibration.txt", 1)
    return ("--calibrate", file, "--length", "32", "--windows", "2")


def same(a: Path, b: Path) -> bool:
    first, second = (surgery.load(folder)[0].state_dict() for folder in (a, b))
    return first.keys() == second.keys() and all(torch.equal(x, second[name]) for name, x in first.items())


def test_both_ways_give_the_same(
    model: Path,
    text: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for way in ("--whole", "--by-layers"):
        out = tmp_path / way.strip("-")
        code, printed, err = call(
            monkeypatch, capsys, "convert", model, "--to", LATENT, "--out", out, way, "--where", "1-", "--json", *text
        )
        assert code == 0, err
        assert json.loads(printed)["dtype"] == "float32"
        assert [site["site"]["layer"] for site in json.loads(printed)["sites"]] == [1]
    assert same(tmp_path / "whole", tmp_path / "by-layers")
    assert surgery.load(tmp_path / "by-layers")[1]("the cat").input_ids == [1, 3]


def test_what_does_not_fit_twice_goes_by_layers(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shards: list[int] = []
    for free in (1 << 40, 600 << 20, None):
        monkeypatch.setattr(one_site, "available_bytes", lambda free=free: free)
        out = tmp_path / str(free)
        code, _, err = call(monkeypatch, capsys, "convert", model, "--to", EXPAND, "--out", out)
        assert code == 0, err
        shards.append(len(list(out.glob("model-*.safetensors"))))
    assert shards == [0, 3, 0]


def test_a_dry_run_says_what_it_takes_and_writes_nothing(
    model: Path,
    text: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ("convert", model, "--to", LATENT, "--out", tmp_path / "out", "--dry-run", *text)
    code, printed, err = call(monkeypatch, capsys, *given, "--json")
    assert code == 0, err
    found: dict[str, Any] = json.loads(printed)
    assert (found["forward"], found["backward"], found["tokens"]) == (2, 1, 64)
    code, printed, _ = call(monkeypatch, capsys, *given)
    assert code == 0
    assert "memory, layer by layer" in printed
    assert "2 times forward, 1 times backward, 64 tokens" in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (("--by-layers", "--device", "cuda"), "by_layers: expected cpu, got 'cuda'"),
        (("--whole", "--run-in", "float32"), "run_in: expected auto unless --by-layers"),
    ],
)
def test_ways_that_do_not_go_together_are_refused(
    more: tuple[str, ...],
    named: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, _, err = call(monkeypatch, capsys, "convert", model, "--to", EXPAND, "--out", tmp_path / "out", *more)
    assert code == 2
    assert named in " ".join(err.split())
    assert list(tmp_path.iterdir()) == []
