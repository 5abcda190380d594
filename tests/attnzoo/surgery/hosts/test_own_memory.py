"""Converted blocks: weights of their own, and the host's own scale."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnzoo_kernels.errors import ShapeError
from tests.attnzoo.surgery.tiny import READING, assert_close, calibration, convert, ids, logits, replace_mha, tiny

CHANGES: dict[str, dict[str, Any]] = {
    "expand": {"method": "expand", "num_kv_heads": 6},
    "mean": {"method": "mean", "num_kv_heads": 1},
    "latent": {"method": "latent", "latent_dim": 20, "calibration": calibration()},
}


@pytest.mark.parametrize("name", CHANGES)
def test_training_a_converted_block_leaves_the_one_before_alone(name: str) -> None:
    model = tiny()
    blocks = [layer.self_attn for layer in model.model.layers]
    before = {i: {key: x.clone() for key, x in block.state_dict().items()} for i, block in enumerate(blocks)}
    report = convert(model, "lowrank_gqa", **CHANGES[name])
    with torch.no_grad():
        for layer in model.model.layers:
            for parameter in layer.self_attn.parameters():
                parameter.add_(1.0)
    report.undo()
    for i, layer in enumerate(model.model.layers):
        assert layer.self_attn is blocks[i]
        assert all(torch.equal(x, before[i][key]) for key, x in layer.self_attn.state_dict().items())


@pytest.mark.parametrize("kind", [*READING, "latent"])
def test_a_hosts_own_scale_stays(kind: str) -> None:
    """A window as long as the text and a latent of full rank are the host's function, at whatever scale."""
    model, tokens = tiny(), ids(2, 12)
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.7
    expected = logits(model, tokens)
    wide = {"mha": ("mha", {}), "window": ("mha", {"window": 40, "sink": 1}), "s2": ("s2", {"vert_stride": 1})}
    if kind == "latent":
        convert(model, "lowrank_gqa", method="latent", latent_dim=64, calibration=calibration())
    else:
        variant, options = wide[kind]
        convert(model, variant, **options)
    assert_close(logits(model, tokens), expected, 1e-9)


def test_undoing_a_second_rule_brings_the_first_back() -> None:
    model, tokens = tiny(), ids(2, 24)
    dense = logits(model, tokens)
    first = convert(model, *READING["window"][:1], **READING["window"][1])
    windowed = logits(model, tokens)
    second = convert(model, *READING["s2"][:1], **READING["s2"][1])
    assert not torch.equal(logits(model, tokens), windowed)
    second.undo()
    assert torch.equal(logits(model, tokens), windowed)
    first.undo()
    assert torch.equal(logits(model, tokens), dense)


def test_a_conversion_of_some_blocks_says_nothing_about_all() -> None:
    model = tiny()
    convert(model, "lowrank_gqa", method="mean", num_kv_heads=1, where=lambda site: site.layer == 0)
    assert model.config.num_key_value_heads == 2
    convert(model, "lowrank_gqa", method="mean", num_kv_heads=1, where=lambda site: site.layer == 1)
    assert model.config.num_key_value_heads == 1


@pytest.mark.parametrize("trainable", [True, False])
def test_new_landmarks_are_as_trainable_as_the_embeddings(trainable: bool) -> None:
    model = tiny().requires_grad_(trainable)
    convert(model, "landmark", block_size=8)
    assert model.model.landmark_tokens.embedding.requires_grad == trainable


def test_keys_of_a_model_without_replacements_are_not_thrown_away() -> None:
    dense, replaced, tokens = tiny(), tiny(), ids(1, 12)
    with torch.no_grad():
        cache = dense(tokens, use_cache=True).past_key_values
        replace_mha(replaced)
        with pytest.raises(ShapeError, match="empty cache"):
            replaced(tokens[:, -1:], past_key_values=cache)
    assert cache.get_seq_length() == 12
