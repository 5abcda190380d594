"""Quantised and adapted projections in converted models: in which order, and what is refused."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnzoo
from attnzoo import heads, policies, surgery
from tests.attnzoo.surgery.tiny import READING, calibration, convert, ids, logits, tiny

TOKENS = 24
REPLACED: dict[str, tuple[str, dict[str, Any]]] = {
    "moh": ("moh", {}),
    "landmark": ("landmark", {"block_size": 8}),
    "rcmha": ("rcmha", {}),
    "latent": (
        "lowrank_gqa",
        {"method": "latent", "latent_dim": 40, "calibration": calibration(1), "gradients": False},
    ),
    "longheads": ("longheads", {"attention_length": 32, "chunk_size": 8}),
    "expand": ("lowrank_gqa", {"method": "expand", "num_kv_heads": 6}),
}


def by_torch(model: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8, inplace=True)


def by_torchao(model: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("torchao")
        quantization = importlib.import_module("torchao.quantization")
        quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())


QUANTISERS: dict[str, Callable[[Any], None]] = {"torch.ao": by_torch, "torchao": by_torchao}


def error(found: Tensor, truth: Tensor) -> float:
    assert bool(found.isfinite().all())
    return float((found - truth).norm() / truth.norm())


@pytest.mark.parametrize("quantiser", QUANTISERS)
@pytest.mark.parametrize("kind", READING)
def test_what_is_read_is_the_same_before_and_after_quantising(kind: str, quantiser: str) -> None:
    variant, options = READING[kind]
    tokens = ids(2, TOKENS)
    before, after = (tiny(layers=1, dtype=torch.float32) for _ in range(2))
    QUANTISERS[quantiser](before)
    convert(before, variant, **options)
    convert(after, variant, **options)
    QUANTISERS[quantiser](after)
    assert torch.equal(logits(before, tokens), logits(after, tokens))


@pytest.mark.parametrize("quantiser", QUANTISERS)
@pytest.mark.parametrize("kind", REPLACED)
def test_a_converted_model_may_be_quantised_and_a_quantised_one_is_refused(kind: str, quantiser: str) -> None:
    variant, options = REPLACED[kind]
    tokens = ids(2, TOKENS)
    host, model = (tiny(layers=1, dtype=torch.float32) for _ in range(2))
    truth = logits(host, tokens)
    QUANTISERS[quantiser](host)
    theirs = error(logits(host, tokens), truth)
    convert(model, variant, **options)
    exact = logits(model, tokens)
    QUANTISERS[quantiser](model)
    ours = error(logits(model, tokens), exact)
    # It is quantised at all, and no worse than the host.
    assert 0 < ours <= 3 * theirs
    with pytest.raises(attnzoo.UnsupportedError, match=r"expected an nn\.Linear with a plain floating weight"):
        convert(host, variant, **options)


def test_policies_and_edits_of_heads_need_no_weights_and_folds_do() -> None:
    model = tiny(layers=1, dtype=torch.float32)
    by_torch(model)
    tokens = ids(1, 60)
    whole = logits(model, tokens)
    with heads.edited(model, heads.HeadEdit(0, 1, ablate="zero")):
        assert not torch.equal(logits(model, tokens), whole)
    with policies.applied(model, policies.Streaming(sink=8, window=16, block=8)) as run:
        cache = run.new_cache()
        said = logits(model, tokens, past_key_values=cache)
        assert bool(said.isfinite().all())
        assert not torch.equal(said, whole)
    assert torch.equal(logits(model, tokens), whole)
    with pytest.raises(attnzoo.UnsupportedError, match=r"^edits: cannot be folded: .*torch.ao.nn.quantized"):
        heads.fold(model, heads.HeadEdit(0, 1, scale=2.0))


def test_quantised_models_are_not_saved_and_what_was_put_in_is_not_undone(tmp_path: Any) -> None:
    model = tiny(layers=1, dtype=torch.float32)
    report = convert(model, "moh")
    by_torch(model)
    with pytest.raises(attnzoo.ConversionError):
        surgery.save(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    with pytest.raises(attnzoo.ConversionError, match=r"^undo: .*torch.ao.nn.quantized.dynamic.*would be lost"):
        report.undo()


@pytest.mark.parametrize("kind", ["moh", "latent", "window"])
def test_adapters_of_peft_train_converted_blocks_and_are_merged(kind: str, tmp_path: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft: Any = pytest.importorskip("peft")
        model = tiny(layers=1, dtype=torch.float32)
        variant, options = {**REPLACED, **READING}[kind]
        convert(model, variant, **options)
        tokens = ids(2, TOKENS)
        exact = logits(model, tokens)
        names = ["q_proj", "o_proj"]
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=names, task_type="CAUSAL_LM"))
        assert torch.equal(logits(adapted, tokens), exact)
        adapted(input_ids=tokens, labels=tokens).loss.backward()
        grads = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
        assert all("lora" in name and grad is not None for name, grad in grads.items())
        # One of each pair starts at zero; the other's gradient is not.
        assert sum(float(grad.abs().sum()) > 0 for grad in grads.values() if grad is not None) == len(names)
        merged = adapted.merge_and_unload()
        surgery.save(merged, tmp_path / "folder")
        again, _ = surgery.load(tmp_path / "folder")
    assert torch.equal(logits(again, tokens), logits(merged, tokens))
