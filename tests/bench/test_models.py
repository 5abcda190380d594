"""Byte models of every variant: what was stored holds what is said of it, and how entropies and tables are made."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import attnzoo
from bench import models

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"


def test_every_variant_learnt_within_a_minute_and_a_half() -> None:
    where, rows = models.read(RESULTS / "models.json")
    shipped = {name for name in attnzoo.list_variants() if attnzoo.get_config(name).__module__.startswith("attnzoo.")}
    assert {row.variant for row in rows} == shipped
    assert where["steps"] <= 150
    for row in rows:
        assert row.held_out <= where["unigram"] - 0.5, row
        assert row.seconds <= 90, row


def test_the_entropy_is_that_of_the_formula() -> None:
    tokens = torch.tensor([3, 3, 3, 9])
    assert models.entropy(tokens) == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))


def test_a_table_says_how_far_below_single_bytes() -> None:
    row = models.LearntRow("mha", 1234, seconds=1.0, times_mha=1.0, held_out=2.5)
    lines = models.table([row, replace(row, variant="s2", times_mha=0.75, held_out=2.0)], 3.25)
    assert lines[2:] == ["| `mha` | 1,234 | 2.50 | 0.75 | 1.00 |", "| `s2` | 1,234 | 2.00 | 1.25 | 0.75 |"]
