"""Models other than causal ones: loaded by their own class, saved whole, and converted on the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DeiTConfig,
    DeiTForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from attnzoo import surgery
from attnzoo.cli import main
from attnzoo.surgery.hosts.checkpoint import load_checkpoint
from attnzoo_kernels.errors import ConversionError
from tests.attnzoo.surgery.tiny import ids

SIZES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip
TEXT: dict[str, Any] = {"vocab_size": 64, "max_position_embeddings": 32}
IMAGE: dict[str, Any] = {"image_size": 8, "patch_size": 4}

CLASSES: dict[str, Callable[[], Any]] = {
    "masked words": lambda: BertForMaskedLM(BertConfig(**SIZES, **TEXT)),
    "classes of texts": lambda: BertForSequenceClassification(BertConfig(**SIZES, **TEXT, num_labels=3)),
    "no head": lambda: BertModel(BertConfig(**SIZES, **TEXT)),
    "classes of images": lambda: ViTForImageClassification(ViTConfig(**SIZES, **IMAGE, num_labels=3)),
    "images, no head": lambda: ViTModel(ViTConfig(**SIZES, **IMAGE)),
    "distilled": lambda: DeiTForImageClassification(DeiTConfig(**SIZES, **IMAGE)),
}


def build(name: str) -> Any:
    """A model with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CLASSES[name]().eval()


def said(model: Any) -> torch.Tensor:
    """The first of a model's outputs on some input."""
    with torch.no_grad():
        if model.main_input_name == "pixel_values":
            found: torch.Tensor = model(torch.linspace(-1, 1, 3 * 8 * 8).view(1, 3, 8, 8))[0]
        else:
            found = model(ids(2, 12) % 64)[0]
    return found


@pytest.mark.parametrize("name", CLASSES)
def test_a_model_is_loaded_by_its_own_class_and_saved_whole(name: str, tmp_path: Path) -> None:
    model = build(name)
    # transformers may store other names than a class has now.
    model.save_pretrained(tmp_path / "plain")
    loaded, tokenizer = load_checkpoint(tmp_path / "plain")
    assert type(loaded) is type(model)
    assert tokenizer is None
    assert torch.equal(said(loaded), said(model))
    surgery.convert(loaded, "mha", window=4, sink=1)
    surgery.save(loaded, tmp_path / "converted")
    again, _ = surgery.load(tmp_path / "converted")
    assert type(again) is type(model)
    assert torch.equal(said(again), said(loaded))
    assert not torch.equal(said(again), said(model))


@pytest.mark.parametrize("name", ["masked words", "classes of images"])
@pytest.mark.parametrize("way", ["--whole", "--by-layers"])
def test_the_command_line_converts_it(name: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name)
    model.save_pretrained(tmp_path / "plain")
    out = tmp_path / "converted"
    method = "lowrank_gqa:method=mean,num_kv_heads=1"
    given = ["convert", str(tmp_path / "plain"), "--to", method, "--out", str(out), way]
    monkeypatch.setattr(sys, "argv", ["attnzoo", *given])
    with pytest.raises(SystemExit) as ended, pytest.warns(UserWarning, match="baseline"):
        main()
    assert ended.value.code in (0, None)
    converted, _ = surgery.load(out)
    assert type(converted) is type(model)
    with pytest.warns(UserWarning, match="baseline"):
        surgery.convert(model, "lowrank_gqa", method="mean", num_kv_heads=1)
    assert torch.equal(said(converted), said(model))


def test_a_class_of_another_configuration_is_not_believed(tmp_path: Path) -> None:
    build("no head").save_pretrained(tmp_path / "plain")
    file = tmp_path / "plain" / "config.json"
    file.write_text(file.read_text().replace("BertModel", "ViTModel"))
    with pytest.raises(ConversionError):
        load_checkpoint(tmp_path / "plain")
