"""RCMHA in the place of a pretrained model's blocks: the same function at first, then whatever training makes of it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import attnzoo
from attnzoo import surgery
from tests.attnzoo.surgery.hosts.masks import padding_mask
from tests.attnzoo.surgery.tiny import assert_close, assert_untouched, ids, logits, snapshot, tiny

EXACT = 1e-11
SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "before the projections": {"conv_pos": "pre_proj", "conv_size": 5},
    "learned": {"rel": "learned", "max_distance": 6},
    "convolutions alone": {"rel": None, "conv_share": "across_heads"},
    "distances alone": {"conv_on": (), "rel_dim": 8},
}


def stirred(model: Any) -> Any:
    """A replaced model after something like training: every new part is far from nothing."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".conv." in name or ".rel_" in name:
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("padding", [[0, 0], [0, 11]])
def test_a_replaced_model_begins_as_its_host(name: str, bias: bool, padding: list[int]) -> None:
    model, tokens, mask = tiny(attention_bias=bias), ids(2, 30), padding_mask(padding, 30)
    before, expected = snapshot(model), logits(model, tokens, attention_mask=mask)[mask.bool()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = surgery.convert(model, "rcmha", **SETTINGS[name])
    assert_close(logits(model, tokens, attention_mask=mask)[mask.bool()], expected, EXACT)
    stirred(model)
    changed = logits(model, tokens, attention_mask=mask)[mask.bool()]
    assert float((changed - expected).abs().max()) > 1e-2
    report.undo()
    assert_untouched(model, before)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_changed_model_generates_as_it_reads(name: str) -> None:
    """Through the host's cache, with a prompt of each length: token by token is the whole text at once."""
    model, tokens, mask = tiny(), ids(2, 12), padding_mask([0, 5], 12)
    surgery.convert(model, "rcmha", **SETTINGS[name])
    stirred(model)
    said = model.generate(tokens * mask, attention_mask=mask, max_new_tokens=70, do_sample=False, pad_token_id=0)
    seen = torch.cat([mask, torch.ones(2, 70, dtype=torch.long)], 1)
    whole = logits(model, said, attention_mask=seen, use_cache=False)
    assert whole[:, 11:-1].argmax(-1).tolist() == said[:, 12:].tolist()
    beams = model.generate(tokens * mask, attention_mask=mask, max_new_tokens=9, num_beams=3, pad_token_id=0)
    assert beams.shape == (2, 21)


def test_the_hosts_cache_is_cut_back_and_goes_on() -> None:
    model, tokens = tiny(), ids(2, 40)
    surgery.convert(model, "rcmha")
    stirred(model)
    cache = DynamicCache(config=model.config)
    logits(model, torch.cat([tokens[:, :25], ids(2, 9, seed=4)], 1), past_key_values=cache)
    cache.crop(-9)
    assert_close(logits(model, tokens[:, 25:], past_key_values=cache), logits(model, tokens)[:, 25:], EXACT)


def test_a_replaced_model_is_trained_saved_and_loaded(tmp_path: Path) -> None:
    model, tokens = tiny(dtype=torch.float32).train(), ids(2, 30)
    surgery.convert(model, "rcmha")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    losses = []
    for _ in range(4):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    replacement = model.model.layers[0].self_attn.layer
    for parameter in (replacement.conv["q"].weight, replacement.rel_proj, replacement.rel_u):
        assert float(parameter.detach().abs().max()) > 0
    model.eval()
    loaded, _ = surgery.load(surgery.save(model, tmp_path / "model"))
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))


def test_other_starts_are_warned_about_and_other_fields_refused() -> None:
    for options in ({"conv_init": "uniform"}, {"rel_init": "xavier"}):
        with pytest.warns(UserWarning, match="rcmha: not the host's function at first"):
            surgery.convert(tiny(), "rcmha", **options)
    model = tiny()
    before = snapshot(model)
    for options, match in (({"rotary": None}, "rotary"), ({"conv_size": 0}, "conv_size"), ({"colour": 1}, "colour")):
        with pytest.raises(attnzoo.ConfigError, match=match):
            surgery.convert(model, "rcmha", **options)
    assert_untouched(model, before)
    surgery.convert(model, "rcmha")
    with pytest.raises(attnzoo.UnsupportedError, match=r"^position_ids: "):
        logits(model, ids(1, 8), position_ids=2 * torch.arange(8).unsqueeze(0))
