"""Shards that are damaged, quantised or at odds with each other are met by name, before anything is written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

import attnzoo
from attnzoo import surgery
from attnzoo.surgery.streaming.shards import Shards
from tests.attnzoo.surgery.tiny import tiny

UP = "model.layers.1.mlp.up_proj.weight"
Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shards") / "plain"
    tiny(layers=2, dtype=torch.float32).save_pretrained(path, max_shard_size="100KB")
    return path


def changed(source: Path, folder: Path, change: Change) -> Path:
    """A copy without an index, with the shard of one tensor changed."""
    shutil.copytree(source, folder)
    (folder / "model.safetensors.index.json").unlink()
    for file in folder.glob("*.safetensors"):
        tensors = safetensors.torch.load_file(file)
        if UP in tensors:
            safetensors.torch.save_file(change(dict(tensors)), file)
    return folder


WRONG: dict[str, tuple[Change, str]] = {
    "missing": (lambda x: {name: y for name, y in x.items() if name != UP}, "missing 'model.layers.1.mlp.up_proj"),
    "too many": (lambda x: {**x, "model.layers.7.weight": torch.ones(1)}, "unexpected 'model.layers.7.weight'"),
    "another shape": (lambda x: {**x, UP: x[UP][1:].clone()}, r"up_proj.weight: expected \[64, 96\], got \[63, 96\]"),
    "quantised": (lambda x: {**x, UP: x[UP].to(torch.int8)}, "quantised weights are not read"),
    "eight bits": (lambda x: {**x, UP: x[UP].to(torch.float8_e4m3fn)}, "got F8_E4M3; quantised weights are not read"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_tensor_is_named(what: str, source: Path, tmp_path: Path) -> None:
    change, message = WRONG[what]
    folder = changed(source, tmp_path / "model", change)
    with pytest.raises(attnzoo.ConversionError, match=message):
        surgery.convert_folder(folder, tmp_path / "out", "lowrank_gqa", method="expand", num_kv_heads=6)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_two_shards_that_disagree_are_refused_and_equal_ones_are_not(source: Path, tmp_path: Path) -> None:
    folder = changed(source, tmp_path / "model", lambda x: x)
    twice = Shards(folder)[UP]
    safetensors.torch.save_file({UP: twice}, folder / "more.safetensors")
    assert torch.equal(Shards(folder)[UP], twice)
    safetensors.torch.save_file({UP: twice + 1}, folder / "more.safetensors")
    with pytest.raises(attnzoo.ConversionError, match="stands in another file too, with other values"):
        Shards(folder)


def test_a_damaged_shard_is_one_line(source: Path, tmp_path: Path) -> None:
    folder = changed(source, tmp_path / "model", lambda x: x)
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(attnzoo.ConversionError, match="damaged: "):
        Shards(folder)


def test_weights_that_are_not_finite_are_told_and_kept(source: Path, tmp_path: Path) -> None:
    folder = changed(source, tmp_path / "model", lambda x: {**x, UP: torch.full_like(x[UP], torch.nan)})
    with pytest.warns(UserWarning, match=f"{UP} and 0 more tensors hold NaN"):
        surgery.convert_folder(folder, tmp_path / "out", "lowrank_gqa", method="expand", num_kv_heads=6)
    with pytest.warns(UserWarning, match="hold NaN"):
        model, _ = surgery.load(tmp_path / "out")
    assert bool(model.state_dict()[UP].isnan().all())


def test_tensors_have_memory_of_their_own(source: Path, tmp_path: Path) -> None:
    folder = changed(source, tmp_path / "model", lambda x: x)
    shards = Shards(folder)
    before = shards[UP]
    other = before.clone()
    stored = shards.stored[UP]
    # Files are not mapped any more when a tensor has been read: what becomes of them does not reach it.
    data = bytearray(stored.file.read_bytes())
    at = data.index(before.numpy().tobytes())
    data[at : at + 4] = b"\x00\x00\x00\x00"
    with stored.file.open("r+b") as file:
        file.write(data)
    assert torch.equal(before, other)
    assert (stored.shape, stored.dtype, stored.bytes) == ((64, 96), torch.float32, 4 * 64 * 96)
