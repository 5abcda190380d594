"""The command line on a tiny model: what it prints, what it writes, and what it says when something is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from attnzoo import surgery
from tests.attnzoo.cli.cli_support import call, write_model, write_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A text to score and one to calibrate on."""
    path = tmp_path_factory.mktemp("texts")
    return write_text(path / "0.txt", 0), write_text(path / "1.txt", 1)


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Calls the command line: exit code, stdout, stderr."""
    return partial(call, monkeypatch, capsys)


def test_list_names_every_variant_and_speaks_json(run: Run) -> None:
    code, out, _ = run("list")
    assert code == 0
    assert all(name in out for name in ("mha", "s2", "lowrank_gqa"))
    code, out, _ = run("list", "low*", "--json")
    assert list(json.loads(out)) == ["lowrank_gqa"]


def test_show_tells_options_source_and_the_picture(run: Run) -> None:
    code, out, _ = run("show", "s2")
    assert code == 0
    assert "Source:" in out
    assert "vert_stride" in out
    assert "■" in out
    code, out, _ = run("show", "s2", "--json")
    assert json.loads(out)["small"]["density"] < 1


def test_inspect_lists_the_sites(run: Run, folder: Path) -> None:
    code, out, _ = run("inspect", folder, "--json")
    assert code == 0
    data = json.loads(out)
    assert [site["kv_heads"] for site in data["sites"]] == [2, 2]
    assert data["kv_bytes_per_token"] == 2 * 2 * 2 * 8 * 4
    code, out, _ = run("inspect", folder)
    assert "model.layers.1.self_attn" in out


def test_convert_writes_a_model_that_inspect_and_load_read(
    run: Run, folder: Path, texts: tuple[str, str], tmp_path: Path
) -> None:
    to = "lowrank_gqa:method=latent,latent_dim=16"
    out = tmp_path / "converted"
    more = ("--calibrate", texts[1], "--length", 64, "--windows", 4)
    code, printed, _ = run("convert", folder, "--to", to, "--out", out, "--json", *more)
    assert code == 0
    assert json.loads(printed)["cache_bytes_per_token"] == {"before": 256, "after": 128}
    code, printed, _ = run("inspect", out, "--json")
    assert json.loads(printed)["kv_bytes_per_token"] == 128
    model, tokenizer = surgery.load(out)
    assert tokenizer("the cat").input_ids == [1, 3]
    assert model(torch.ones(1, 5, dtype=torch.long)).logits.isfinite().all()


def test_compare_writes_table_json_markdown_and_picture(
    run: Run, folder: Path, texts: tuple[str, str], tmp_path: Path
) -> None:
    rows = ("dense", "mha", "mha:window=16,sink=2,block_size=8", "lowrank_gqa:method=latent,latent_dim=16")
    chosen = [part for row in rows for part in ("--variants", row)]
    common = ("--text", texts[0], "--calibrate", texts[1], "--length", 128, "--offset", 0, "--windows", 2)
    code, out, err = run(
        "compare", folder, *chosen, *common, "--calibration-windows", 2, "--decode-at", 240, "--out", tmp_path / "a.b"
    )
    assert code == 0, err
    assert "NO-OP" in out
    data = json.loads((tmp_path / "a.b.json").read_text(encoding="utf-8"))
    dense, same, window, latent = data["rows"]
    assert dense["flags"] == []
    assert same["flags"] == ["NO-OP"]
    assert same["max_logit_diff"] <= 1e-4
    assert window["flags"] == []
    assert window["density"] < 0.5
    assert window["kv_bytes_read"] < window["kv_bytes_held"] == 256
    assert latent["kv_bytes_held"] == 128
    assert len(dense["nll"]) == 2
    for row in data["rows"]:
        assert row["decode_times_dense"] > 0
        assert [one["tokens"] for one in row["longer"]] == [240]
    assert window["longer"][0]["kv_bytes_read"] < window["kv_bytes_read"]
    assert "Decoding behind 240 tokens" in out
    assert "| dense |" in (tmp_path / "a.b.md").read_text(encoding="utf-8")
    assert (tmp_path / "a.b.png").read_bytes().startswith(b"\x89PNG")


def test_compare_says_the_same_twice_but_for_speed(run: Run, folder: Path, texts: tuple[str, str]) -> None:
    common = ("--text", texts[0], "--calibrate", texts[1], "--length", 64, "--offset", 0, "--calibration-windows", 1)
    found = []
    for _ in range(2):
        code, out, _ = run("compare", folder, "--variants", "mha:window=16,sink=2", *common, "--json")
        assert code == 0
        data: dict[str, Any] = json.loads(out)
        for row in data["rows"]:
            del row["decode_tokens_per_s"], row["decode_times_dense"], row["convert_seconds"]
        found.append(data)
    assert found[0] == found[1]


BAD: tuple[tuple[tuple[str, ...], str], ...] = (
    (("show", "nothing"), "nothing"),
    (("inspect", "{tmp}/missing"), "missing"),
    (("compare", "{model}"), "variants"),
    (("compare", "{model}", "--preset", "none"), "preset"),
    (("compare", "{model}", "--variants", "quadratic"), "quadratic"),
    (("compare", "{model}", "--variants", "s2:block_size"), "s2:name=value"),
    (("compare", "{model}", "--variants", "dense", "--text", "{tmp}/none.txt"), "none.txt"),
    (("compare", "{model}", "--variants", "lowrank_gqa:method=latent,latent_dim=8", "--text", "devil"), "calibrate"),
    (("compare", "{model}", "--variants", "dense", "--length", "1"), "length"),
    (("compare", "{model}", "--variants", "dense", "--length", "32", "--decode-at", "40"), "decode_at"),
    (("compare", "{model}", "--variants", "dense", "--offset", "100000000"), "tokens"),
    (("compare", "{model}", "--variants", "mha:windows=4", "--length", "32", "--offset", "0"), "windows"),
    (("convert", "{model}", "--to", "dense", "--out", "{tmp}/out"), "dense"),
    (("convert", "{model}", "--to", "s2:block_size=-1", "--out", "{tmp}/out"), "block_size"),
    (("convert", "{model}", "--to", "lowrank_gqa:method=best", "--out", "{tmp}/out"), "method"),
    (("convert", "{model}", "--to", "mha:window=4,sink=1", "--out", "{full}"), "not empty"),
)


@pytest.mark.parametrize(("arguments", "named"), BAD, ids=lambda value: " ".join(value) if type(value) is tuple else "")
def test_what_is_wrong_is_one_line_and_leaves_nothing(
    run: Run, folder: Path, tmp_path: Path, arguments: tuple[str, ...], named: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("kept", encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    places = {"tmp": tmp_path, "model": folder, "full": tmp_path / "full"}
    code, _, err = run(*(argument.format(**places) for argument in arguments))
    assert code in (1, 2)
    line = err.strip().splitlines()[-1]
    assert line.startswith("attnzoo: "), err
    assert named in line
    assert "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "full" / "precious").read_text(encoding="utf-8") == "kept"


def test_damaged_and_dangerous_models_are_refused_in_one_line(run: Run, folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code, _, err = run("inspect", broken)
    assert code == 1
    assert "damaged" in err.strip().splitlines()[-1]
    weights.unlink()
    (broken / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    code, _, err = run("inspect", broken)
    assert code == 1
    assert "safetensors" in err.strip().splitlines()[-1]
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF" + b"\xff" * 60)
    code, _, err = run("inspect", gguf)
    assert code == 1
    assert "model.gguf" in err.strip().splitlines()[-1]


def test_the_module_runs_as_a_program() -> None:
    root = Path(__file__).parents[3]
    env = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}"}
    command = [sys.executable, "-m", "attnzoo", "--version"]
    done = subprocess.run(command, env=env, check=True, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("attnzoo 0.")
