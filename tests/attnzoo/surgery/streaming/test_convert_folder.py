"""A checkpoint converted layer by layer is what a conversion in memory makes of it, and nothing half-written."""

from __future__ import annotations

import errno
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import attnzoo
from attnzoo import surgery
from attnzoo.surgery.hosts.checkpoint import load_checkpoint
from attnzoo.surgery.streaming.skeleton import Skeleton
from tests.attnzoo.surgery.tiny import calibration, ids, logits, tiny

LAYERS = 3
LATENT: dict[str, Any] = {"method": "latent", "latent_dim": 20}
COMMUTING: dict[str, Any] = {"method": "commuting", "num_kv_heads": 1}
PLAIN: dict[str, Any] = {"method": "expand", "num_kv_heads": 6}
METHODS: dict[str, dict[str, Any]] = {
    "latent": LATENT,
    "latent without gradients": {**LATENT, "gradients": False},
    "commuting": COMMUTING,
    "commuting without gradients": {**COMMUTING, "gradients": False},
    "commuting without refit": {**COMMUTING, "refit": False},
    "mean": {"method": "mean", "num_kv_heads": 1},
    "expand": PLAIN,
}
HOSTS: dict[str, dict[str, Any]] = {
    "bf16": {"dtype": torch.bfloat16},
    "fp32, biases, tied": {"dtype": torch.float32, "attention_bias": True, "tie_word_embeddings": True},
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints in several shards, with another file beside them."""
    place = tmp_path_factory.mktemp("sources")
    found = {}
    for number, (name, host) in enumerate(HOSTS.items()):
        found[name] = place / str(number)
        tiny(layers=LAYERS, **host).save_pretrained(found[name], max_shard_size="60KB")
        (found[name] / "LICENSE").write_text("as you like")
    return found


@pytest.fixture(autouse=True)
def _expected_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="method 'mean' is a baseline")
        yield


def text(method: str) -> list[Any] | None:
    """Batches of several lengths, some padded on either side."""
    if method.startswith(("mean", "expand")):
        return None
    mask = torch.ones(2, 40, dtype=torch.int64)
    mask[0, :5] = 0
    mask[1, 33:] = 0
    return [*calibration(2), {"input_ids": ids(2, 40, seed=7), "attention_mask": mask}, ids(1, 25, seed=8)]


def state(folder: Path) -> dict[str, Tensor]:
    model, _ = surgery.load(folder)
    found: dict[str, Tensor] = model.state_dict()
    return found


def assert_same_folder(found: Path, wanted: Path) -> None:
    """The same tensors to the bit, and the same files of any other kind."""
    assert state(found).keys() == state(wanted).keys()
    other = state(wanted)
    odd = [name for name, x in state(found).items() if x.dtype != other[name].dtype or not torch.equal(x, other[name])]
    assert not odd
    names = [{file.name for file in folder.iterdir() if "safetensors" not in file.name} for folder in (found, wanted)]
    assert names[0] == names[1]
    for name in names[0]:
        assert (found / name).read_bytes() == (wanted / name).read_bytes(), name


def in_memory(source: Path, out: Path, dtype: torch.dtype | None = None, **options: Any) -> surgery.ConversionReport:
    model, _ = load_checkpoint(source, dtype=dtype)
    report = surgery.convert(model, **options)
    if dtype is not None:
        model.to(torch.bfloat16)
    surgery.save(model, out)
    return report


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("host", HOSTS)
def test_a_folder_is_what_a_conversion_in_memory_makes(
    host: str, method: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    given: dict[str, Any] = {"variant": "lowrank_gqa", **METHODS[method], "calibration": text(method)}
    wanted = in_memory(sources[host], tmp_path / "memory", **given)
    report = surgery.convert_folder(sources[host], tmp_path / "folder", **given)
    assert_same_folder(tmp_path / "folder", tmp_path / "memory")
    assert str(report) == str(wanted)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "memory"]
    with pytest.raises(attnzoo.ConversionError, match=r"^undo: a folder was converted"):
        report.undo()


@pytest.mark.parametrize("options", [LATENT, COMMUTING], ids=lambda options: options["method"])
def test_a_text_that_runs_in_fp32_gives_what_the_model_in_fp32_gives(
    options: dict[str, Any], sources: dict[str, Path], tmp_path: Path
) -> None:
    given: dict[str, Any] = {"variant": "lowrank_gqa", **options, "calibration": calibration(1)}
    in_memory(sources["bf16"], tmp_path / "memory", torch.float32, **given)
    surgery.convert_folder(sources["bf16"], tmp_path / "folder", dtypes=surgery.Dtypes(run=torch.float32), **given)
    assert_same_folder(tmp_path / "folder", tmp_path / "memory")


@pytest.mark.parametrize("options", [LATENT, PLAIN], ids=lambda options: options["method"])
def test_some_layers_are_converted_and_others_go_from_shard_to_shard(
    options: dict[str, Any], sources: dict[str, Path], tmp_path: Path
) -> None:
    given: dict[str, Any] = {"variant": "lowrank_gqa", **options, "where": lambda site: site.layer == 1}
    given["calibration"] = calibration(1) if options is LATENT else None
    in_memory(sources["bf16"], tmp_path / "memory", **given)
    surgery.convert_folder(sources["bf16"], tmp_path / "folder", **given)
    assert_same_folder(tmp_path / "folder", tmp_path / "memory")


def test_what_is_read_alone_is_converted_too(sources: dict[str, Path], tmp_path: Path) -> None:
    in_memory(sources["bf16"], tmp_path / "memory", variant="mha", window=5, sink=1)
    surgery.convert_folder(sources["bf16"], tmp_path / "folder", "mha", window=5, sink=1)
    assert_same_folder(tmp_path / "folder", tmp_path / "memory")


def test_other_readers_take_fewer_heads_and_refuse_latents(sources: dict[str, Path], tmp_path: Path) -> None:
    surgery.convert_folder(sources["bf16"], tmp_path / "heads", "lowrank_gqa", calibration=calibration(1), **COMMUTING)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "heads")
    ours, _ = surgery.load(tmp_path / "heads")
    assert torch.equal(logits(theirs, ids(1, 9)), logits(ours, ids(1, 9)))
    index = json.loads((tmp_path / "heads" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    stored = sum(x.numel() * 2 for x in ours.state_dict().values())
    assert index["metadata"]["total_size"] == stored
    assert len(set(index["weight_map"].values())) == LAYERS + 1
    surgery.convert_folder(sources["bf16"], tmp_path / "latent", "lowrank_gqa", calibration=calibration(1), **LATENT)
    with pytest.raises((ValueError, KeyError, OSError), match="attnzoo"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "latent")


@pytest.mark.parametrize("options", [LATENT, COMMUTING, PLAIN], ids=lambda options: options["method"])
def test_one_layer_is_in_memory_at_a_time(
    options: dict[str, Any], sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there: list[set[str]] = []
    whole = Skeleton.read

    def read(self: Skeleton, names: Any) -> dict[str, Tensor]:
        # What is there while the next layer is read.
        held = [name for name, p in self.model.named_parameters() if not p.is_meta]
        there.append({path for path in self.layers for name in held if name.startswith(f"{path}.")})
        return whole(self, names)

    monkeypatch.setattr(Skeleton, "read", read)
    surgery.convert_folder(
        sources["bf16"],
        tmp_path / "out",
        "lowrank_gqa",
        calibration=None if options is PLAIN else calibration(1),
        **options,
    )
    assert len(there) > LAYERS
    assert not any(there)


@pytest.mark.parametrize("stage", ["forward", "loss", "statistics", "refit", "writing"])
def test_an_interruption_leaves_nothing(stage: str, sources: dict[str, Path], tmp_path: Path) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if what == stage:
            raise KeyboardInterrupt

    before = {file.name: file.read_bytes() for file in sources["bf16"].iterdir()}
    options = PLAIN if stage == "writing" else COMMUTING
    with pytest.raises(KeyboardInterrupt):
        surgery.convert_folder(
            sources["bf16"],
            tmp_path / "deep" / "out",
            "lowrank_gqa",
            calibration=None if options is PLAIN else calibration(1),
            progress=interrupt,
            **options,
        )
    assert list(tmp_path.iterdir()) == []
    assert {file.name: file.read_bytes() for file in sources["bf16"].iterdir()} == before


def test_a_full_disk_leaves_what_was_there(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(tensors: Any, file: Any, **kwargs: Any) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "out"
    surgery.convert_folder(sources["bf16"], out, "lowrank_gqa", **PLAIN)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(attnzoo.ConversionError, match="is not empty"):
        surgery.convert_folder(sources["bf16"], out, "lowrank_gqa", **PLAIN)
    monkeypatch.setattr(safetensors.torch, "save_file", refuse)
    with pytest.raises(OSError, match="nothing is left of it: No space left"):
        surgery.convert_folder(sources["bf16"], out, "lowrank_gqa", overwrite=True, **PLAIN)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_cannot_be_streamed_is_refused_by_name(sources: dict[str, Path], tmp_path: Path) -> None:
    source, out = sources["bf16"], tmp_path / "out"
    with pytest.raises(attnzoo.UnsupportedError, match=r"^variant: cannot be converted layer by layer: 'moh'"):
        surgery.convert_folder(source, out, "moh")
    with pytest.raises(attnzoo.ConfigError, match=r"^calibration: expected token ids, .* got None"):
        surgery.convert_folder(source, out, "lowrank_gqa", **LATENT)
    model, _ = load_checkpoint(source)
    known: Any = surgery.collect(model, surgery.find(model), calibration(1))
    with pytest.raises(attnzoo.ConfigError, match=r"^calibration: expected token ids, .* got statistics"):
        surgery.convert_folder(source, out, "lowrank_gqa", calibration=known, **LATENT)
    with pytest.raises(attnzoo.ConfigError, match=r"^num_kv_heads: expected a divisor"):
        surgery.convert_folder(source, out, "lowrank_gqa", method="mean", num_kv_heads=4)
    with pytest.raises(attnzoo.ConversionError, match="no such file or folder"):
        surgery.convert_folder(tmp_path / "none", out, "lowrank_gqa", **PLAIN)
    surgery.convert_folder(source, out, "lowrank_gqa", **PLAIN)
    with pytest.raises(attnzoo.ConversionError, match="expected a plain checkpoint, got a converted one"):
        surgery.convert_folder(out, tmp_path / "again", "lowrank_gqa", **PLAIN)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
