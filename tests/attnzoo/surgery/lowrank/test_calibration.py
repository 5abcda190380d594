"""What may be handed in for calibration, and where a conversion may be called."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnzoo
from attnzoo import surgery
from tests.attnzoo.surgery.tiny import assert_untouched, calibration, convert, ids, logits, snapshot, tiny

METHODS: tuple[dict[str, Any], ...] = (
    {"method": "latent", "latent_dim": 20},
    {"method": "commuting", "num_kv_heads": 1},
    {"method": "commuting", "num_kv_heads": 1, "refit": False},
)


def same_weights(here: Any, there: Any) -> bool:
    other = there.state_dict()
    return all(torch.equal(x, other[name]) for name, x in here.state_dict().items())


@pytest.mark.parametrize("options", METHODS, ids=str)
def test_a_generator_of_batches_is_read_once_and_is_enough(options: dict[str, Any]) -> None:
    here, there = tiny(), tiny()
    convert(here, "lowrank_gqa", calibration=iter(calibration()), **options)
    convert(there, "lowrank_gqa", calibration=calibration(), **options)
    assert same_weights(here, there)


@pytest.mark.parametrize("options", METHODS, ids=str)
def test_mappings_with_labels_and_plain_ids_give_the_same_weights(options: dict[str, Any]) -> None:
    here, there = tiny(), tiny()
    batches = [{"input_ids": x, "labels": x} for x in calibration()]
    convert(here, "lowrank_gqa", calibration=batches, **options)
    convert(there, "lowrank_gqa", calibration=calibration(), **options)
    assert same_weights(here, there)


def test_what_calibration_cannot_use_is_refused_and_does_not_vanish() -> None:
    model, x = tiny(), calibration()[0]
    latent = {"method": "latent", "latent_dim": 20}
    with pytest.raises(ValueError, match="calibration: expected tensors, got list as 'attention_mask'"):
        convert(model, "lowrank_gqa", calibration=[{"input_ids": x, "attention_mask": [[1]]}], **latent)
    batch = {"input_ids": x, "position_ids": torch.arange(x.shape[1]).expand_as(x)}
    with pytest.raises(ValueError, match=r"calibration: .* alone with refit, got 'position_ids'"):
        convert(model, "lowrank_gqa", calibration=[batch], method="commuting", num_kv_heads=1)
    with pytest.raises(ValueError, match="refit: expected a bool, got 'no'"):
        convert(model, "lowrank_gqa", calibration=[x], method="commuting", num_kv_heads=1, refit="no")


@pytest.mark.parametrize("options", METHODS, ids=str)
def test_statistics_with_gradients_are_used_without_them_when_asked_to(options: dict[str, Any]) -> None:
    here, there = tiny(), tiny()
    statistics = surgery.collect(here, surgery.find(here), calibration())
    convert(here, "lowrank_gqa", calibration=statistics, gradients=False, **options)
    convert(there, "lowrank_gqa", calibration=calibration(), gradients=False, **options)
    tokens = ids(2, 20)
    assert float((logits(here, tokens) - logits(there, tokens)).abs().max()) < 1e-3


@pytest.mark.parametrize("options", METHODS, ids=str)
@pytest.mark.parametrize(
    "other", [{"layers": 3}, {"heads": 9, "kv_heads": 3}, {"kv_heads": 3}, {"attention_bias": True}], ids=str
)
def test_statistics_of_another_model_are_refused(other: dict[str, Any], options: dict[str, Any]) -> None:
    first, model = tiny(), tiny(**other)
    statistics = surgery.collect(first, surgery.find(first), calibration())
    before = snapshot(model)
    with pytest.raises(attnzoo.ConfigError, match=r"^calibration: "):
        convert(model, "lowrank_gqa", calibration=statistics, **options)
    assert_untouched(model, before)


@pytest.mark.parametrize("mask", [torch.ones(2, 5), torch.zeros(2, 8), torch.ones(3, 8), torch.ones(8)])
def test_a_mask_of_another_shape_or_without_a_real_token_is_refused(mask: torch.Tensor) -> None:
    model = tiny()
    before = snapshot(model)
    batch = {"input_ids": ids(2, 8), "attention_mask": mask.long()}
    with pytest.raises(attnzoo.ConfigError, match=r"^calibration: "):
        convert(model, "lowrank_gqa", method="latent", latent_dim=20, calibration=[batch])
    assert_untouched(model, before)


@pytest.mark.parametrize("options", [*METHODS, {"method": "expand", "num_kv_heads": 6}], ids=str)
@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_a_conversion_without_gradients_around_it_can_be_trained_afterwards(mode: str, options: dict[str, Any]) -> None:
    model, tokens = tiny(), ids(2, 20)
    text = None if options["method"] == "expand" else calibration()
    with getattr(torch, mode)():
        convert(model, "lowrank_gqa", calibration=text, **options)
    model.train()(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def share_a_block(model: Any) -> Any:
    """The third layer applies the first one's block too."""
    model.model.layers[2].self_attn = model.model.layers[0].self_attn
    return model


@pytest.mark.parametrize("method", ["mean", "expand"])
def test_a_block_that_is_applied_twice_is_converted_in_both_places(method: str) -> None:
    model, tokens = share_a_block(tiny(layers=3)), ids(2, 20)
    layers = model.model.layers
    before, said = snapshot(model), logits(model, tokens, use_cache=False)
    report = convert(model, "lowrank_gqa", method=method, num_kv_heads=1 if method == "mean" else 6)
    assert layers[2].self_attn is layers[0].self_attn
    if method == "expand":
        assert float((logits(model, tokens, use_cache=False) - said).abs().max()) < 1e-11
    report.undo()
    assert layers[2].self_attn is layers[0].self_attn
    assert_untouched(model, before)
    assert torch.equal(logits(model, tokens, use_cache=False), said)


@pytest.mark.parametrize("options", METHODS, ids=str)
def test_a_block_that_is_applied_twice_is_not_calibrated_as_if_it_saw_one_text(options: dict[str, Any]) -> None:
    model = share_a_block(tiny(layers=3))
    before = snapshot(model)
    with pytest.raises(attnzoo.UnsupportedError, match=r"layers\.2") as caught:
        convert(model, "lowrank_gqa", calibration=calibration(), **options)
    assert "layers.0" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert_untouched(model, before)
