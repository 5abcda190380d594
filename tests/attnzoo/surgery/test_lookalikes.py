"""A model without a known attention block: every door says what was found and what is known, and none says zero."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPTBigCodeConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
)

from attnzoo import surgery
from attnzoo.cli import main
from attnzoo.evaluation.compare import Comparer, VariantSpec
from attnzoo.surgery.hosts.families.known import REFUSED, known_classes
from attnzoo.surgery.lookalikes import lookalikes
from attnzoo_kernels.errors import ConfigError

SMALL = {"vocab_size": 11, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 16}
BLOOM = {"vocab_size": 11, "hidden_size": 16, "n_layer": 3, "n_head": 2}
FALCON = {"vocab_size": 11, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}


class AnybodysAttention(nn.MultiheadAttention):
    """What somebody has derived from torch's may compute something else."""


def of_a_subclass() -> nn.Module:
    """An encoder of torch's with modules of a subclass."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8), 2, enable_nested_tensor=False)
    for layer in model.layers:
        layer.self_attn = AnybodysAttention(8, 2)
    return model


def hybrid() -> nn.Module:
    """A decoder whose blocks are named, but not classed, as attention, beside one inside another."""
    inner = nn.ModuleDict({"attn": nn.Linear(4, 4), "other": AnybodysAttention(4, 2)})
    return nn.ModuleList([nn.ModuleDict({"attention": nn.ModuleDict({"attn": nn.Linear(4, 4)})}), inner])


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[tuple[str, str], int]]] = {
    "bloom": (
        lambda: AutoModelForCausalLM.from_config(BloomConfig(**BLOOM)),
        {("BloomAttention", "transformer.h.*.self_attention"): 3},
    ),
    "bigcode": (
        lambda: AutoModelForCausalLM.from_config(GPTBigCodeConfig(**SMALL)),
        {("GPTBigCodeAttention", "transformer.h.*.attn"): 3},
    ),
    "falcon": (
        lambda: AutoModelForCausalLM.from_config(FalconConfig(**FALCON)),
        {("FalconAttention", "transformer.h.*.self_attention"): 3},
    ),
    "torch": (
        of_a_subclass,
        {("AnybodysAttention", "layers.*.self_attn"): 2},
    ),
    "hybrid": (
        hybrid,
        {("ModuleDict", "*.attention"): 1, ("Linear", "*.attn"): 1, ("AnybodysAttention", "*.other"): 1},
    ),
    "mamba": (
        lambda: AutoModelForCausalLM.from_config(MambaConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1)),
        {},
    ),
    "nothing": (lambda: nn.Linear(2, 2), {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_no_door_says_zero_or_points_in_a_circle(name: str) -> None:
    build, expected = MODELS[name]
    model = build()
    assert lookalikes(model) == expected
    assert surgery.find(model) == ()
    doors = [
        lambda: surgery.convert(model, "mha", window=4, sink=1),
        lambda: surgery.convert(model, "moh"),
        lambda: surgery.cache_bytes(model),
        lambda: Comparer(model, torch.zeros(1, 8, dtype=torch.int64), None).run([VariantSpec("dense")], {}),
    ]
    for door in doors:
        with pytest.raises(ConfigError, match=r"^model: expected") as raised:
            door()
        said = str(raised.value)
        assert "find(" not in said
        assert all(known in said for known in known_classes())
        for (kind, place), count in expected.items():
            assert f"{count} {kind} at {place}" in said
            assert REFUSED.get(kind, "") in said
        if not expected:
            assert f"{type(model).__name__} has no module that says attention" in said


def test_a_warning_names_the_nearest_classes_and_says_how_many_there_are() -> None:
    with pytest.warns(UserWarning, match="not known") as found:
        surgery.find(MODELS["bloom"][0]())
    (warning,) = found
    said = str(warning.message)
    assert f"{len(known_classes())} classes are known, such as" in said
    assert 1 <= sum(name in said for name in known_classes()) <= 4
    assert len(said) < 400


def test_nothing_is_calibrated_where_there_is_no_site() -> None:
    model = MODELS["bloom"][0]()
    with pytest.raises(ConfigError, match="sites: expected at least one"):
        surgery.collect(model, surgery.find(model), [torch.zeros(1, 4, dtype=torch.int64)])


def test_known_blocks_are_no_lookalikes() -> None:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=7, num_hidden_layers=2, **sizes))
    assert lookalikes(model) == {}
    for conversion in (lambda: surgery.convert(model, "moh"), lambda: surgery.convert(model, "mha", window=4, sink=1)):
        report = conversion()
        assert lookalikes(model) == {}
        report.undo()


@pytest.mark.parametrize("command", ["inspect", "inspect --json", "compare --variants dense", "convert --to moh"])
def test_commands_end_with_what_was_found(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model: Any = AutoModelForCausalLM.from_config(BloomConfig(**BLOOM))
    folder = tmp_path / "bloom"
    model.save_pretrained(folder)
    name, *more = command.split()
    if name == "convert":
        more += ["--out", str(tmp_path / "out")]
    if name == "compare":
        # The text is cut before the model is looked at.
        monkeypatch.setattr("attnzoo.cli.calls.comparing.text_tokens", lambda *_: torch.zeros(4096, dtype=torch.int64))
    monkeypatch.setattr(sys, "argv", ["attnzoo", name, str(folder), *more])
    with pytest.raises(SystemExit) as end:
        main()
    out, err = capsys.readouterr()
    # To look at a model is no wrong call, whatever it has.
    assert end.value.code == (1 if name == "inspect" else 2)
    if "--json" in more:
        found = json.loads(out)
        assert found["sites"] == []
        assert found["kv_bytes_per_token"] is None
        assert [(one["class"], one["count"]) for one in found["unknown"]] == [("BloomAttention", 3)]
        return
    assert out == ""
    assert err.splitlines()[-1].startswith("attnzoo: model: expected attention blocks of a known family, found 3 Bloom")
    assert not (tmp_path / "out").exists()
