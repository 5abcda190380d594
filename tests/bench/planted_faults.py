"""What may go wrong with a test on a GPU, planted for the rehearsal of ``make gpu-first``; no file of the suite."""

from __future__ import annotations

import os
import time

import pytest

pytestmark = pytest.mark.gpu


def test_planted_failure() -> None:
    assert "planted" == "found", "planted on purpose"


def test_planted_crash() -> None:
    os.abort()


def test_after_a_crash() -> None:
    pass


def test_planted_hang() -> None:
    time.sleep(3600)
