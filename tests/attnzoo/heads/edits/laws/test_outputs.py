"""Edits of heads' outputs are the oracle's: their order, their rows, whose they are, under any attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnzoo import heads, surgery
from attnzoo.heads import HeadEdit
from attnzoo.oracles.heads import effects
from tests.attnzoo.heads.edits.laws.drawn import normal, output_edits
from tests.attnzoo.heads.edits.laws.truth import assert_items, decoder_of, near, of_item, oracle_logits
from tests.attnzoo.surgery.tiny import WIDTH, assert_untouched, ids, logits, replace_mha, snapshot, tiny

LENGTH = 6
ROUNDED = 1e-6
"""Of logits that ``generate`` gives out, in fp32."""
PADDED = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
PADDED_BEHIND = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]])


def host(kind: str) -> Any:
    model = tiny(4, 2)
    if kind == "attnzoo":
        surgery.convert(model, "mha")
    elif kind == "replaced":
        replace_mha(model)
    else:
        model.set_attn_implementation(kind)
    return model


HOSTS = {kind: host(kind) for kind in ("sdpa", "attnzoo", "replaced")}
DECODER = decoder_of(HOSTS["sdpa"])


@settings(max_examples=15)
@given(
    st.sampled_from(sorted(HOSTS)),
    st.lists(output_edits(WIDTH, 2, LENGTH), min_size=1, max_size=3),
    st.sampled_from((None, PADDED, PADDED_BEHIND)),
)
@example("sdpa", [HeadEdit(0, [1, 3], ablate="mean", value=normal(2, WIDTH), where="last")], PADDED_BEHIND)
@example("sdpa", [HeadEdit(1, 1, scale=-2.0, offset=normal(WIDTH), kv=True)], None)
def test_edits_of_a_call_are_the_oracles(kind: str, edits: list[HeadEdit], mask: Tensor | None) -> None:
    model = HOSTS[kind]
    tokens = ids(2, LENGTH)
    with heads.edited(model, edits):
        found = logits(model, tokens, attention_mask=mask)
    assert_items(found, oracle_logits(DECODER, tokens, edits, mask), mask)


@settings(max_examples=6)
@given(
    st.sampled_from(sorted(HOSTS)),
    st.lists(
        output_edits(WIDTH, 1, LENGTH).filter(lambda edit: edit.value is None or edit.value.dim() < 4),
        min_size=1,
        max_size=2,
    ),
)
def test_generation_with_edits_is_the_oracles_token_by_token(kind: str, edits: list[HeadEdit]) -> None:
    model = HOSTS[kind]
    tokens = ids(1, LENGTH)
    said, rows = effects.generated(tokens[0].tolist(), DECODER, of_item(edits, DECODER, 0, range(LENGTH)), 3)
    with heads.edited(model, edits):
        found = model.generate(
            tokens, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    assert found.sequences[0, LENGTH:].tolist() == said
    near(torch.cat(found.logits).double(), rows, ROUNDED)


@pytest.mark.parametrize("where", ["decode", "prefill", "last"])
def test_rows_of_generation_are_those_of_its_calls(where: Any) -> None:
    # Padding on the left, and calls of one token behind one of several.
    model = HOSTS["sdpa"]
    edit = HeadEdit(0, [1, 2], scale=normal(2, WIDTH), offset=normal(WIDTH), where=where)
    tokens = ids(2, LENGTH)
    with heads.edited(model, edit):
        found = model.generate(
            tokens,
            attention_mask=PADDED,
            max_new_tokens=3,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    for item, mask in enumerate(PADDED.bool()):
        own = tokens[item, mask].tolist()
        said, rows = effects.generated(own, DECODER, of_item([edit], DECODER, item, range(len(own))), 3)
        assert found.sequences[item, LENGTH:].tolist() == said
        near(torch.stack([x[item] for x in found.logits]).double(), rows, ROUNDED)


@settings(max_examples=6)
@given(*[st.lists(output_edits(WIDTH, 2, LENGTH), min_size=1, max_size=2)] * 2)
@example([HeadEdit(0, 1, offset=normal(WIDTH))], [HeadEdit(0, 1, scale=-2.0)])
def test_contexts_in_each_other_are_one_list(outer: list[HeadEdit], inner: list[HeadEdit]) -> None:
    model = HOSTS["sdpa"]
    tokens = ids(2, LENGTH)
    before = snapshot(model)
    with heads.edited(model, outer):
        with heads.edited(model, inner):
            both = logits(model, tokens)
        alone = logits(model, tokens)
    assert_untouched(model, before)
    assert_items(both, oracle_logits(DECODER, tokens, [*outer, *inner]))
    assert_items(alone, oracle_logits(DECODER, tokens, outer))


def test_gradients_reach_offsets_and_scales_and_nothing_else() -> None:
    model = HOSTS["sdpa"]
    tokens = ids(2, LENGTH)
    scale, offset = normal(2, WIDTH).requires_grad_(), normal(WIDTH, seed=1).requires_grad_()
    edits = [HeadEdit(0, [0, 3], scale=scale, offset=offset), HeadEdit(1, 1, kv=True, scale=scale[0])]
    truth = sum(rows[-1, 5] for rows in oracle_logits(DECODER, tokens, edits))
    assert isinstance(truth, Tensor)
    expected = torch.autograd.grad(truth, [scale, offset])
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    try:
        with heads.edited(model, edits):
            found = torch.autograd.grad(model(tokens).logits[:, -1, 5].sum(), [scale, offset])
        assert all(parameter.grad is None for parameter in model.parameters())
    finally:
        for parameter in model.parameters():
            parameter.requires_grad_(True)
    for one, other in zip(found, expected, strict=True):
        near(one, other)
