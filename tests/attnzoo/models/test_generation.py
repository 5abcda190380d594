"""Texts that a model continues: as whole calls would, padded or not, where they end, and what tokens are drawn by."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnzoo import ConfigError, ShapeError
from attnzoo.models import CausalLM
from attnzoo.models.sampling import Sampling
from tests.attnzoo.models import plain
from tests.attnzoo.models.small import VARIANTS, WORDS, padded, small, texts

NEW = 9


@pytest.fixture(scope="module")
def mha() -> CausalLM:
    return small("mha")


def by_whole_calls(model: CausalLM, ids: Tensor, padding: Tensor, sampling: Sampling) -> Tensor:
    """What steps must say of texts that end where the batch does."""
    with torch.no_grad():
        for _ in range(NEW):
            token = sampling.choose(model(ids, padding)[:, -1]).unsqueeze(1)
            ids = torch.cat((ids, token), 1)
            padding = torch.cat((padding, token < 0), 1)
    return ids[:, -NEW:]


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_say_what_whole_calls_say(variant: str) -> None:
    model = small(variant)
    ids, padding = padded(texts(), "left")
    best = by_whole_calls(model, ids, padding, Sampling())
    assert torch.equal(model.generate(ids, NEW, key_padding=padding), torch.cat((ids, best), 1))
    drawn = by_whole_calls(model, ids, padding, Sampling(0.5, generator=torch.Generator().manual_seed(0)))
    assert len(drawn.unique()) > 6
    generator = torch.Generator().manual_seed(0)
    out = model.generate(ids, NEW, key_padding=padding, temperature=0.5, generator=generator)
    assert torch.equal(out, torch.cat((ids, drawn), 1))
    # Texts that end before the batch does, and one without padding.
    ids, padding = padded(texts(), "right")
    assert torch.equal(model.generate(ids, NEW, key_padding=padding), torch.cat((ids, best), 1))
    assert torch.equal(model.generate(texts()[1], NEW)[:, -NEW:], best[1:2])


def test_a_text_ends_at_its_stop_token(mha: CausalLM) -> None:
    ids, padding = padded(texts(), "left")

    def new(rows: slice, stops: list[int]) -> list[list[int]]:
        drawing = {"temperature": 0.5, "generator": torch.Generator().manual_seed(3)}
        out = mha.generate(ids[rows], 12, key_padding=padding[rows], stop_tokens=stops, **drawing)
        return out[:, ids.shape[1] :].tolist()

    every = slice(0, 3)
    free = new(every, [])
    stops = [free[0][3], free[1][1]]
    ends = [next((place for place, token in enumerate(row) if token in stops), 11) for row in free]
    assert min(ends) < max(ends)
    # A text's draws do not depend on what others drew, only on how many rows there are.
    ended = [row[: end + 1] + [row[end]] * (max(ends) - end) for row, end in zip(free, ends, strict=True)]
    assert new(every, stops) == ended
    # Nothing is added once all have ended; stop tokens of the text given end nothing.
    alone = new(slice(0, 1), [])[0]
    stop = next(token for token in alone if token in ids[0].tolist())
    assert new(slice(0, 1), [stop]) == [alone[: alone.index(stop) + 1]]


def test_nothing_to_add_adds_nothing(mha: CausalLM) -> None:
    assert torch.equal(mha.generate(texts()[0], 0), texts()[0])


SCORES = st.lists(st.integers(-6, 6).map(float), min_size=2, max_size=9)


@settings(max_examples=40)
@given(
    scores=SCORES,
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([None, 1, 2, 4, 50]),
    top_p=st.sampled_from([None, 1e-9, 0.31, 0.77, 1.0]),
)
def test_tokens_are_drawn_by_the_formula(
    scores: list[float], temperature: float, top_k: int | None, top_p: float | None
) -> None:
    found = Sampling(temperature, top_k, top_p).probabilities(torch.tensor([scores, scores], dtype=torch.float64))
    expected = plain.probabilities(scores, temperature, top_k, top_p)
    torch.testing.assert_close(found, torch.tensor([expected, expected], dtype=torch.float64))


def test_a_low_temperature_draws_the_best_token() -> None:
    found = Sampling(1e-30).probabilities(torch.tensor([[3.0, 3.5, -1e4]]))
    assert found.tolist() == [[0.0, 1.0, 0.0]]


def test_what_is_drawn_has_these_probabilities() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0]]).expand(20_000, 4)
    sampling = Sampling(1.5, top_k=3, generator=torch.Generator().manual_seed(0))
    share = sampling.choose(logits).bincount(minlength=4) / 20_000
    expected = torch.tensor(plain.probabilities([0.0, 2.0, 1.0, -1.0], 1.5, 3, None))
    # Five standard deviations of a share of 20,000 draws.
    assert (share - expected).abs().max() < 5 * (0.25 / 20_000) ** 0.5
    assert share[3] == 0


def test_a_seed_repeats_a_text(mha: CausalLM) -> None:
    def text(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        out = mha.generate(texts()[1], 12, temperature=0.5, top_p=0.95, generator=generator)
        return out[0].tolist()

    assert text(1) == text(1)
    assert all(a != b for a, b in itertools.combinations([text(1), text(2), text(3)], 2))


def test_a_best_token_alone_is_drawn(mha: CausalLM) -> None:
    best = mha.generate(texts()[1], NEW)
    assert torch.equal(mha.generate(texts()[1], NEW, temperature=0.7, top_k=1), best)
    assert torch.equal(mha.generate(texts()[1], NEW, temperature=0.7, top_p=1e-6), best)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_new_tokens": -1}, ConfigError, "max_new_tokens: "),
        ({"max_new_tokens": 2.0}, ConfigError, "max_new_tokens: "),
        ({"temperature": -0.1}, ConfigError, "temperature: "),
        ({"temperature": float("nan")}, ConfigError, "temperature: "),
        ({"temperature": True}, ConfigError, "temperature: "),
        ({"temperature": 1.0, "top_k": 0}, ConfigError, "top_k: "),
        ({"temperature": 1.0, "top_p": 0.0}, ConfigError, "top_p: "),
        ({"temperature": 1.0, "top_p": 1.5}, ConfigError, "top_p: "),
        ({"top_k": 3}, ConfigError, "top_k: expected a temperature above 0"),
        ({"top_p": 0.5}, ConfigError, "top_p: expected a temperature above 0"),
        ({"stop_tokens": 3}, ConfigError, "stop_tokens: "),
        ({"stop_tokens": [WORDS]}, ConfigError, "stop_tokens: "),
        ({"stop_tokens": "a"}, ConfigError, "stop_tokens: "),
        ({"temperature": 1.0, "generator": 7}, ConfigError, "generator: "),
        ({"ids": torch.zeros(2, 0, dtype=torch.int64)}, ShapeError, "ids: expected a token or more"),
        ({"ids": torch.full((1, 3), WORDS)}, ShapeError, "ids: expected 0 to 22"),
        ({"key_padding": torch.ones(1, 12, dtype=torch.bool)}, ShapeError, "ids: expected a token or more"),
        ({"key_padding": torch.zeros(1, 11, dtype=torch.bool)}, ShapeError, "key_padding: expected"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_happens(
    mha: CausalLM, monkeypatch: pytest.MonkeyPatch, options: dict[str, object], error: type[Exception], message: str
) -> None:
    monkeypatch.setattr(mha, "forward", None)
    with pytest.raises(error, match=message):
        mha.generate(**{"ids": texts()[1], "max_new_tokens": 3, **options})
