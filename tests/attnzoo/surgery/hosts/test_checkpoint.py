"""Folders that are not to be trusted: every one is refused in one clear line, and nothing outside it is read."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import attnzoo
from attnzoo import surgery
from attnzoo.surgery.hosts.checkpoint import load_checkpoint, refuse_pickle
from tests.attnzoo.surgery.tiny import converted, ids, logits, tiny

RECIPE = "attnzoo_config.json"
INDEX = "model.safetensors.index.json"
REFUSED = (attnzoo.AttnzooError, FileNotFoundError)

RAN: list[str] = []


class Bomb:
    """Says so when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return RAN.append, ("unpickled",)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return surgery.save(converted("mean", dtype=torch.float32), tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A folder of a test's own, good until the test has been at it."""
    copy = tmp_path / "model"
    copy.mkdir()
    for file in saved.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def change_json(file: Path, **changes: Any) -> None:
    found = json.loads(file.read_text())
    file.write_text(json.dumps({name: x for name, x in {**found, **changes}.items() if x is not ...}))


def change_recipe(folder: Path, **changes: Any) -> None:
    recipe = json.loads((folder / RECIPE).read_text())["recipe"]
    recipe[1] = {name: x for name, x in {**recipe[1], **changes}.items() if x is not ...}
    change_json(folder / RECIPE, recipe=recipe)


def cut(file: Path, size: int) -> None:
    os.truncate(file, size)


def change_tensors(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


def write_index(folder: Path, file: str) -> None:
    names = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))


def only_pickles(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb()))


KEY = "model.layers.0.self_attn.k_proj.weight"
WEIGHTS = "model.safetensors"

