"""Scores of heads: against plain loops, on every family, and laws that hold for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from attnzoo import surgery
from attnzoo.heads import HeadScores, RetrievalCase, score_heads
from attnzoo.heads.scores import attention_rows, retrieval_cases
from attnzoo.heads.scores.repeated import repeated_tokens
from attnzoo.heads.scores.retrieval_cases import _note, recall
from attnzoo.heads.scores.scored_sites import scored_sites
from attnzoo.heads.scores.scoring import METHODS, scores_on
from attnzoo_kernels.errors import ConfigError, UnsupportedError
from tests.attnzoo.heads.hosts import FAMILIES, host
from tests.attnzoo.heads.scores.plain_scores import eager_attention, plain_echo_and_induction, plain_retrieval
from tests.attnzoo.surgery.tiny import assert_untouched, replace_mha, snapshot, tiny

SMALL: dict[str, Any] = {"length": 7, "repeats": 3}
KINDS = ("induction", "echo")


def on(model: Any, ids: Tensor, length: int) -> dict[str, Tensor]:
    with torch.no_grad():
        return scores_on(model, scored_sites(model), ids, length, KINDS)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_plain_loops_over_eager_attention(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Several chunks of rows, of which the last is shorter.
    monkeypatch.setattr(attention_rows, "CHUNK_VALUES", 2 * 6 * 21 * 4)
    model = host(family)
    ids = repeated_tokens(model, batch=2, seed=3, **SMALL)
    expected = [plain_echo_and_induction(weights, 7) for weights in eager_attention(model, ids)]
    found = on(model, ids, 7)
    for kind in KINDS:
        torch.testing.assert_close(
            found[kind].double(), torch.stack([one[kind] for one in expected]), atol=2e-6, rtol=0
        )
    assert found["echo"].std() > 0.005
    named = score_heads(model, batch=2, seed=3, **SMALL)
    assert named.kinds == KINDS
    assert all(torch.equal(named[kind], found[kind]) for kind in KINDS)


def test_more_tokens_than_learned_positions_are_refused_by_name() -> None:
    config = GPT2Config(vocab_size=61, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    with torch.random.fork_rng(devices=[]):
        model = GPT2LMHeadModel(config)
    with pytest.raises(ConfigError, match=r"^length: expected length \* repeats of at most 32.*got 800"):
        score_heads(model)
    assert score_heads(model, length=16, repeats=2).kinds == KINDS
    # Rotations go on behind the trained length.
    rotated = tiny()
    rotated.config.max_position_embeddings = 16
    assert score_heads(rotated, **SMALL).kinds == KINDS


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_scores_are_of_the_model_in_any_dtype(dtype: torch.dtype) -> None:
    exact = score_heads(tiny(), **SMALL)
    found = score_heads(tiny(dtype=dtype), **SMALL)
    limit = 1e-12 if dtype == torch.float64 else 0.03
    for kind in KINDS:
        torch.testing.assert_close(found[kind].double(), exact[kind].double(), atol=limit, rtol=0)


def test_a_batch_scores_as_the_mean_of_its_sequences_in_any_order() -> None:
    model = tiny()
    ids = repeated_tokens(model, batch=3, seed=0, **SMALL)
    together = on(model, ids, 7)
    turned = on(model, ids.flip(0), 7)
    apart = [on(model, row[None], 7) for row in ids]
    for kind in KINDS:
        torch.testing.assert_close(turned[kind], together[kind], atol=1e-12, rtol=0)
        torch.testing.assert_close(
            torch.stack([one[kind] for one in apart]).mean(0), together[kind], atol=1e-12, rtol=0
        )


@pytest.mark.parametrize("method", ["induction", "echo"])
def test_one_kind_is_that_of_both(method: str) -> None:
    model = tiny()
    assert torch.equal(score_heads(model, method, **SMALL)[method], score_heads(model, **SMALL)[method])


def test_random_tokens_repeat_differ_and_leave_global_numbers_alone() -> None:
    model = tiny()
    model.config.eos_token_id = [5]
    state = torch.get_rng_state()
    ids = repeated_tokens(model, length=40, repeats=3, batch=2, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert ids.shape == (2, 120)
    assert torch.equal(ids[:, :40], ids[:, 40:80])
    for row in ids[:, :40].tolist():
        # 0 is padding, 5 ends a text.
        assert len(set(row)) == 40
        assert not {0, 5} & set(row)
    assert not torch.equal(ids[0], ids[1])
    assert torch.equal(ids, repeated_tokens(model, length=40, repeats=3, batch=2, seed=1))
    assert repeated_tokens(model, length=100, repeats=2, batch=1, seed=0).shape == (1, 200)


def test_retrieval_is_that_of_plain_loops_over_eager_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    # Random weights solve nothing.
    monkeypatch.setattr(retrieval_cases, "SOLVED", -1.0)
    model = host("llama")
    with torch.no_grad():
        # It says three words alone, of which the needle is made.
        model.lm_head.weight[6:] = 0
        model.lm_head.weight[:3] = 0
    drawn = torch.randint(3, 6, (2, 14), generator=torch.Generator().manual_seed(0))
    cases = [RetrievalCase(prompt, (2, 12), 4) for prompt in drawn]
    plain = [plain_retrieval(model, case.ids, case.needle, 4) for case in cases]
    expected = torch.stack([scores for _, scores in plain]).mean(0)
    found = score_heads(model, "retrieval", cases=cases)
    assert found.about == {"method": "retrieval", "cases": 2, "solved": 2}
    assert 0 < expected.count_nonzero() < expected.numel()
    torch.testing.assert_close(found["retrieval"], expected, atol=1e-6, rtol=0)


def test_a_place_of_a_needle_counts_once() -> None:
    case = RetrievalCase(torch.tensor([9, 3, 4, 3, 9]), (1, 4))
    copied = torch.zeros(2, 3, dtype=torch.bool)
    _note(copied, torch.tensor([1, 0]), case, 3)
    _note(copied, torch.tensor([1, 4]), case, 3)
    _note(copied, torch.tensor([2, 3]), case, 3)
    assert copied.tolist() == [[True, False, False], [False, False, True]]


def test_recall_counts_each_token_as_often_as_it_came() -> None:
    assert recall([1, 1, 2, 3], [1, 2, 2, 2]) == 0.5


class StopError(Exception):
    """Comes while a model runs."""


def stopped(what: str, done: int, total: int) -> None:
    if done == total:
        raise StopError


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "attnzoo"])
@pytest.mark.parametrize("ends", ["well", "badly"])
def test_a_model_is_left_as_it_was(implementation: str, ends: str) -> None:
    model = tiny(attn_implementation="sdpa").train()
    surgery.convert(model, "mha").undo()
    model.set_attn_implementation(implementation)
    model.model.layers[0].mlp.eval()
    before = snapshot(model)
    if ends == "well":
        score_heads(model, **SMALL)
    else:
        with pytest.raises(StopError):
            score_heads(model, progress=stopped, **SMALL)
    assert_untouched(model, before)


def test_kv_heads_have_the_best_of_their_group_and_tops_are_stable() -> None:
    scores = torch.tensor([[0.1, 0.5, 0.2, 0.2], [0.5, 0.0, 0.9, 0.1]])
    found = HeadScores({"echo": scores}, kv_heads=2)
    assert torch.equal(found.kv("echo"), torch.tensor([[0.5, 0.2], [0.5, 0.9]]))
    assert [(h.layer, h.head, h.kv_head) for h in found.top("echo", 4)] == [(1, 2, 1), (0, 1, 0), (1, 0, 0), (0, 2, 1)]
    assert found.top("echo", 0) == []
    assert "1, 2" in str(found)
    again = HeadScores.from_json(found.to_json())
    assert torch.equal(again["echo"], scores)
    assert again.kv_heads == 2


def converted() -> Any:
    model = tiny()
    surgery.convert(model, "mha", window=8, sink=1)
    return model


def replaced() -> Any:
    model = tiny()
    replace_mha(model)
    return model


def sliding() -> Any:
    model = host("mistral")
    for layer in model.model.layers:
        layer.self_attn.sliding_window = 4
    model.config.sliding_window = 4
    return model


BAD: dict[str, tuple[Callable[[], Any], dict[str, Any], type[Exception], str]] = {
    "method": (tiny, {"method": "induktion"}, ConfigError, "method: expected one of .* did you mean 'induction'"),
    "no cases": (tiny, {"method": "retrieval"}, ConfigError, "cases: expected at least one"),
    "cases": (tiny, {"cases": [1]}, ConfigError, "cases: expected None"),
    "length": (tiny, {"length": 1}, ConfigError, "length: expected"),
    "repeats": (tiny, {"repeats": 1}, ConfigError, "repeats: expected"),
    "batch": (tiny, {"batch": 0}, ConfigError, "batch: expected"),
    "no attention": (lambda: torch.nn.Linear(2, 2), {}, ConfigError, "model: expected attention blocks"),
    "converted": (converted, {}, UnsupportedError, "undo that conversion"),
    "replaced": (replaced, {}, UnsupportedError, "it is a replacement by"),
    "sliding": (sliding, {}, UnsupportedError, "sliding window"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    make, options, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        score_heads(make(), **options)


@pytest.mark.parametrize(
    ("ids", "needle", "message"),
    [
        (torch.ones(1, 4, dtype=torch.int64), (0, 2), "ids: expected int64"),
        (torch.ones(4), (0, 2), "ids: expected int64"),
        (torch.ones(4, dtype=torch.int64), (2, 2), "needle: expected a place"),
        (torch.ones(4, dtype=torch.int64), (2, 5), "needle: expected a place"),
    ],
)
def test_cases_that_are_none_are_refused(ids: Tensor, needle: tuple[int, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RetrievalCase(ids, needle)


def test_unsolved_cases_say_nothing() -> None:
    model = host("llama")
    case = RetrievalCase(torch.full((8,), 7), (2, 5))
    said, _ = plain_retrieval(model, case.ids, case.needle, 3)
    assert recall(case.tokens, said) <= 0.5
    with pytest.raises(ConfigError, match="expected at least one that the model solves, got none of 1"):
        score_heads(model, "retrieval", cases=[case])


@pytest.mark.parametrize(
    ("scores", "kv_heads", "message"),
    [
        ({}, 1, "at least one kind"),
        ({"a": torch.zeros(2)}, 1, r"expected \[L, H\]"),
        ({"a": torch.zeros(2, 4), "b": torch.zeros(4, 2)}, 1, r"expected \[L, H\]"),
        ({"a": torch.full((2, 4), torch.nan)}, 1, "finite"),
        ({"a": torch.zeros(2, 4)}, 3, "kv_heads: expected a divisor"),
    ],
)
def test_scores_that_are_none_are_refused(scores: dict[str, Tensor], kv_heads: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HeadScores(scores, kv_heads)


def test_every_method_says_its_kinds() -> None:
    kinds = {kind for kinds in METHODS.values() for kind in kinds}
    assert kinds == {"echo", "induction", "previous", "duplicate", "retrieval"}
    with pytest.raises(ConfigError, match="kind: expected one of"):
        HeadScores({"echo": torch.zeros(1, 2)}, 1)["induction"]
