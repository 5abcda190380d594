"""Duo's calibration: a planted head is found, labels matter, and gates have the gradients that they should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attnzoo.cache.policies.duo import Duo
from attnzoo.cache.policies.streaming import Streaming
from attnzoo.heads import DuoGates, calibrate_duo, score_heads, verbatim_batches
from attnzoo.heads.scores.retrieval_cases import RetrievalCase
from attnzoo.heads.scores.scored_sites import scored_sites
from attnzoo.heads.training.duo_gates import Streams, rate_at
from attnzoo_kernels.errors import ConfigError
from tests.attnzoo.heads.planted import BEGIN, BYTES, COPYING, planted
from tests.attnzoo.surgery.tiny import assert_untouched, ids, snapshot, tiny

NARROW = Streaming(sink=8, window=8, block=8)
LAYER, HEAD = COPYING
KV_HEAD = HEAD // 2


def batches(count: int = 8) -> list[dict[str, Tensor]]:
    """Bytes that differ from each other, and two spans of them once more."""
    found: list[dict[str, Tensor]] = []
    for seed in range(count):
        text = torch.randperm(BYTES - 1, generator=torch.Generator().manual_seed(seed))[:96] + 1
        sizes: dict[str, Any] = {"length": 129, "spans": 2, "span": 16, "begin": BEGIN, "seed": seed}
        found += verbatim_batches(text, count=1, **sizes)
    return found


def elsewhere(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same text with as many answers, drawn from rows where nothing was copied."""
    answers = torch.zeros_like(batch["answers"])
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))[: int(batch["answers"].sum())]
    answers[0, order] = True
    return {**batch, "answers": answers}


def test_the_planted_head_copies_and_is_found_by_its_scores() -> None:
    model = planted()
    scores = score_heads(model, length=40, repeats=2)
    best = scores.top("induction", 2)
    assert (best[0].layer, best[0].head) == COPYING
    assert best[0].score > 0.95
    assert best[1].score < 0.2
    batch = batches(1)[0]
    prompt = batch["input_ids"][0, : 1 + 96 + 2]
    start = int((prompt[:97] == prompt[-1]).nonzero()) + 1
    found = score_heads(model, "retrieval", cases=[RetrievalCase(prompt, (start, start + 8))])
    assert found["retrieval"][LAYER, HEAD] == 1
    assert found.top("retrieval", 2)[1].score < 0.5


def test_steps_let_go_of_heads_that_matter_least() -> None:
    model = planted(layers=3)
    before = snapshot(model)
    told: list[tuple[str, int, int]] = []
    found = calibrate_duo(
        model, batches(2), streaming=NARROW, steps=12, rate=0.1, progress=lambda *said: told.append(said)
    )
    assert_untouched(model, before)
    assert told[-1] == ("gates", 12, 12)
    assert len(found.losses) == 12
    assert found.gates.shape == (3, 2)
    assert found.gates.dtype == torch.float32
    others = found.gates.flatten().tolist()
    kept = others.pop(2 * LAYER + KV_HEAD)
    assert kept > max(others) + 0.2


def test_gates_end_between_0_and_1() -> None:
    batch = verbatim_batches(ids(1, 60)[0], count=1, length=40, spans=1, span=16)
    # Whole and mixed streams agree at first, so that the penalty alone pulls, and far too far.
    found = calibrate_duo(tiny(dtype=torch.float32), batch, streaming=NARROW, steps=1, rate=2.0)
    assert found.gates.tolist() == [[0.0, 0.0], [0.0, 0.0]]


