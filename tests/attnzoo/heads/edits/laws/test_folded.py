"""Edits that become part of weights say what the hook says, in every family, and are taken back to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from attnzoo import heads
from attnzoo.heads import HeadEdit, KeyBias
from attnzoo.oracles.heads import effects
from attnzoo_kernels.errors import UnsupportedError
from tests.attnzoo.heads.edits.laws.drawn import normal, output_edits
from tests.attnzoo.heads.edits.laws.models import CALLED, say, shared
from tests.attnzoo.heads.edits.laws.truth import decoder_of, near, of_item, oracle_logits
from tests.attnzoo.surgery.tiny import WIDTH, ids, logits, tiny

EXACT = 1e-12
MODEL = tiny(4, 2, attention_bias=True)
DECODER = decoder_of(MODEL)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in model.state_dict().items()}


def assert_same_bits(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(x, before[name]) for name, x in after.items())


@settings(max_examples=10)
@given(
    st.lists(output_edits(WIDTH, 2, 5, everywhere=True), min_size=1, max_size=3).filter(
        lambda edits: any(edit.writes for edit in edits)
    )
)
@example([HeadEdit(0, 1, offset=normal(WIDTH)), HeadEdit(0, slice(None), scale=-2.0, offset=normal(WIDTH, seed=1))])
def test_weights_are_the_oracles_and_undoing_gives_back_their_bits(edits: list[HeadEdit]) -> None:
    tokens = ids(2, 5)
    before = weights_of(MODEL)
    report = heads.fold(MODEL, edits)
    found = logits(MODEL, tokens)
    # Values that are put there: zeros, and an offset.
    linear = [one for edit in edits for one in of_item([edit], DECODER, 0, range(5))]
    if all(edit.ablate != "value" for edit in linear):
        for name, x in effects.folded(DECODER, linear).items():
            near(MODEL.state_dict()[name], x, EXACT)
    for actual, expected in zip(found, oracle_logits(DECODER, tokens, edits), strict=True):
        near(actual, expected)
    report.undo()
    assert_same_bits(MODEL, before)


def edits_for(name: str) -> list[HeadEdit]:
    sites = heads.sites(shared(name))
    width = sites[0].head_dim
    return [
        HeadEdit(0, 0, scale=normal(width)),
        HeadEdit(sites[-1].layer, sites[-1].heads - 1, ablate="zero"),
        HeadEdit(sites[-1].layer, 0, kv=True, scale=-0.5),
    ]


DIVIDED = {"timm's attention with norms": "norm"}
"""Where what heads give out goes to no product, and a piece of what the refusal says."""


@pytest.mark.parametrize("name", sorted(CALLED.keys() - DIVIDED.keys()))
def test_folded_is_hooked(name: str) -> None:
    model = shared(name)
    edits = edits_for(name)
    offset = HeadEdit(0, 0, offset=normal(heads.sites(model)[0].head_dim, seed=1))
    o_proj: Any = model.get_submodule(heads.sites(model)[0].o_proj)
    before = weights_of(model)
    if o_proj.bias is None:
        with pytest.raises(UnsupportedError, match="has no bias"):
            heads.fold(model, [*edits, offset])
        assert_same_bits(model, before)
    else:
        edits = [*edits, offset]
    plain = say(name)
    with heads.edited(model, edits):
        hooked = say(name)
    report = heads.fold(model, edits)
    folded = say(name)
    report.undo()
    assert_same_bits(model, before)
    assert torch.equal(say(name), plain)
    near(folded, hooked, EXACT * 10)
    assert float((folded - plain).abs().max()) > 1e-4


@pytest.mark.parametrize("name", DIVIDED)
def test_what_goes_to_no_product_cannot_be_folded(name: str) -> None:
    before = weights_of(shared(name))
    with pytest.raises(UnsupportedError, match=DIVIDED[name]):
        heads.fold(shared(name), edits_for(name))
    assert_same_bits(shared(name), before)


REFUSED: dict[str, dict[str, Any]] = {
    "last": {"scale": 2.0, "where": "last"},
    "mask": {"scale": 2.0, "where": torch.ones(1, 5, dtype=torch.bool)},
    "value": {"ablate": "resample", "value": torch.zeros(2, 5, 1, WIDTH)},
    "uniform": {"ablate": "uniform"},
    "key bias": {"key_bias": KeyBias.knock_out(None, [0])},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_folded_is_named_and_nothing_is(name: str) -> None:
    before = weights_of(MODEL)
    with pytest.raises(UnsupportedError, match=r"edits\[1\]"):
        heads.fold(MODEL, [HeadEdit(0, 0, ablate="zero"), HeadEdit(1, 1, **REFUSED[name])])
    assert_same_bits(MODEL, before)
