"""Saving and loading converted models, and what happens when a write or a load goes wrong."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

import attnzoo
from attnzoo import surgery
from tests.attnzoo.surgery.tiny import (
    KINDS,
    assert_untouched,
    calibration,
    convert,
    converted,
    ids,
    logits,
    snapshot,
    tiny,
)

RECIPE = "attnzoo_config.json"
HOST: dict[str, Any] = {"dtype": torch.float32}
"""fp32: an fp64 host here has norms of its own, which a loaded one has not."""


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def rewrite(folder: Path, **changes: Any) -> None:
    about = json.loads((folder / RECIPE).read_text())
    (folder / RECIPE).write_text(json.dumps({**about, **changes}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("more", [{}, {"attention_bias": True}, {"tie_word_embeddings": True}])
def test_a_saved_model_says_the_same_after_loading(kind: str, more: dict[str, Any], tmp_path: Path) -> None:
    model, tokens = converted(kind, **HOST, **more), ids(2, 24)
    folder = surgery.save(model, tmp_path / "model")
    loaded, tokenizer = surgery.load(folder)
    assert tokenizer is None
    assert not loaded.training
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert surgery.cache_bytes(loaded) == surgery.cache_bytes(model)
    found = loaded.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert found.tolist() == model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0).tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("more", [{}, {"attention_bias": True}, {"tie_word_embeddings": True}])
def test_an_adapter_on_its_base_says_the_same(kind: str, more: dict[str, Any], tmp_path: Path) -> None:
    model, base, tokens = converted(kind, **more), tiny(**more), ids(2, 24)
    folder = surgery.save(model, tmp_path / "adapter", adapter_only=True)
    loaded, _ = surgery.load(folder, base=base)
    assert loaded is base
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    assert not (folder / "model.safetensors").exists()


def test_an_adapter_holds_the_changed_blocks_alone(tmp_path: Path) -> None:
    model = tiny(layers=3)
    convert(model, "lowrank_gqa", method="mean", num_kv_heads=1, where=lambda site: site.layer == 1)
    folder = surgery.save(model, tmp_path / "adapter", adapter_only=True)
    names = set(safetensors.torch.load_file(folder / "adapter.safetensors"))
    assert names == {f"model.layers.1.self_attn.{role}_proj.weight" for role in "qkvo"}


def test_several_conversions_are_loaded_in_their_order(tmp_path: Path) -> None:
    model, tokens = tiny(layers=3, **HOST), ids(2, 24)
    text = calibration()
    convert(model, "s2", block_size=4, local_blocks=2, vert_stride=2, where=lambda site: site.layer == 0)
    convert(model, "mha", window=9, sink=2, where=lambda site: site.layer < 2)
    convert(model, "lowrank_gqa", method="latent", latent_dim=20, calibration=text, where=lambda site: site.layer > 0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*of the far blocks are read by no head")
        loaded, _ = surgery.load(surgery.save(model, tmp_path / "model"))
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    base = tiny(layers=3, **HOST)
    adapted, _ = surgery.load(surgery.save(model, tmp_path / "adapter", adapter_only=True), base=base)
    assert torch.equal(logits(adapted, tokens), logits(model, tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_come_back_bit_for_bit_when_asked_for(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny(dtype=torch.float32).to(dtype)
    convert(model, "lowrank_gqa", method="latent", latent_dim=20, calibration=calibration())
    loaded, _ = surgery.load(surgery.save(model, tmp_path / "model"), dtype=dtype)
    for name, x in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == dtype
        assert torch.equal(loaded.state_dict()[name], x), name


@pytest.mark.parametrize("kind", ["commuting", "mean", "expand"])
@pytest.mark.parametrize("bias", [False, True])
def test_merged_heads_load_in_plain_transformers_with_equal_logits(kind: str, bias: bool, tmp_path: Path) -> None:
    model, tokens = converted(kind, attention_bias=bias, **HOST), ids(2, 24)
    folder = surgery.save(model, tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(plain).__name__ == "LlamaForCausalLM"
    assert plain.config.num_key_value_heads == (6 if kind == "expand" else 1)
    assert torch.equal(logits(plain, tokens), logits(model, tokens))


def test_a_model_that_was_never_converted_is_not_saved(tmp_path: Path) -> None:
    model = tiny()
    with pytest.raises(attnzoo.ConversionError, match=r"^model: "):
        surgery.save(model, tmp_path / "model")
    convert(model, "mha").undo()
    with pytest.raises(attnzoo.ConversionError, match=r"^model: "):
        surgery.save(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_replaced_on_request_alone(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    before = contents(tmp_path)
    model = converted("window", **HOST)
    with pytest.raises(attnzoo.ConversionError, match="overwrite"):
        surgery.save(model, folder)
    assert contents(tmp_path) == before
    with pytest.raises(attnzoo.ConversionError, match="holds no converted model"):
        surgery.save(model, folder, overwrite=True)
    assert contents(tmp_path) == before
    (folder / "attnzoo_config.json").write_text("{}")
    surgery.save(model, folder, overwrite=True)
    assert not (folder / "mine.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    surgery.load(folder)


@pytest.mark.parametrize("step", ["tensors", "config", "recipe", "rename"])
@pytest.mark.parametrize("existed", [False, True])
def test_a_write_that_fails_midway_leaves_nothing_half_written(
    step: str, existed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = converted("mean", **HOST), tmp_path / "model"
    if existed:
        surgery.save(converted("window", **HOST), folder)
    before, names = contents(tmp_path), sorted(path.name for path in tmp_path.iterdir())
    _break(step, model, monkeypatch)
    with pytest.raises(OSError, match="disk full"):
        surgery.save(model, folder, overwrite=True)
    monkeypatch.undo()
    assert contents(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def _break(step: str, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a step of the write fail, after half of its bytes where it writes any."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError("disk full")

    def write_half(tensors: Any, file: Any, **kwargs: Any) -> None:
        Path(file).write_bytes(b"half of it")
        fail()

    def write_half_text(self: Path, *args: Any, **kwargs: Any) -> int:
        self.write_bytes(b'{"half')
        return int(fail())

    rename = Path.rename

    def fail_to_end(self: Path, target: Any) -> Any:
        # The last step alone: what was moved aside before must come back.
        return fail() if Path(target).name == "model" and self.name.startswith(".model-") else rename(self, target)

    if step == "tensors":
        monkeypatch.setattr(safetensors.torch, "save_file", write_half)
    elif step == "config":
        monkeypatch.setattr(type(model.config), "save_pretrained", fail)
    elif step == "recipe":
        monkeypatch.setattr(Path, "write_text", write_half_text)
    else:
        monkeypatch.setattr(Path, "rename", fail_to_end)


def test_an_adapter_on_another_base_is_refused_and_the_base_is_as_it_was(tmp_path: Path) -> None:
    folder = surgery.save(converted("mean"), tmp_path / "adapter", adapter_only=True)
    other = tiny()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-9
    for base in (other, tiny(seed=5), tiny(layers=3), tiny(dtype=torch.float32)):
        before = snapshot(base)
        with pytest.raises(attnzoo.ConversionError, match=r"^base: ") as caught:
            surgery.load(folder, base=base)
        assert "\n" not in str(caught.value)
        assert_untouched(base, before)


def test_an_adapter_knows_the_weights_that_it_replaces_by_hash_too(tmp_path: Path) -> None:
    # Reading rules alone change no weight: everything is the base's, attention too.
    folder = surgery.save(converted("window"), tmp_path / "adapter", adapter_only=True)
    other = tiny()
    with torch.no_grad():
        other.model.layers[0].self_attn.k_proj.weight[0, 0] += 1e-9
    with pytest.raises(attnzoo.ConversionError, match=r"^base: "):
        surgery.load(folder, base=other)


def test_an_adapter_needs_a_base_and_a_whole_model_takes_none(tmp_path: Path) -> None:
    adapter = surgery.save(converted("mean"), tmp_path / "adapter", adapter_only=True)
    whole = surgery.save(converted("mean"), tmp_path / "whole")
    with pytest.raises(attnzoo.ConversionError, match=r"^base: "):
        surgery.load(adapter)
    with pytest.raises(attnzoo.ConversionError, match=r"^base: "):
        surgery.load(whole, base=tiny())


@pytest.mark.parametrize("damage", ["missing", "extra", "shape", "cut", "gone", "pickle"])
def test_a_damaged_adapter_leaves_its_base_untouched(damage: str, tmp_path: Path) -> None:
    folder = surgery.save(converted("mean"), tmp_path / "adapter", adapter_only=True)
    file, base, tokens = folder / "adapter.safetensors", tiny(), ids(2, 20)
    tensors = safetensors.torch.load_file(file)
    name = "model.layers.1.self_attn.k_proj.weight"
    if damage == "missing":
        del tensors[name]
    elif damage == "extra":
        tensors["model.layers.1.self_attn.spare"] = torch.zeros(2)
    elif damage == "shape":
        tensors[name] = tensors[name][:8].contiguous()
    safetensors.torch.save_file(tensors, file)
    if damage == "cut":
        os.truncate(file, file.stat().st_size - 5)
    elif damage == "gone":
        file.unlink()
    elif damage == "pickle":
        torch.save(tensors, file)
    before, said = snapshot(base), logits(base, tokens)
    with pytest.raises((attnzoo.ConversionError, FileNotFoundError)) as caught:
        surgery.load(folder, base=base)
    assert "\n" not in str(caught.value)
    assert_untouched(base, before)
    assert torch.equal(logits(base, tokens), said)


def test_a_loaded_model_can_be_converted_further_and_saved_again(tmp_path: Path) -> None:
    loaded, _ = surgery.load(surgery.save(converted("mean", **HOST), tmp_path / "one"))
    convert(loaded, "mha", window=9, sink=2)
    tokens = ids(2, 24)
    again, _ = surgery.load(surgery.save(loaded, tmp_path / "two"))
    assert torch.equal(logits(again, tokens), logits(loaded, tokens))
