"""Edits of what heads read are the oracle's, under any rule of what is read, padded and token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnzoo import heads
from attnzoo.heads import HeadEdit, KeyBias
from attnzoo.oracles.heads import effects
from attnzoo.oracles.mha import Recipe
from attnzoo.oracles.s2 import S2Pattern, reads
from attnzoo.surgery.edits.key_bias import SinkScaling
from tests.attnzoo.heads.edits.laws.drawn import may_stand_together, output_edits, reading_edits
from tests.attnzoo.heads.edits.laws.truth import assert_items, decoder_of, near, of_item, oracle_logits
from tests.attnzoo.surgery.tiny import WIDTH, assert_untouched, convert, ids, logits, snapshot, tiny

LENGTH = 9
PADDED = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1]])
ROUNDED = 1e-6
RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "all": ("mha", {}),
    "window": ("mha", {"window": 4, "sink": 1, "block_size": 4}),
    "s2": ("s2", {"block_size": 2, "local_blocks": 1, "vert_stride": 2}),
}
SHARED = S2Pattern(block_size=2, local_blocks=1, vert_stride=2, sink_blocks=1)
SIZES = Recipe(num_heads=4, num_kv_heads=2, head_dim=WIDTH)


def sees_window(head: int, t: int, s: int) -> bool:
    return t - s < 4 or s < 1


def sees_shard(head: int, t: int, s: int) -> bool:
    return reads(SHARED, head // 2, t // 2, s // 2, SIZES)


def host(rule: str) -> Any:
    model = tiny(4, 2)
    if rule != "plain":
        variant, options = RULES[rule]
        convert(model, variant, **options)
    return model


HOSTS = {rule: host(rule) for rule in ("plain", *RULES)}
PLAIN = decoder_of(HOSTS["plain"])
DECODERS = {
    "plain": PLAIN,
    "all": PLAIN,
    "window": decoder_of(HOSTS["plain"], sees_window),
    "s2": decoder_of(HOSTS["plain"], sees_shard),
}


def several(batch: int, length: int) -> st.SearchStrategy[list[HeadEdit]]:
    read = reading_edits(WIDTH, batch, length)
    return st.lists(read, min_size=1, max_size=3).filter(may_stand_together)


def test_without_edits_each_rule_is_the_oracles() -> None:
    tokens = ids(2, LENGTH)
    for rule, model in HOSTS.items():
        assert_items(logits(model, tokens), oracle_logits(DECODERS[rule], tokens))


@settings(max_examples=14)
@given(st.sampled_from(sorted(HOSTS)), several(2, LENGTH), st.sampled_from((None, PADDED)))
def test_reads_of_a_call_are_the_oracles(rule: str, edits: list[HeadEdit], mask: Tensor | None) -> None:
    model = HOSTS[rule]
    tokens = ids(2, LENGTH)
    before = snapshot(model)
    with heads.edited(model, edits):
        found = logits(model, tokens, attention_mask=mask)
    assert_untouched(model, before)
    assert_items(found, oracle_logits(DECODERS[rule], tokens, edits, mask), mask)


SINKS = SinkScaling(torch.tensor([1, 4]), 0.3)


@pytest.mark.parametrize("where", ["decode", "prefill"])
def test_calls_of_one_token_are_decoding(where: Any) -> None:
    tokens = ids(1, LENGTH)
    edits = [HeadEdit(0, 1, post=SINKS, where=where), HeadEdit(1, 2, key_bias=KeyBias.only([0, 8, 9]), where=where)]
    said, rows = effects.generated(tokens[0].tolist(), PLAIN, of_item(edits, PLAIN, 0, range(LENGTH)), 3)
    model = HOSTS["plain"]
    with heads.edited(model, edits):
        found = model.generate(
            tokens, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    assert found.sequences[0, LENGTH:].tolist() == said
    near(torch.cat(found.logits).double(), rows, ROUNDED)


@settings(max_examples=6)
@given(st.sampled_from(sorted(HOSTS)), several(1, LENGTH))
def test_generation_with_edited_reads_is_the_oracles(rule: str, edits: list[HeadEdit]) -> None:
    model = HOSTS[rule]
    tokens = ids(1, LENGTH)
    decoder = DECODERS[rule]
    said, rows = effects.generated(tokens[0].tolist(), decoder, of_item(edits, decoder, 0, range(LENGTH)), 3)
    with heads.edited(model, edits):
        found = model.generate(
            tokens, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    assert found.sequences[0, LENGTH:].tolist() == said
    near(torch.cat(found.logits).double(), rows, ROUNDED)


@settings(max_examples=6)
@given(st.sampled_from(sorted(HOSTS)), several(2, LENGTH), output_edits(WIDTH, 2, LENGTH))
def test_an_inner_context_of_outputs_follows_an_outer_one_of_reads(
    rule: str, outer: list[HeadEdit], inner: HeadEdit
) -> None:
    model = HOSTS[rule]
    tokens = ids(2, LENGTH)
    with heads.edited(model, outer), heads.edited(model, inner):
        found = logits(model, tokens)
    assert_items(found, oracle_logits(DECODERS[rule], tokens, [*outer, inner]))
