"""Folders as they lie on disks: the hub's cache, files beside the weights, older names, flags that are wrong."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

import attnzoo
from attnzoo import surgery
from attnzoo.surgery.hosts import folders
from attnzoo.surgery.hosts.checkpoint import load_checkpoint
from tests.attnzoo.surgery.tiny import convert, converted, ids, logits, tiny

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HASH = "ab" + "0" * 62
Loader = Callable[[Path], Any]


def plain(folder: Path, **more: Any) -> Path:
    tiny(dtype=torch.float32, **more).save_pretrained(folder)
    return folder


def change_tensors(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / WEIGHTS)


def in_shards(folder: Path) -> None:
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    parts = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, mine in parts.items():
        safetensors.torch.save_file({name: tensors[name] for name in mine}, folder / file)
    (folder / INDEX).write_text(
        json.dumps({"weight_map": {name: file for file, mine in parts.items() for name in mine}})
    )


def into_cache(folder: Path, cache: Path, *, shared: bool = False) -> Path:
    """The layout of the hub's cache: a snapshot of links to blobs, which may be links to what repositories share."""
    repository = cache / "models--somebody--tiny"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for i, file in enumerate(sorted(folder.iterdir())):
        name = f"{i:064x}"
        blob = repository / "blobs" / name
        if shared:
            store = cache / "blobs" / name[:2]
            store.mkdir(parents=True, exist_ok=True)
            (store / name).write_bytes(file.read_bytes())
            blob.symlink_to(Path("..") / ".." / "blobs" / name[:2] / name)
        else:
            blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / name)
    return snapshot


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("shards", [False, True])
def test_a_snapshot_in_the_hubs_cache_is_read(shards: bool, shared: bool, tmp_path: Path) -> None:
    host = plain(tmp_path / "host")
    if shards:
        in_shards(host)
    snapshot = into_cache(host, tmp_path / "cache", shared=shared)
    expected, _ = load_checkpoint(host)
    model, _ = load_checkpoint(snapshot)
    assert torch.equal(logits(model, ids(1, 9)), logits(expected, ids(1, 9)))


@pytest.mark.parametrize("kind", ["window", "mean"])
def test_a_converted_model_in_the_hubs_cache_is_read(kind: str, tmp_path: Path) -> None:
    saved = surgery.save(converted(kind, dtype=torch.float32), tmp_path / "saved")
    model, _ = surgery.load(into_cache(saved, tmp_path / "cache"))
    assert torch.equal(logits(model, ids(1, 20)), logits(surgery.load(saved)[0], ids(1, 20)))