# What is done to a good folder; what the one line must name.
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weights cut in the header": (lambda f: cut(f / WEIGHTS, 40), WEIGHTS),
    "weights cut in the middle": (lambda f: cut(f / WEIGHTS, 5000), WEIGHTS),
    "weights cut by one byte": (lambda f: cut(f / WEIGHTS, (f / WEIGHTS).stat().st_size - 1), WEIGHTS),
    "weights empty": (lambda f: cut(f / WEIGHTS, 0), WEIGHTS),
    "weights with a huge header": (lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 64), WEIGHTS),
    "weights that are text": (lambda f: (f / WEIGHTS).write_text("hello, hello, hello"), WEIGHTS),
    "weights that are a pickle": (lambda f: (f / WEIGHTS).write_bytes(pickle.dumps(Bomb())), "pickle"),
    "weights that are a torch archive": (lambda f: torch.save({"a": torch.ones(2)}, f / WEIGHTS), "pickle"),
    "pickles as .bin": (lambda f: only_pickles(f, "pytorch_model.bin"), "pickle"),
    "pickles as .pt": (lambda f: only_pickles(f, "model.pt"), "pickle"),
    "weights gone": (lambda f: (f / WEIGHTS).unlink(), "safetensors"),
    "weights a folder": (lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()), WEIGHTS),
    "a tensor missing": (lambda f: change_tensors(f, lambda t: t.pop(KEY)), KEY),
    "a tensor too many": (lambda f: change_tensors(f, lambda t: t.update(spare=torch.ones(2))), "spare"),
    "a tensor of another shape": (lambda f: change_tensors(f, lambda t: t.update({KEY: torch.ones(3, 3)})), KEY),
    "an index that leaves": (lambda f: write_index(f, "../outside.safetensors"), "../outside.safetensors"),
    "an index that leaves and returns": (lambda f: write_index(f, "../model/model.safetensors"), "../model"),
    "an index to nowhere": (lambda f: write_index(f, "other.safetensors"), "other.safetensors"),
    "an index to a pickle": (
        lambda f: (only_pickles(f, "a.bin"), (f / INDEX).write_text('{"weight_map": {"a": "a.bin"}}')), "a.bin",
    ),
    "an index to a dot": (lambda f: write_index(f, "."), "inside the folder"),
    "an index of numbers": (lambda f: (f / INDEX).write_text('{"weight_map": {"a": 3}}'), INDEX),
    "an index of nothing": (lambda f: (f / INDEX).write_text("{}"), INDEX),
    "an index that is no JSON": (lambda f: (f / INDEX).write_text("{"), INDEX),
    "no configuration": (lambda f: (f / "config.json").unlink(), "config.json"),
    "a configuration that is no JSON": (lambda f: (f / "config.json").write_text("{'a': 1}"), "config.json"),
    "a configuration that is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json"),
    "a configuration that is not text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json"),
    "a configuration nested too deep": (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json"),
    "a configuration with code": (lambda f: change_json(f / "config.json", auto_map={"a": "b.C"}), "auto_map"),
    "an unknown host": (lambda f: change_json(f / "config.json", model_type="nosuch"), "nosuch"),
    "no host": (lambda f: change_json(f / "config.json", model_type=...), "model_type"),
    "a model too large": (lambda f: change_json(f / "config.json", hidden_size=1 << 40), "hidden_size"),
    "a negative size": (lambda f: change_json(f / "config.json", num_hidden_layers=-1), "num_hidden_layers"),
    "no heads": (lambda f: change_json(f / "config.json", num_attention_heads=0), "num_attention_heads"),
    "a size that is a word": (lambda f: change_json(f / "config.json", vocab_size="many"), "vocab_size"),
    "no recipe": (lambda f: (f / RECIPE).unlink(), RECIPE),
    "a recipe that is no JSON": (lambda f: (f / RECIPE).write_text("{"), RECIPE),
    "a recipe that is a list": (lambda f: (f / RECIPE).write_text("[1]"), RECIPE),
    "a recipe of a later format": (lambda f: change_json(f / RECIPE, format=99), RECIPE),
    "a recipe of words": (lambda f: change_json(f / RECIPE, recipe=["mha"]), RECIPE),
    "a recipe for another path": (lambda f: change_recipe(f, path="model.layers.9.self_attn"), "layers.9"),
    "a recipe for a list of paths": (lambda f: change_recipe(f, path=["a"]), "path"),
    "a recipe without a path": (lambda f: change_recipe(f, path=...), "path"),
    "a recipe of an unknown kind": (lambda f: change_recipe(f, kind="magic"), "magic"),
    "a recipe of an unknown variant": (lambda f: change_recipe(f, kind="read", variant="nosuch", options={}), "nosuch"),
    "a recipe with an unknown option": (
        lambda f: change_recipe(f, kind="read", variant="mha", options={"windw": 3}), "windw",
    ),
    "a recipe with a bad option": (
        lambda f: change_recipe(f, kind="read", variant="mha", options={"window": -3}), "window",
    ),
    "a recipe whose options are a number": (lambda f: change_recipe(f, kind="read", variant="mha", options=3), RECIPE),
    "a recipe without heads": (lambda f: change_recipe(f, num_kv_heads=...), RECIPE),
    "a recipe with heads that are a word": (lambda f: change_recipe(f, num_kv_heads="one"), RECIPE),
    "a recipe with no heads at all": (lambda f: change_recipe(f, num_kv_heads=0), ""),
    "a recipe with negative heads": (lambda f: change_recipe(f, num_kv_heads=-1), ""),
    "a recipe with heads that do not divide": (lambda f: change_recipe(f, num_kv_heads=5), ""),
    "a recipe with a huge latent": (lambda f: change_recipe(f, kind="latent", latent_dim=1 << 40), ""),
    "a recipe with a negative latent": (lambda f: change_recipe(f, kind="latent", latent_dim=-4), ""),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_hostile_folder_is_refused_in_one_line(damage: str, folder: Path, tmp_path: Path) -> None:
    # What an index may point at must be readable, so that its refusal is not for want of a file.
    (tmp_path / "outside.safetensors").write_bytes((folder / WEIGHTS).read_bytes())
    break_it, named = DAMAGE[damage]
    break_it(folder)
    RAN.clear()
    with pytest.raises(REFUSED) as caught:
        surgery.load(folder)
    assert RAN == []
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_folder_that_was_damaged_above_is_good(folder: Path) -> None:
    model, _ = surgery.load(folder)
    assert bool(logits(model, ids(1, 8)).isfinite().all())


def test_an_absolute_path_in_an_index_is_refused(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes((folder / WEIGHTS).read_bytes())
    write_index(folder, str(outside))
    with pytest.raises(attnzoo.ConversionError, match="inside the folder"):
        surgery.load(folder)


@pytest.mark.parametrize("with_index", [True, False])
def test_a_link_that_leaves_the_folder_is_refused(folder: Path, tmp_path: Path, with_index: bool) -> None:
    (folder / WEIGHTS).rename(tmp_path / "outside.safetensors")
    (folder / WEIGHTS).symlink_to(tmp_path / "outside.safetensors")
    if with_index:
        write_index(folder, WEIGHTS)
    with pytest.raises(attnzoo.ConversionError, match="inside the folder"):
        surgery.load(folder)


def test_an_honest_index_is_followed(folder: Path) -> None:
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    parts = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, mine in parts.items():
        safetensors.torch.save_file({name: tensors[name] for name in mine}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": {n: file for file, mine in parts.items() for n in mine}}))
    model, _ = surgery.load(folder)
    assert torch.equal(model.state_dict()[KEY], tensors[KEY])


def test_a_tensor_with_other_values_in_two_files_is_refused(folder: Path) -> None:
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    (folder / WEIGHTS).rename(folder / "one.safetensors")
    safetensors.torch.save_file({KEY: tensors[KEY].clone()}, folder / "two.safetensors")
    surgery.load(folder)
    safetensors.torch.save_file({KEY: torch.ones(2)}, folder / "two.safetensors")
    with pytest.raises(attnzoo.ConversionError, match="stands in another file"):
        surgery.load(folder)


def test_weights_with_nan_are_loaded_with_a_warning(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors[KEY].fill_(float("nan")))
    with pytest.warns(UserWarning, match=KEY):
        surgery.load(folder)


@pytest.mark.parametrize("name", ["nowhere", "model/config.json"])
def test_a_path_that_is_no_folder_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(REFUSED, match=name):
        surgery.load(folder.parent / name)


def test_a_plain_checkpoint_of_the_host_is_read_like_transformers_reads_it(tmp_path: Path) -> None:
    host = tiny(dtype=torch.float32, tie_word_embeddings=True)
    host.save_pretrained(tmp_path / "host")
    model, tokenizer = load_checkpoint(tmp_path / "host")
    assert tokenizer is None
    assert torch.equal(logits(model, ids(2, 12)), logits(host, ids(2, 12)))


@pytest.mark.parametrize(
    ("name", "head"), [("a.gguf", b"GGUX"), ("a.bin", b"\x80\x02"), ("a.pt", b"PK\x03\x04"), ("a", b"x")]
)
def test_single_files_are_refused_unless_they_are_gguf(name: str, head: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(head + b"0" * 40)
    with pytest.raises(attnzoo.ConversionError, match=name):
        load_checkpoint(tmp_path / name)


@pytest.mark.parametrize("wanted", [128, 384, 640])
def test_no_length_of_a_header_is_taken_for_a_pickle(wanted: int, tmp_path: Path) -> None:
    # Headers are padded to a multiple of 8 bytes, and their length comes first in the file.
    path = tmp_path / "a.safetensors"
    for more in range(wanted):
        safetensors.torch.save_file({"x" * (1 + more): torch.zeros(3)}, path)
        if int.from_bytes(path.read_bytes()[:8], "little") >= wanted:
            break
    assert int.from_bytes(path.read_bytes()[:8], "little") == wanted
    refuse_pickle(path)
    path.write_bytes(pickle.dumps(Bomb(), protocol=2) + b"{" * 4000)
    with pytest.raises(attnzoo.ConversionError, match="pickles are refused"):
        refuse_pickle(path)
