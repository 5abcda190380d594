"""``compare --policy`` on a tiny model: the table, the files, and wrong calls in one line before anything runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.attnzoo.cli.cli_support import call, write_model, write_text

Run = Callable[..., tuple[int, str, str]]
DUO = "duo:keep=0.5,sink=8,window=16,block=8,heads=random"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_text(tmp_path_factory.mktemp("texts") / "0.txt", 0)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return partial(call, monkeypatch, capsys)


def test_policies_are_scored_behind_a_context_and_written(run: Run, folder: Path, text: str, tmp_path: Path) -> None:
    asked = ("compare", folder, "--policy", DUO, "--text", text, "--length", 200, "--offset", 0, "--passkeys", 1)
    code, out, err = run(*asked, "--out", tmp_path / "made")
    assert (code, err) == (0, "")
    assert "held" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made.json", "made.md", "made.png"]
    data = json.loads((tmp_path / "made.json").read_text(encoding="utf-8"))
    dense, duo = data["rows"]
    assert (dense["name"], duo["name"]) == ("dense", DUO)
    assert dense["held_share"] == 1 > duo["held_share"] > 0.5
    assert duo["keys_asked"] == 1
    assert data["about"]["context"] == [200]


WRONG = [
    (("--policy", "snapkw:share=0.4"), "snapkw: expected one of policies"),
    (("--policy", "duo:keep=0.5,window=60"), "window: expected a multiple of block 64"),
    (("--policy", DUO, "--variants", "dense"), "variants: expected nothing beside policies"),
    (("--policy", DUO, "--decode-at", "4096"), "decode_at: expected nothing beside policies"),
    (("--policy", DUO, "--windows", "0"), "windows: expected an int from 1, got 0"),
    (("--policy", DUO, "--passkeys", "-1"), "passkeys: expected an int from 0, got -1"),
    (("--preset", "polices"), "did you mean 'policies'"),
    (("--variants", "duo:keep=0.5"), "one forward over a text says nothing about it: use --policy duo:keep=0.5"),
    ((), "variants: expected --variants, --policy or --preset, got none of them"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_a_wrong_call_is_one_line_before_the_model_is_looked_for(
    run: Run, arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = run("compare", "no model of that name", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_a_text_that_is_too_short_is_said_before_anything_is_read(run: Run, folder: Path, text: str) -> None:
    code, _, err = run("compare", folder, "--policy", DUO, "--text", text, "--offset", 3900)
    assert (code, err.count("\n")) == (2, 1)
    assert "text: expected" in err
