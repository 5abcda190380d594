"""What is read and asked: spans word for word, the text going on, and numbers in haystacks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnzoo.evaluation.two_phase import tasks
from attnzoo_kernels.errors import ConfigError


def encode(text: str) -> Tensor:
    """A token for each byte."""
    return torch.tensor(list(text.encode()), dtype=torch.int64)


def decode(ids: Tensor) -> str:
    return bytes(ids.tolist()).decode()


TOKENS = torch.randint(97, 123, (600,), generator=torch.Generator().manual_seed(0))


def test_a_text_goes_on_and_its_spans_are_repeated_word_for_word() -> None:
    case = tasks.text_case("words", TOKENS, context=400, encode=encode, continuation=50, spans=3, span=16)
    text = decode(TOKENS)
    assert decode(case.context) == text[:400]
    going_on, *repeated = case.probes
    assert (going_on.kind, decode(going_on.ids)) == ("text", text[400:450])
    assert going_on.scored.tolist() == list(range(1, 50))
    assert [probe.kind for probe in repeated] == ["recall"] * 3
    for probe, start in zip(repeated, (80, 160, 240), strict=True):
        assert decode(probe.ids) == "\n\n" + text[start : start + 16]
        # Of the break and of the cue nothing is scored.
        assert decode(probe.ids[probe.scored]) == text[start + 2 : start + 16]


def test_spans_leave_the_end_of_a_context_to_windows() -> None:
    for count in range(1, 9):
        found = tasks.places(count, 1024)
        assert len(found) == count
        assert found[0] > 0
        assert found[-1] <= 1024 * count / (count + 2)


@pytest.mark.parametrize("depth", [0.0, 0.4, 1.0])
def test_a_passkey_is_told_in_the_haystack_and_asked_for_behind_it(depth: float) -> None:
    case = tasks.passkey_case("one", encode, context=500, key="30417", depth=depth)
    told = decode(case.context)
    assert len(told) == 500
    assert told.startswith(tasks.INTRODUCTION)
    needle = tasks.NEEDLE.format(key="30417")
    assert told.count(needle) == 1
    room = 500 - len(tasks.INTRODUCTION) - len(needle)
    assert told.index(needle) == len(tasks.INTRODUCTION) + int(room * depth)
    without = told.removeprefix(tasks.INTRODUCTION).replace(needle, "")
    assert (tasks.GRASS * 9).startswith(without)
    (probe,) = case.probes
    assert decode(probe.ids) == tasks.QUESTION + " 30417"
    assert decode(probe.ids[probe.scored]) == "30417"


def test_a_passkey_hides_in_another_text_too() -> None:
    case = tasks.passkey_case("one", encode, context=500, key="30417", depth=0.5, haystack=TOKENS)
    without = decode(case.context).removeprefix(tasks.INTRODUCTION).replace(tasks.NEEDLE.format(key="30417"), "")
    assert decode(TOKENS).startswith(without)


def test_all_of_a_key_is_scored_where_its_tokens_tell_no_keys_apart() -> None:
    case = tasks.passkey_case("one", lambda text: encode(text) * 0, context=500, key="30417", depth=0.5)
    assert len(case.probes[0].scored) == len(" 30417")


def test_keys_are_five_digits_and_the_same_for_the_same_seed() -> None:
    assert tasks.keys(5) == tasks.keys(5) != tasks.keys(5, seed=1)
    assert all(len(key) == 5 and key.isdigit() for key in tasks.keys(50))


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"context": 1}, "context: expected an int from 2, got 1"),
    ({"continuation": 1}, "continuation: expected an int from 2, got 1"),
    ({"spans": -1}, "spans: expected an int from 0, got -1"),
    ({"context": 580}, "text: expected 630 tokens, got 600"),
    ({"context": 100, "spans": 6}, "context: expected a span of 64 tokens from 37 on, got 100 tokens"),
    ({"span": 4}, "cue: expected from 1 to 3 of the 4 tokens of a span, got 0"),
]


@pytest.mark.parametrize(("changed", "message"), WRONG)
def test_a_case_that_cannot_be_is_refused(changed: dict[str, Any], message: str) -> None:
    given = {"context": 400, "continuation": 50, "spans": 3, **changed}
    with pytest.raises(ConfigError) as error:
        tasks.text_case("words", TOKENS, encode=encode, **given)
    assert message in str(error.value)


def test_a_haystack_without_room_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"context: expected at least \d+ tokens for a passkey, got 60"):
        tasks.passkey_case("one", encode, context=60, key="30417", depth=0.5)
    with pytest.raises(ConfigError, match=r"haystack: expected \d+ tokens, got 3"):
        tasks.passkey_case("one", encode, context=500, key="30417", depth=0.5, haystack=TOKENS[:3])
