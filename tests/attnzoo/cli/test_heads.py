"""The command that scores heads."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import attnzoo.cli.app
import attnzoo.cli.heads
from attnzoo import heads
from attnzoo.cli.models import encode
from attnzoo.evaluation.heads.knockout import knock_out
from attnzoo.evaluation.heads.word_classes import WORDS, word_classes
from attnzoo.evaluation.passkeys import passkey_cases
from attnzoo.heads import RetrievalCase
from attnzoo.heads.scores import picture, retrieval_cases
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
            "score: expected one of razor, induction, echo, previous, duplicate, retrieval, far_mass, copying",
        ),
        (("--top", 0), "top: expected an int"),
        (("--length", 1), "length: expected an int"),
        (("--length", 20, "--score", "retrieval"), "length: expected at least"),
        (("--ablate", "best:3"), "ablate: expected top:COUNT, such as top:10, got 'best:3'"),
        (("--ablate", "top:0"), "ablate: expected top:COUNT"),
        (("--length", 5, "--ablate", "top:7"), "ablate: expected at most 6 heads"),
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


def test_heads_are_tried_without_the_best_of_them(
    run: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attnzoo.cli.heads, "PROMPT", 200)
    monkeypatch.setattr(attnzoo.cli.heads, "TEXT_TOKENS", 40)
    out = tmp_path / "found"
    code, told, err = run("heads", folder, "--score", "echo", "--length", 5, "--ablate", "top:4", "--out", out)
    assert code == 0, err
    assert "With outputs of heads at 0" in told
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".md", ".png"]
    written = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    intact, best, *others = written["knockouts"]
    assert intact["heads"] == []
    assert best["heads"] == [[one["layer"], one["head"]] for one in written["top"]["echo"][:4]]
    assert len(others) == 3
    for one in others:
        assert len({tuple(head) for head in one["heads"]}) == 4
        assert not {tuple(head) for head in one["heads"]} & {tuple(head) for head in best["heads"]}
    assert len({one["text_nll"] for one in written["knockouts"]}) == 5
    assert "| without the 4 best by echo | " in out.with_suffix(".md").read_text(encoding="utf-8")


def test_far_mass_is_of_a_text_that_ships(run: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attnzoo.cli.heads, "TEXT_TOKENS", 100)
    code, told, err = run("heads", folder, "--score", "far_mass", "--json")
    assert code == 0, err
    assert json.loads(told)["about"] == {"method": "far_mass", "sink": 4, "window": 64}


def test_ablation_is_what_a_text_loses_and_is_drawn_on_either_side(
    run: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attnzoo.cli.heads, "TEXT_TOKENS", 30)
    drawn: list[dict[str, Any]] = []
    colours = picture._colours
    monkeypatch.setattr(picture, "_colours", lambda scores: drawn.append(colours(scores)) or drawn[-1])
    code, told, err = run("heads", folder, "--score", "ablation", "--json", "--picture", tmp_path / "made.png")
    assert code == 0, err
    scores = torch.tensor(json.loads(told)["scores"]["ablation"])
    assert scores.shape == (2, 6)
    assert bool((scores < 0).any())
    assert drawn[0]["vmax"] == -drawn[0]["vmin"] == pytest.approx(float(scores.abs().max()))
    assert (tmp_path / "made.png").read_bytes().startswith(b"\x89PNG")


def test_a_knockout_is_the_loss_with_these_heads_at_0(folder: Path) -> None:
    model, tokenizer = attnzoo.cli.app.load_model(str(folder))
    cases = passkey_cases(partial(encode, tokenizer), count=2, length=200)
    text = torch.arange(5, 35) % model.config.vocab_size
    found = knock_out(model, {"none": (), "two": ((0, 1), (1, 2))}, cases, text)
    for one in found:
        edits = [heads.HeadEdit(layer, head, ablate="zero") for layer, head in one.heads]
        with torch.no_grad(), heads.edited(model, edits):
            rows = model(text[None]).logits[0].log_softmax(-1)
            keys = [torch.cat([case.ids, torch.tensor(case.tokens)]) for case in cases]
            said = [model(ids[None]).logits[0].log_softmax(-1)[199:-1] for ids in keys]
        expected = [-row.gather(1, ids[200:, None]).mean() for row, ids in zip(said, keys, strict=True)]
        assert one.text_nll == pytest.approx(-float(rows[:-1].gather(1, text[1:, None]).mean()), rel=1e-5)
        assert one.key_nll == pytest.approx(float(sum(expected)) / 2, rel=1e-5)
    assert found[0].asked == 2


def test_words_that_are_no_single_tokens_are_skipped_and_said() -> None:
    tokens = {f" {word}": [number] for number, word in enumerate(WORDS["weekdays"].split())}
    found, skipped = word_classes(lambda text: torch.tensor(tokens.get(text, [1, 2])))
    assert found == {"weekdays": list(range(7))}
    assert skipped["months"] == "January"
    assert set(skipped) | set(found) == set(WORDS)
    with pytest.raises(ConfigError, match="tokenizer: expected one that has words as single tokens"):
        word_classes(lambda text: torch.tensor([1, 2]))


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