@pytest.mark.slow
def test_the_planted_heads_gate_stays_open_and_others_close() -> None:
    found = calibrate_duo(planted(), batches(), streaming=NARROW, steps=200)
    gates = found.gates.flatten().tolist()
    assert gates.pop(2 * LAYER + KV_HEAD) > 0.9
    assert sorted(gates)[len(gates) // 2] < 0.2
    assert found.policy().full.nonzero().tolist() == [[LAYER, KV_HEAD]]
    control = calibrate_duo(planted(), [elsewhere(batch) for batch in batches()], streaming=NARROW, steps=200)
    assert control.gates.max() < 0.5


def test_a_model_is_left_as_it_was_when_training_stops() -> None:
    model = tiny(dtype=torch.float32).train()
    before = snapshot(model)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    batch = verbatim_batches(ids(1, 60)[0], count=1, length=40, spans=1, span=16)
    with pytest.raises(KeyboardInterrupt):
        calibrate_duo(model, batch, streaming=NARROW, steps=3, progress=stop)
    assert_untouched(model, before)


@pytest.fixture(scope="module")
def streams() -> tuple[Streams, Tensor, Tensor]:
    model = tiny()
    tokens = ids(2, 40)
    answers = torch.zeros(2, 40, dtype=torch.bool)
    answers[:, 25:] = True
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return Streams(model, scored_sites(model), NARROW), tokens, answers


def test_gates_have_the_gradient_of_finite_differences(streams: tuple[Streams, Tensor, Tensor]) -> None:
    both, tokens, answers = streams
    gates = torch.tensor([[0.9, 0.2], [0.5, 0.7]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(both.distance(gates, tokens, answers), gates)
    step = 1e-5
    for place in range(4):
        moved = torch.zeros(4, dtype=torch.float64)
        moved[place] = step
        moved = moved.view(2, 2)
        with torch.no_grad():
            above = both.distance(gates + moved, tokens, answers)
            below = both.distance(gates - moved, tokens, answers)
        expected = float((above - below) / (2 * step))
        assert float(gradient.flatten()[place]) == pytest.approx(expected, rel=1e-5, abs=1e-10)
    assert gradient.abs().min() > 1e-9


def test_streams_agree_where_nothing_is_forgotten(streams: tuple[Streams, Tensor, Tensor]) -> None:
    both, tokens, answers = streams
    with torch.no_grad():
        assert both.distance(torch.ones(2, 2, dtype=torch.float64), tokens, answers) <= 1e-24
        assert both.distance(torch.zeros(2, 2, dtype=torch.float64), tokens, answers) > 1e-3
        wide = Streams(both.model, both.sites, Streaming(sink=0, window=40, block=8))
        assert wide.distance(torch.zeros(2, 2, dtype=torch.float64), tokens, answers) <= 1e-24


def test_what_is_whole_is_the_first_streams(streams: tuple[Streams, Tensor, Tensor]) -> None:
    both, tokens, answers = streams
    given: list[Tensor] = []
    last = both.model.model.layers[1].self_attn.o_proj
    hook = last.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    gates = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    with torch.no_grad():
        assert both.distance(gates, tokens, answers) > 1e-3
    hook.remove()
    assert torch.equal(given[0], given[1])


def test_closed_gates_stream_by_the_policys_blocks(streams: tuple[Streams, Tensor, Tensor]) -> None:
    both, tokens, answers = streams
    model = both.model
    t = torch.arange(40)
    behind = t[:, None] // 8 - t // 8
    seen = (t[:, None] >= t) & ((behind < 2) | (t < 8))
    mask = torch.zeros(40, 40, dtype=torch.float64).masked_fill(~seen, float("-inf"))
    with torch.no_grad():
        whole = model.base_model(tokens, use_cache=False).last_hidden_state
        streamed = model.base_model(tokens, attention_mask=mask.expand(2, 1, 40, 40), use_cache=False).last_hidden_state
        expected = (whole - streamed)[answers].square().mean()
        found = both.distance(torch.zeros(2, 2, dtype=torch.float64), tokens, answers)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    # An answer is what its row gives, and rows before are none.
    assert float((whole - streamed)[:, :16].abs().max()) <= 1e-12


def test_the_rate_goes_up_stays_and_goes_down() -> None:
    rates = [rate_at(step, 50) for step in range(50)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert rates[10:40] == [1.0] * 30
    assert rates[-3:] == pytest.approx([0.3, 0.2, 0.1])
    assert rate_at(0, 1) == 1.0


def test_gates_make_a_policy_and_a_folder(tmp_path: Path) -> None:
    gates = DuoGates(torch.tensor([[0.9, 0.1], [0.5, 0.9]]), (1.0,), NARROW)
    assert gates.policy().full.tolist() == [[True, False], [True, True]]
    assert gates.policy(0.25).full.tolist() == [[True, False], [False, False]]
    assert gates.policy(0.75).full.tolist() == [[True, False], [True, True]]
    assert (gates.policy().sink, gates.policy().window, gates.policy().block) == (8, 8, 8)
    loaded = Duo.load(gates.save(tmp_path / "gates"), block=8)
    assert loaded.full.tolist() == gates.policy().full.tolist()
    assert json.loads((tmp_path / "gates" / "config.json").read_text())["recent_size"] == 8
    with pytest.raises(ConfigError, match="keep: expected a share"):
        gates.policy(1.5)


def test_texts_repeat_themselves_where_answers_are() -> None:
    text = torch.arange(100, 400)
    found = verbatim_batches(text, count=3, batch=2, length=90, spans=2, span=16, begin=7, seed=1)
    assert len(found) == 3
    for batch in found:
        rows = batch["input_ids"]
        assert rows.shape == (2, 90)
        assert (rows[:, 0] == 7).all()
        assert torch.equal(batch["answers"][0].nonzero()[:, 0], torch.tensor([*range(59, 73), *range(75, 89)]))
        for row in rows.tolist():
            window = row[1:58]
            assert window == list(range(window[0], window[0] + 57))
            for begins in (58, 74):
                assert row[begins : begins + 16] == list(range(row[begins], row[begins] + 16))
                assert row[begins] in window
                assert row[begins + 15] in window
    assert not torch.equal(found[0]["input_ids"], found[1]["input_ids"])


GOOD = {"input_ids": torch.ones(1, 9, dtype=torch.int64), "answers": torch.ones(1, 9, dtype=torch.bool)}


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ([], {}, "at least one"),
        ([torch.ones(1, 9)], {}, "expected mappings"),
        ([{"input_ids": GOOD["input_ids"]}], {}, "expected mappings with input_ids and answers"),
        ([{**GOOD, "input_ids": torch.ones(1, 9)}], {}, "input_ids int64"),
        ([{**GOOD, "answers": torch.zeros(1, 9, dtype=torch.bool)}], {}, "a row that counts"),
        ([{**GOOD, "answers": torch.ones(1, 8, dtype=torch.bool)}], {}, "answers bool"),
        ([GOOD], {"steps": 0}, "steps: expected"),
        ([GOOD], {"rate": -1.0}, "rate: expected"),
        ([GOOD], {"penalty": float("nan")}, "penalty: expected"),
    ],
)
def test_bad_batches_are_named(given: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        calibrate_duo(tiny(), given, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"length": 100, "span": 60, "spans": 2}, "length: expected"), ({"span": 7}, "span: expected"), ({}, "tokens")],
)
def test_texts_that_are_too_short_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        verbatim_batches(torch.arange(100), **options)
