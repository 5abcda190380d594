"""Edits of heads as a conversion: saved, loaded, beside other conversions, and taken back."""

from __future__ import annotations

import copy
import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from attnzoo import heads, surgery
from attnzoo.heads import HeadEdit, KeyBias
from attnzoo_kernels.errors import ConfigError, ConversionError, UnsupportedError
from tests.attnzoo.surgery.families.hosts import HOSTS, said
from tests.attnzoo.surgery.families.hosts.encoders import encoder
from tests.attnzoo.surgery.tiny import assert_close, assert_untouched, convert, ids, logits, snapshot, tiny

HOST: dict[str, Any] = {"dtype": torch.float32}
EDITS = [
    HeadEdit(0, [4, 1], scale=torch.linspace(-1, 2, 32).view(2, 16), offset=torch.linspace(1, 2, 16)),
    HeadEdit(1, slice(0, 2), ablate="zero", where="last"),
    HeadEdit(1, 1, ablate="mean", value=torch.ones(1, 16), kv=True, where=torch.tensor([[True, False] * 4])),
]


def edited(**more: Any) -> Any:
    model = tiny(**HOST, **more)
    surgery.convert(model, "heads", edits=EDITS)
    return model


def test_a_conversion_is_the_context_and_its_undo_leaves_nothing() -> None:
    model = tiny(**HOST)
    before = snapshot(model)
    with heads.edited(model, EDITS):
        expected = logits(model, ids(2, 8))
    report = surgery.convert(model, "heads", edits=EDITS)
    assert torch.equal(logits(model, ids(2, 8)), expected)
    assert torch.equal(logits(copy.deepcopy(model), ids(2, 8)), expected)
    assert report.to_dict()["options"] == {"edits": 3}
    second = surgery.convert(model, "heads", edits=[HeadEdit(0, 1, scale=2.0)])
    with pytest.raises(ConversionError, match="a later conversion"):
        report.undo()
    second.undo()
    assert torch.equal(logits(model, ids(2, 8)), expected)
    report.undo()
    assert_untouched(model, before)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert not any("attnzoo_head_edits" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("adapter_only", [False, True])
@pytest.mark.parametrize("beside", ["alone", "window", "moh"])
def test_edits_are_saved_and_loaded_beside_other_conversions(adapter_only: bool, beside: str, tmp_path: Path) -> None:
    model = tiny(**HOST)
    if beside == "window":
        convert(model, "mha", window=4, sink=1, block_size=2)
    surgery.convert(model, "heads", edits=EDITS)
    if beside == "moh":
        convert(model, "moh", where=lambda site: site.layer == 0)
    surgery.convert(model, "heads", edits=HeadEdit(0, 4, scale=0.5, offset=torch.ones(16)))
    expected = logits(model, ids(2, 8))
    folder = surgery.save(model, tmp_path / "model", adapter_only=adapter_only)
    loaded, _ = surgery.load(folder, base=tiny(**HOST) if adapter_only else None)
    assert torch.equal(logits(loaded, ids(2, 8)), expected)
    plain = logits(tiny(**HOST), ids(2, 8))
    assert float((plain - expected).abs().max()) > 0.1
    kinds = [entry["kind"] for entry in json.loads((folder / "attnzoo_config.json").read_text())["recipe"]]
    assert kinds.count("heads") == 3


def test_edits_of_what_heads_read_stand_and_are_loaded(tmp_path: Path) -> None:
    edits = [
        HeadEdit(0, [0, 5], key_bias=KeyBias.knock_out([5, 6], [0, 2])),
        HeadEdit(1, 1, kv=True, key_bias=KeyBias.emphasise([1, 3], torch.tensor([1.0, -0.5]))),
        HeadEdit(1, 0, ablate="uniform", where="last", scale=2.0),
    ]
    model = tiny(**HOST)
    before = snapshot(model)
    plain = logits(model, ids(2, 8))
    with heads.edited(model, edits):
        expected = logits(model, ids(2, 8))
    assert_untouched(model, before)
    surgery.convert(model, "heads", edits=edits)
    gc.collect()
    assert torch.equal(logits(model, ids(2, 8)), expected)
    assert torch.equal(logits(copy.deepcopy(model), ids(2, 8)), expected)
    assert float((expected - plain).abs().max()) > 0.1
    folder = surgery.save(model, tmp_path / "model")
    loaded, _ = surgery.load(folder)
    assert torch.equal(logits(loaded, ids(2, 8)), expected)
    with pytest.raises(UnsupportedError, match="edits of what its heads read"):
        convert(model, "moh")
    model.set_attn_implementation("sdpa")
    with pytest.raises(UnsupportedError, match="attn_implementation: expected 'attnzoo'"):
        logits(model, ids(2, 8))


def test_trained_tensors_are_saved_as_they_are_now(tmp_path: Path) -> None:
    model = tiny(**HOST)
    offset = torch.zeros(16, requires_grad=True)
    surgery.convert(model, "heads", edits=HeadEdit(0, 1, offset=offset))
    with torch.no_grad():
        offset += 1
    folder = surgery.save(model, tmp_path / "model", adapter_only=True)
    loaded, _ = surgery.load(folder, base=tiny(**HOST))
    assert torch.equal(logits(loaded, ids(1, 5)), logits(model, ids(1, 5)))


@pytest.mark.parametrize("adapter_only", [False, True])
def test_offsets_fold_where_the_hosts_class_has_no_bias(adapter_only: bool, tmp_path: Path) -> None:
    edits = [EDITS[0], HeadEdit(1, 1, kv=True, ablate="mean", value=torch.ones(3, 16)[:1])]
    model = tiny(**HOST)
    before = snapshot(model)
    with heads.edited(model, edits):
        expected = logits(model, ids(2, 8))
    report = surgery.convert(model, "heads", edits=edits, fold=True)
    found = logits(model, ids(2, 8))
    assert_close(found, expected, 1e-5)
    assert "model.layers.0.self_attn.o_proj.bias" in model.state_dict()
    assert not any(module._forward_pre_hooks for module in model.modules())
    folder = surgery.save(model, tmp_path / "model", adapter_only=adapter_only)
    loaded, _ = surgery.load(folder, base=tiny(**HOST) if adapter_only else None)
    assert torch.equal(logits(loaded, ids(2, 8)), found)
    report.undo()
    assert_untouched(model, before)
    with pytest.raises(UnsupportedError, match=r"edits\[1\]: where='last'"):
        surgery.convert(model, "heads", edits=EDITS, fold=True)
    assert_untouched(model, before)


def test_a_fold_outside_of_the_block_is_saved_too(tmp_path: Path) -> None:
    model = encoder("bert", dtype=torch.float32)
    given = HOSTS["BERT"].inputs(2, 9)
    edit = HeadEdit(1, 2, scale=-1.0, offset=torch.ones(8))
    with heads.edited(model, edit), torch.no_grad():
        expected = said(model, given)
    surgery.convert(model, "heads", edits=edit, fold=True)
    folder = surgery.save(model, tmp_path / "model", adapter_only=True)
    loaded, _ = surgery.load(folder, base=encoder("bert", dtype=torch.float32))
    with torch.no_grad():
        assert_close(said(loaded, given), expected, 1e-5)


def test_what_a_recipe_says_must_fit(tmp_path: Path) -> None:
    folder = surgery.save(edited(), tmp_path / "model", adapter_only=True)
    base = tiny(**HOST)
    before = snapshot(base)
    about = json.loads((folder / "attnzoo_config.json").read_text())
    for change, message in (
        ({"offset": "much"}, "offset: expected a floating tensor"),
        ({"strength": 1.0}, "strength: expected one of"),
        ({"head": [7]}, "expected query heads from 0 to 5"),
        ({"key_bias": {"keys": {"tensor": True}}}, "key_bias.keys: expected a tensor beside"),
    ):
        odd = copy.deepcopy(about)
        odd["recipe"][0]["edits"][0] |= change
        (folder / "attnzoo_config.json").write_text(json.dumps(odd))
        with pytest.raises(ConversionError, match=message):
            surgery.load(folder, base=base)
        assert_untouched(base, before)


def test_conversions_that_would_lose_edits_are_refused() -> None:
    model = edited()
    before = snapshot(model)
    with pytest.raises(UnsupportedError, match="it has edits of heads"):
        convert(model, "lowrank_gqa", method="mean", num_kv_heads=1)
    assert_untouched(model, before)
    found = surgery.inspect(model)
    assert found.reasons[0]["heads"] == () and found.reasons[0]["lowrank_gqa"]
    with pytest.raises(ConfigError, match="layer: expected one of 1, got 0"):
        surgery.convert(model, "heads", edits=EDITS, where=lambda site: site.layer == 1)
    with pytest.raises(ConfigError, match="expected one that changes something"):
        surgery.convert(model, "heads", edits=HeadEdit(0, 1))
    torchs = torch.nn.TransformerEncoderLayer(16, 2, 16, batch_first=True)
    with pytest.raises(UnsupportedError, match="convert it first"):
        surgery.convert(torchs, "heads", edits=HeadEdit(0, 1, scale=2.0))


def test_a_model_in_training_keeps_its_edits_after_a_move_of_its_weights() -> None:
    model = edited().bfloat16()
    found = logits(model, ids(2, 8))
    assert found.dtype == torch.bfloat16
    assert_close(found.float(), logits(edited(), ids(2, 8)), 0.2)
