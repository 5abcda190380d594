"""Sinks and their calibration, and attention that goes far: against all weights written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from attnzoo import heads
from attnzoo.heads import act
from attnzoo.heads.scores import far_mass
from attnzoo_kernels.errors import ConfigError
from tests.attnzoo.surgery.tiny import assert_untouched, ids, snapshot, tiny

TOKENS = 20


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny()


def patterns(model: Any, tokens: Tensor) -> Tensor:
    """The weights of all layers ``[L, B, T, H, S]``."""
    with heads.capture(model, ("pattern",)) as seen, torch.no_grad():
        model(tokens, use_cache=False)
    return torch.stack([seen["pattern"][layer] for layer in range(2)])


def test_a_sink_receives_more_than_its_share_and_the_first_one_is_spared(model: Any) -> None:
    before = snapshot(model)
    tokens = ids(2, TOKENS)
    found = act.find_sinks(model, tokens, threshold=1.5)
    expected = patterns(model, tokens).sum(2).permute(0, 2, 1, 3)  # [L, H, B, S]
    torch.testing.assert_close(found.mass, expected)
    torch.testing.assert_close(found.mass.mean(-1), torch.ones(2, 6, 2, dtype=torch.float64))
    assert torch.equal(found.tokens, expected > 1.5)
    rest = found.behind_first
    assert bool(rest.any())
    first = (found.tokens & ~rest).sum(-1)
    assert torch.equal(first, found.tokens.any(-1).long())
    assert bool((found.tokens.int().argmax(-1) <= torch.where(rest, torch.arange(TOKENS), TOKENS).amin(-1)).all())
    assert_untouched(model, before)


def test_padding_is_no_sink(model: Any) -> None:
    tokens = ids(2, TOKENS)
    mask = torch.ones(2, TOKENS, dtype=torch.int64)
    mask[1, :6] = 0
    padded = act.find_sinks(model, tokens, attention_mask=mask).mass[:, :, 1]
    alone = act.find_sinks(model, tokens[1:, 6:]).mass[:, :, 0]
    torch.testing.assert_close(padded[..., :-6], alone)
    assert bool((padded[..., -6:] == 0).all())


@torch.no_grad()
def test_calibration_is_the_same_in_a_prompt_and_in_decoding_and_rows_sum_to_one(model: Any) -> None:
    tokens = ids(2, TOKENS)
    sinks = act.find_sinks(model, tokens[:, :12], threshold=1.5)
    edits = act.calibrate(sinks, 0.4)
    assert {(edit.layer, edit.head) for edit in edits} == {
        (layer, head) for layer in range(2) for head in range(6) if bool(sinks.behind_first[layer, head].any())
    }
    plain = model(tokens, use_cache=False).logits
    with heads.edited(model, edits):
        whole = model(tokens, use_cache=False).logits
        cache = DynamicCache(config=model.config)
        parts = [model(part, past_key_values=cache).logits for part in tokens.split([12, *[1] * 8], 1)]
        pattern = patterns(model, tokens)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(pattern.sum(-1), torch.ones_like(pattern[..., 0]))
    assert float((whole - plain).abs().max()) > 1e-3
    # Of the first layer's attention to sinks there is left what was said.
    reached = sinks.behind_first[0].permute(1, 0, 2).unsqueeze(1)  # [B, 1, H, S]
    with_sinks = (patterns(model, tokens)[0][..., :12] * reached).sum(-1)
    left = (pattern[0][..., :12] * reached).sum(-1)
    torch.testing.assert_close(left, with_sinks * 0.4)


def test_a_share_of_one_changes_nothing_to_the_bit(model: Any) -> None:
    tokens = ids(2, TOKENS)
    plain = model(tokens).logits
    before = snapshot(model)
    with heads.edited(model, act.calibrate(act.find_sinks(model, tokens, threshold=1.5), 1.0)):
        assert torch.equal(model(tokens).logits, plain)
        assert_untouched(model, before)


def test_heads_are_those_that_are_named(model: Any) -> None:
    sinks = act.find_sinks(model, ids(2, TOKENS), threshold=1.1)
    edits = act.calibrate(sinks, 0.5, heads=[(1, 4)], where="prefill")
    assert [(edit.layer, edit.head, edit.where) for edit in edits] == [(1, 4, "prefill")]
    with pytest.raises(ConfigError, match="heads: expected layers below 2"):
        act.calibrate(sinks, 0.5, heads=[(2, 0)])
    with pytest.raises(ConfigError, match="beta: expected a number from 0 to 1"):
        act.calibrate(sinks, 1.5)
    with pytest.raises(ConfigError, match="threshold: expected more than 0"):
        act.find_sinks(model, ids(1, 4), threshold=0)


def test_far_is_what_neither_sink_nor_window_holds(model: Any) -> None:
    texts = [ids(2, TOKENS), ids(1, 11)]
    found = far_mass(model, texts, sink=2, window=5)
    total = torch.zeros(2, 6, dtype=torch.float64)
    rows = 0
    for text in texts:
        pattern = patterns(model, text)
        row = torch.arange(text.shape[1])[:, None]
        slot = torch.arange(text.shape[1])
        near = (slot < 2) | (slot > row - 5)
        far = 1 - (pattern * near[:, None]).sum(-1)  # [L, B, T, H]
        total += far[:, :, 7:].sum((1, 2))
        rows += text.shape[0] * (text.shape[1] - 7)
    torch.testing.assert_close(found["far_mass"], total / rows)
    with pytest.raises(ConfigError, match="texts: expected ids"):
        far_mass(model, [ids(1, 7)], sink=2, window=5)