TARGETS = {
    "elsewhere": "../../../../outside/{name}",
    "another repository": "../../../models--other--model/blobs/{hash}",
    "above the blobs": "../../{hash}",
    "below the blobs": "../../blobs/deep/{hash}",
    "another snapshot": "../other/{name}",
    "shared, but no hash": "../../../blobs/ab/absecret",
    "a blob that is a link": "../../blobs/link",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A converted model, whole and in shards."""
    folder = tmp_path_factory.mktemp("saved")
    model = converted("mean", dtype=torch.float32)
    found = {shards: surgery.save(model, folder / str(shards)) for shards in (False, True)}
    in_shards(found[True])
    return found


READ = (WEIGHTS, "config.json", INDEX, "generation_config.json", "attnzoo_config.json")


@pytest.mark.parametrize(
    ("target", "file"), [*((target, WEIGHTS) for target in TARGETS), *(("elsewhere", file) for file in READ[1:])]
)
def test_other_links_out_of_a_snapshot_are_refused(
    target: str, file: str, tmp_path: Path, saved: dict[bool, Path]
) -> None:
    snapshot = into_cache(saved[file == INDEX], tmp_path / "cache")
    content = (snapshot / file).read_bytes()
    link = TARGETS[target].format(name=file, hash=HASH)
    outside = tmp_path / "outside" / file
    for place in (outside, Path(f"{snapshot}/{link}").parent.absolute() / Path(link).name):
        place = Path(*place.parts[:1], *_normal(place))
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.name == "link":
            place.symlink_to(outside)
        else:
            place.write_bytes(content)
    (snapshot / file).unlink()
    (snapshot / file).symlink_to(link)
    assert (snapshot / file).read_bytes() == content
    with pytest.raises(attnzoo.ConversionError, match="refused to read") as caught:
        surgery.load(snapshot)
    assert file in str(caught.value)
    assert "\n" not in str(caught.value)


def _normal(path: Path) -> list[str]:
    found: list[str] = []
    for part in path.parts[1:]:
        found = found[:-1] if part == ".." else [*found, part]
    return found


@pytest.mark.parametrize(
    "name", ["../a.safetensors", "/a.safetensors", "b/a.safetensors", "..", "", "a.bin", "..\\a.safetensors"]
)
def test_names_from_an_index_are_names_of_files_in_the_folder(name: str, tmp_path: Path) -> None:
    for place in (tmp_path / "in" / "b", tmp_path / "in", tmp_path):
        place.mkdir(exist_ok=True, parents=True)
        (place / "a.safetensors").write_bytes(b"")
    with pytest.raises(attnzoo.ConversionError, match="refused to read"):
        folders.plain_file(tmp_path / "in", name, ".safetensors")


BESIDE = ("consolidated.safetensors", "adapter_model.safetensors", "model.fp16.safetensors", "extra.safetensors")


@pytest.mark.parametrize("shards", [False, True])
def test_other_files_of_weights_are_no_part_of_the_model(shards: bool, tmp_path: Path) -> None:
    folder = plain(tmp_path / "host")
    expected = logits(load_checkpoint(folder)[0], ids(1, 9))
    if shards:
        in_shards(folder)
    for file in BESIDE:
        safetensors.torch.save_file({"lm_head.weight": torch.ones(3), "layers.0.wq": torch.ones(2)}, folder / file)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    (folder / "original").mkdir()
    safetensors.torch.save_file({"spare": torch.ones(3)}, folder / "original" / WEIGHTS)
    assert torch.equal(logits(load_checkpoint(folder)[0], ids(1, 9)), expected)


IGNORED = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
    "model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(8),
    "model.rotary_emb.inv_freq": torch.ones(8),
    "model.position_ids": torch.arange(9),
}


def test_what_older_versions_stored_is_ignored_as_transformers_ignores_it(tmp_path: Path) -> None:
    folder = plain(tmp_path / "host")
    expected = logits(load_checkpoint(folder)[0], ids(1, 9))
    change_tensors(folder, lambda tensors: tensors.update(IGNORED))
    assert torch.equal(logits(load_checkpoint(folder)[0], ids(1, 9)), expected)
    saved = surgery.save(converted("mean", dtype=torch.float32), tmp_path / "saved")
    change_tensors(saved, lambda tensors: tensors.update(IGNORED))
    surgery.load(saved)


def test_what_a_class_says_is_ignored_is_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = plain(tmp_path / "host")
    change_tensors(folder, lambda tensors: tensors.update({"model.layers.0.attn.bias": torch.ones(2)}))
    with pytest.raises(attnzoo.ConversionError, match=r"unexpected 'model.layers.0.attn.bias'"):
        load_checkpoint(folder)
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"attn\.bias$"])
    load_checkpoint(folder)


def test_names_without_the_decoders_prefix_are_understood(tmp_path: Path) -> None:
    folder = plain(tmp_path / "host", tie_word_embeddings=True)
    expected = logits(load_checkpoint(folder)[0], ids(1, 9))
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    short = {name.removeprefix("model."): x for name, x in tensors.items()}
    safetensors.torch.save_file(short, folder / WEIGHTS)
    assert torch.equal(logits(load_checkpoint(folder)[0], ids(1, 9)), expected)


def untied(tmp_path: Path, kind: str | None) -> tuple[Path, Loader]:
    """A folder that ties its embedding, with another output layer in its file; and its loader."""
    if kind is None:
        folder, load = plain(tmp_path / "host", tie_word_embeddings=True), lambda path: load_checkpoint(path)[0]
    else:
        model = converted(kind, dtype=torch.float32, tie_word_embeddings=True)
        folder, load = surgery.save(model, tmp_path / "saved"), lambda path: surgery.load(path)[0]
    generator = torch.Generator().manual_seed(0)
    file = next(folder.glob("*.safetensors"))
    tensors = safetensors.torch.load_file(file)
    tensors["lm_head.weight"] = torch.randn(tensors["model.embed_tokens.weight"].shape, generator=generator)
    safetensors.torch.save_file(tensors, file)
    return folder, load


@pytest.mark.parametrize("kind", [None, "window", "mean", "latent"])
def test_a_flag_that_ties_what_differs_is_not_believed(kind: str | None, tmp_path: Path) -> None:
    folder, load = untied(tmp_path, kind)
    stored = safetensors.torch.load_file(next(folder.glob("*.safetensors")))
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model = load(folder)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(model.state_dict()[name], stored[name])
    model.tie_weights()
    assert torch.equal(model.lm_head.weight, stored["lm_head.weight"])
    if kind is None:
        by_transformers = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        assert torch.equal(logits(model, ids(1, 9)), logits(by_transformers, ids(1, 9)))
        convert(model, "mha", window=9, sink=2)
    with warnings.catch_warnings():
        # What is saved then says so, and warns no more.
        warnings.simplefilter("error")
        again, _ = surgery.load(surgery.save(model, tmp_path / "again"))
    assert torch.equal(logits(again, ids(1, 20)), logits(model, ids(1, 20)))


def test_one_name_of_a_tied_tensor_is_enough_and_none_is_not(tmp_path: Path) -> None:
    folder = plain(tmp_path / "host", tie_word_embeddings=True)
    expected = logits(load_checkpoint(folder)[0], ids(1, 9))
    inner, outer = "model.embed_tokens.weight", "lm_head.weight"
    change_tensors(folder, lambda tensors: tensors.update({outer: tensors.pop(inner)}))
    assert torch.equal(logits(load_checkpoint(folder)[0], ids(1, 9)), expected)
    change_tensors(folder, lambda tensors: tensors.update({inner: tensors[outer].clone()}))
    assert torch.equal(logits(load_checkpoint(folder)[0], ids(1, 9)), expected)
    change_tensors(folder, lambda tensors: (tensors.pop(inner), tensors.pop(outer)))
    with pytest.raises(attnzoo.ConversionError, match="missing"):
        load_checkpoint(folder)


def test_an_output_layer_that_is_missing_is_named_with_the_flag(tmp_path: Path) -> None:
    folder = plain(tmp_path / "host")
    change_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(attnzoo.ConversionError, match=r"missing 'lm_head.weight'.*tie_word_embeddings"):
        load_checkpoint(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.int64, torch.bool])
def test_codes_of_quantised_weights_are_not_taken_for_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    folder, name = plain(tmp_path / "host"), "model.layers.0.mlp.up_proj.weight"
    change_tensors(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "mine"}}))
    with pytest.raises(attnzoo.ConversionError, match=rf"{name}.*got {dtype}.*quant_method.*mine"):
        load_checkpoint(folder)


HUB = "HuggingFaceTB/SmolLM2-135M"


@pytest.mark.parametrize("load", [load_checkpoint, surgery.load])
def test_a_name_on_the_hub_is_told_from_a_path(
    load: Callable[[Any], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    with pytest.raises(attnzoo.ConversionError, match=f"nothing is downloaded.*hf download {HUB} --local-dir"):
        load(HUB)
    snapshot = tmp_path / "hub" / "models--HuggingFaceTB--SmolLM2-135M" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    with pytest.raises(attnzoo.ConversionError, match=f"{HUB}: .*hub's cache: give {snapshot}"):
        load(HUB)
    with pytest.raises(attnzoo.ConversionError, match="no such file or folder; nothing is downloaded"):
        load("./models/mine")


def test_a_folder_without_a_model_says_where_one_is(tmp_path: Path) -> None:
    (tmp_path / "model-f16.gguf").write_bytes(b"GGUF")
    with pytest.raises(attnzoo.ConversionError, match=r"config.json: missing; give .*model-f16.gguf"):
        load_checkpoint(tmp_path)
    repository = tmp_path / "models--a--b"
    (repository / "snapshots" / "0123").mkdir(parents=True)
    with pytest.raises(attnzoo.ConversionError, match=r"missing; give .*snapshots/0123"):
        load_checkpoint(repository)
