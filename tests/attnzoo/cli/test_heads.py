"""The command that scores heads."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import attnzoo.cli.app
from attnzoo.cli.models import encode
from attnzoo.evaluation.passkeys import passkey_cases
from attnzoo.heads import RetrievalCase
from attnzoo.heads.scores import retrieval_cases
from attnzoo_kernels.errors import ConfigError
from tests.attnzoo.cli.cli_support import call, write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("heads") / "tiny")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    return partial(call, monkeypatch, capsys)


def test_heads_are_told_as_table_json_and_picture(run: Any, folder: Path, tmp_path: Path) -> None:
    drawn = tmp_path / "new" / "map.png"
    code, out, err = run("heads", folder, "--length", 5, "--top", 3, "--json", "--picture", drawn)
    assert code == 0, err
    told = json.loads(out)
    assert list(told["scores"]) == list(told["top"]) == ["induction", "echo"]
    scores = torch.tensor(told["scores"]["echo"])
    assert scores.shape == (2, 6)
    best = told["top"]["echo"]
    assert len(best) == 3
    assert best[0]["score"] == pytest.approx(float(scores.max()))
    assert float(scores[best[0]["layer"], best[0]["head"]]) == pytest.approx(float(scores.max()))
    assert best[0]["kv_head"] == best[0]["head"] // 3
    assert told["about"]["length"] == 5
    assert drawn.read_bytes().startswith(b"\x89PNG")
    code, out, _ = run("heads", folder, "--score", "echo", "--length", 5, "--top", 100)
    assert code == 0
    assert "induction" not in out
    assert "12 query heads, 4 KV heads" in out
    assert f"{best[0]['layer']}, {best[0]['head']}" in out


def test_retrieval_is_of_passkeys(run: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval_cases, "SOLVED", -1.0)
    code, out, err = run("heads", folder, "--score", "retrieval", "--length", 200, "--json")
    assert code == 0, err
    assert json.loads(out)["about"] == {"method": "retrieval", "cases": 5, "solved": 5}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--score", "echos"),
            "score: expected one of razor, induction, echo, previous, duplicate, retrieval, got 'echos'; did you mean",
        ),
        (("--top", 0), "top: expected an int"),
        (("--length", 1), "length: expected an int"),
        (("--length", 20, "--score", "retrieval"), "length: expected at least"),
        (("--picture", "map.txt"), "picture: expected one of .png, .pdf, .svg, got '.txt'"),
    ],
)
def test_bad_input_is_one_line(run: Any, folder: Path, arguments: tuple[Any, ...], message: str) -> None:
    code, out, err = run("heads", folder, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"attnzoo: {message}")
    assert len(err.splitlines()) == 1


def test_a_picture_that_has_no_place_is_said_before_the_work(
    run: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attnzoo.cli.app, "load_model", None)
    (tmp_path / "file").write_text("", encoding="utf-8")
    code, _, err = run("heads", folder, "--picture", tmp_path / "file" / "map.png")
    assert code == 2
    assert err.startswith("attnzoo: picture: expected a place in a folder")


def letters(text: str) -> torch.Tensor:
    return torch.tensor([ord(letter) for letter in text])


def test_a_passkey_is_where_its_case_says() -> None:
    cases = passkey_cases(letters, count=3, length=500, seed=2)
    starts = []
    for case in cases:
        assert isinstance(case, RetrievalCase)
        text = "".join(map(chr, case.ids.tolist()))
        assert len(text) == 500
        start, end = case.needle
        assert text[start:end].strip().isdecimal()
        assert text[:start].endswith("The pass key is")
        assert text.count(text[start:end]) == 1
        assert text.endswith("What is the pass key? The pass key is")
        starts.append(start)
    assert starts == sorted(starts)
    assert starts[0] < 300 < starts[2]
    with pytest.raises(ConfigError, match="length: expected at least"):
        passkey_cases(letters, length=100)


def test_a_model_without_a_tokenizer_has_no_passkeys() -> None:
    with pytest.raises(ConfigError, match="model: expected a tokenizer"):
        passkey_cases(partial(encode, None))
