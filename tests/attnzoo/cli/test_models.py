"""Texts as the command line names them, and the cells of a table of costs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attnzoo.cli import models
from attnzoo.cli.models import text_tokens
from attnzoo.evaluation.cost_setting import KINDS, Cost
from attnzoo.evaluation.costs_report import cells
from attnzoo_kernels.errors import ConfigError


def tokenizer(text: str, *, add_special_tokens: bool = True, **_: Any) -> Any:
    """A token a character, and 1 in front unless it is asked not to."""
    return SimpleNamespace(input_ids=[1] * add_special_tokens + [ord(letter) for letter in text])


def test_a_text_has_its_own_tokens_alone(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("abc", encoding="utf-8")
    found = text_tokens(tokenizer, str(path))
    assert found.dtype == torch.int64
    assert found.tolist() == [97, 98, 99]


def test_what_is_no_text_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xff\xfe\xff")
    for name, given, words in (
        (str(path), tokenizer, "UTF-8"),
        (str(tmp_path / "none"), tokenizer, "expected a file"),
        (str(path), None, "expected a tokenizer"),
    ):
        with pytest.raises(ConfigError, match=words):
            text_tokens(given, name)
    monkeypatch.setattr(models, "TEXT_BYTES", 2)
    with pytest.raises(ConfigError, match="at most 2 bytes, got 3"):
        text_tokens(tokenizer, str(path))


def test_each_kind_has_its_time_and_its_ratio_side_by_side() -> None:
    times = {kind: float(n + 1) for n, kind in enumerate(KINDS)}
    ratios = {kind: n + 0.25 for n, kind in enumerate(KINDS)}
    cost = Cost("mha", density=0.5, error=2e-7, milliseconds=times, times_baseline=ratios)
    assert cells(cost) == ["mha", "0.500", "1", "0.25", "2", "1.25", "3", "2.25", "2e-07"]
    assert cells(Cost("moh", problem="wrong")) == ["moh", "", *[""] * 6, ""]
