"""Edits where a policy rules what is held: the oracle's under its rule, and the laws of plain models under any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnzoo import heads, policies
from attnzoo.heads import HeadEdit, KeyBias
from attnzoo.oracles.heads import effects
from tests.attnzoo.heads.edits.laws.drawn import may_stand_together, output_edits, reading_edits
from tests.attnzoo.heads.edits.laws.truth import decoder_of, near, of_item
from tests.attnzoo.surgery.tiny import WIDTH, ids, tiny

LENGTH = 15
ROUNDED = 1e-6
TOKENS = ids(1, LENGTH)
MODEL = tiny(4, 2)

POLICIES: dict[str, Callable[[], Any]] = {
    "streaming": lambda: policies.Streaming(sink=4, window=4, block=4),
    "tova": lambda: policies.TOVA(budget=8),
    "h2o": lambda: policies.H2O(budget=8),
    "pages": lambda: policies.Pages(page=2, budget=8),
}


def sees_near(head: int, t: int, s: int) -> bool:
    return s // 4 < 1 or t // 4 - s // 4 < 2


DECODER = decoder_of(MODEL, sees_near)


def generated(policy: Any, edits: list[HeadEdit]) -> tuple[list[int], Tensor]:
    with policies.applied(MODEL, policy), heads.edited(MODEL, edits):
        found = MODEL.generate(
            TOKENS, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    return found.sequences[0, LENGTH:].tolist(), torch.cat(found.logits).double()


@settings(max_examples=5)
@given(
    st.lists(reading_edits(WIDTH, 1, LENGTH), min_size=1, max_size=2).filter(may_stand_together),
    output_edits(WIDTH, 1, LENGTH, everywhere=True),
)
def test_what_is_held_by_place_is_edited_as_the_oracle_edits_it(reads: list[HeadEdit], output: HeadEdit) -> None:
    edits = [*reads, output]
    said, rows = effects.generated(TOKENS[0].tolist(), DECODER, of_item(edits, DECODER, 0, range(LENGTH)), 3)
    found, logits = generated(POLICIES["streaming"](), edits)
    assert found == said
    near(logits, rows, ROUNDED)


@pytest.mark.parametrize("name", POLICIES)
def test_laws_of_plain_models_hold_under_a_policy(name: str) -> None:
    make = POLICIES[name]
    plain = generated(make(), [])
    # What changes nothing, and two ways of saying nothing.
    same = generated(make(), [HeadEdit(0, 1, key_bias=KeyBias.emphasise([1], 0.0)), HeadEdit(1, 0)])
    assert torch.equal(same[1], plain[1])
    zero = generated(make(), [HeadEdit(0, [1, 2], ablate="zero")])
    scaled = generated(make(), [HeadEdit(0, [1, 2], scale=0.0)])
    assert torch.equal(zero[1], scaled[1])
    assert not torch.equal(zero[1], plain[1])
    everything = generated(make(), [HeadEdit(1, 2, key_bias=KeyBias.only(range(LENGTH + 3)))])
    near(everything[1], plain[1], ROUNDED)
    # Of a head that sees no key nothing is left.
    nothing = generated(make(), [HeadEdit(1, 2, key_bias=KeyBias.knock_out(None, range(LENGTH + 3)))])
    gone = generated(make(), [HeadEdit(1, 2, ablate="zero")])
    near(nothing[1], gone[1], ROUNDED)


def test_it_does_not_matter_which_context_is_within_which() -> None:
    edits = [HeadEdit(0, 1, key_bias=KeyBias.knock_out(None, [1, 9])), HeadEdit(1, 2, ablate="uniform")]
    expected = generated(POLICIES["streaming"](), edits)
    with heads.edited(MODEL, edits), policies.applied(MODEL, POLICIES["streaming"]()):
        found = MODEL.generate(TOKENS, max_new_tokens=3, do_sample=False)
    assert found[0, LENGTH:].tolist() == expected[0]
    assert generated(POLICIES["streaming"](), [])[0] != expected[0]
