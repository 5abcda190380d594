"""Edits that became weights: the same as hooks, and taken back to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from attnzoo import heads
from attnzoo.heads import HeadEdit, KeyBias
from attnzoo_kernels.errors import ConfigError, ConversionError, UnsupportedError
from tests.attnzoo.surgery.tiny import assert_close, assert_untouched, ids, logits, snapshot, tiny

WIDTH = 16


@pytest.fixture(scope="module")
def gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=61, n_embd=48, n_head=3, n_layer=2, n_positions=32, bos_token_id=1, eos_token_id=2)
    model: Any = GPT2LMHeadModel(config)
    return model.double().eval()


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_a_fold_is_the_hook_and_is_taken_back_to_the_bit(gpt2: Any) -> None:
    torch.manual_seed(1)
    edits = [
        HeadEdit(0, [2, 0], scale=random(2, WIDTH), offset=random(WIDTH)),
        HeadEdit(0, 2, offset=random(WIDTH), scale=-1.5),
        HeadEdit(1, 1, ablate="mean", value=random(WIDTH), scale=2.0),
        HeadEdit(1, 0, ablate="zero"),
    ]
    before = snapshot(gpt2)
    plain = logits(gpt2, ids(2, 9))
    with heads.edited(gpt2, edits):
        expected = logits(gpt2, ids(2, 9))
    report = heads.fold(gpt2, edits)
    assert not any(module._forward_pre_hooks for module in gpt2.modules())
    assert_close(logits(gpt2, ids(2, 9)), expected, 1e-12)
    assert str(report).splitlines()[0].endswith("c_proj: heads 0, 2 and the bias")
    assert float((expected - plain).abs().max()) > 0.1
    report.undo()
    assert_untouched(gpt2, before)
    with pytest.raises(ConversionError, match="taken back before"):
        report.undo()


def test_scales_and_ablations_of_kv_heads_fold_where_there_is_no_bias() -> None:
    model = tiny()
    edits = [HeadEdit(0, 1, scale=random(1, WIDTH), kv=True), HeadEdit(1, slice(None), scale=0.5)]
    with heads.edited(model, edits):
        expected = logits(model, ids(2, 9))
    heads.fold(model, edits)
    assert_close(logits(model, ids(2, 9)), expected, 1e-12)


def test_layers_are_chosen_and_what_is_folded_comes_behind_what_is_edited() -> None:
    model = tiny()
    edits = [HeadEdit(0, 1, scale=3.0), HeadEdit(1, 1, scale=5.0)]
    report = heads.fold(model, edits, where=lambda site: site.layer == 1)
    assert [layer.layer for layer in report.layers] == [1]
    both = [HeadEdit(1, 1, ablate="zero")]
    with heads.edited(model, both):
        expected = logits(model, ids(1, 5))
    report.undo()
    with heads.edited(model, both):
        assert torch.equal(logits(model, ids(1, 5)), expected)


def test_what_cannot_be_folded_is_named_and_nothing_is_changed(gpt2: Any) -> None:
    model = tiny()
    one = torch.ones(WIDTH)
    before = snapshot(model)
    edits = [
        HeadEdit(0, 0, scale=2.0),
        HeadEdit(0, 0, scale=2.0, where="last"),
        HeadEdit(0, 0, ablate="resample", value=torch.ones(1, 2, 1, WIDTH)),
        HeadEdit(0, 0, key_bias=KeyBias.only([0])),
    ]
    with pytest.raises(UnsupportedError, match=r"edits\[1\]: where='last'.*edits\[2\]: its value.*edits\[3\]: it ch"):
        heads.fold(model, edits)
    with pytest.raises(UnsupportedError, match="no bias that could take an offset"):
        heads.fold(model, [HeadEdit(0, 0, scale=2.0), HeadEdit(1, 0, offset=one)])
    with pytest.raises(ConfigError, match="expected one that changes something"):
        heads.fold(model, HeadEdit(0, 0))
    assert_untouched(model, before)


def test_weights_that_are_not_a_projections_own_are_refused() -> None:
    model = tiny()
    first, second = (layer.self_attn for layer in model.model.layers)
    plain = second.o_proj
    second.o_proj = first.o_proj
    with pytest.raises(UnsupportedError, match="got one for"):
        heads.fold(model, HeadEdit(0, 0, scale=2.0))
    second.o_proj = nn.Linear(96, 96, bias=False, dtype=torch.float64)
    second.o_proj.weight = first.o_proj.weight
    with pytest.raises(UnsupportedError, match=r"is that of model.layers.1.self_attn.o_proj.weight too"):
        heads.fold(model, HeadEdit(0, 0, scale=2.0))
    second.o_proj = nn.utils.parametrizations.weight_norm(plain)
    with pytest.raises(UnsupportedError, match="computed from other tensors"):
        heads.fold(model, HeadEdit(1, 0, scale=2.0))


def test_an_undo_that_would_lose_something_is_refused() -> None:
    model = tiny()
    first = heads.fold(model, HeadEdit(0, 0, scale=2.0))
    second = heads.fold(model, HeadEdit(0, 1, scale=2.0))
    with pytest.raises(ConversionError, match="take back what came later first"):
        first.undo()
    second.undo()
