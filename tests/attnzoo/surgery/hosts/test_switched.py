"""A converted model whose attention implementation is set to another: refused at the call, never dense in silence."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

import attnzoo
from attnzoo import surgery
from attnzoo.surgery.hosts import attention_function
from tests.attnzoo.surgery.conversions import READ, REPLACED, convert_as
from tests.attnzoo.surgery.hosts.masks import padding_mask
from tests.attnzoo.surgery.tiny import assert_untouched, ids, logits, snapshot, tiny

KINDS = (*READ, *REPLACED)
SAID = r"^attn_implementation: expected 'attnzoo'.* got '(sdpa|eager)'; .*set_attn_implementation.*undo\(\)"


def assign(model: Any) -> None:
    model.config._attn_implementation = "sdpa"


def assign_to_a_block(model: Any) -> None:
    block = model.model.layers[1].self_attn
    block.config = copy.copy(block.config)
    block.config._attn_implementation = "eager"


WAYS: dict[str, Callable[[Any], None]] = {
    "method": lambda model: model.set_attn_implementation("sdpa"),
    "dict": lambda model: model.set_attn_implementation({"": "eager"}),
    "submodel": lambda model: model.model.set_attn_implementation("sdpa"),
    "assigned": assign,
    "assigned to a block": assign_to_a_block,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_another_implementation_is_refused_at_the_call_and_can_be_taken_back(kind: str, way: str) -> None:
    model, tokens = tiny(), ids(1, 12)
    before, dense = snapshot(model), logits(model, tokens)
    report = convert_as(model, kind)
    said = logits(model, tokens)
    WAYS[way](model)
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(attnzoo.UnsupportedError, match=SAID):
            logits(twin, tokens)
    if way == "assigned to a block":
        return
    model.set_attn_implementation("attnzoo")
    assert torch.equal(logits(model, tokens), said)
    WAYS[way](model)
    report.undo()
    assert_untouched(model, before)
    assert torch.equal(logits(model, tokens), dense)


class Wrapper(nn.Module):
    """As PEFT wraps a model: another module round it, whose configuration is the model's."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.base_model = model
        self.config = model.config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)


def test_a_wrapped_model_is_refused_too() -> None:
    model = tiny()
    convert_as(model, "window")
    wrapped = Wrapper(model)
    wrapped.config._attn_implementation = "sdpa"
    with pytest.raises(attnzoo.UnsupportedError, match=SAID):
        logits(wrapped, ids(1, 12))


def test_a_model_that_is_converted_in_part_is_refused_and_one_with_other_weights_alone_is_not() -> None:
    model, tokens = tiny(), ids(1, 12)
    convert_as(model, "window", where=lambda site: site.layer == 1)
    model.set_attn_implementation("sdpa")
    with pytest.raises(attnzoo.UnsupportedError, match=SAID):
        logits(model, tokens)
    other = tiny(attn_implementation="eager")
    convert_as(other, "mean")
    other.set_attn_implementation("sdpa")
    assert bool(logits(other, tokens).isfinite().all())


@pytest.mark.parametrize("which", [AttentionInterface, AttentionMaskInterface])
def test_another_function_by_our_name_is_refused(which: Any) -> None:
    model, tokens = tiny(), ids(1, 12)
    convert_as(model, "window")
    said = logits(model, tokens)
    try:
        which.register("attnzoo", lambda *args, **kwargs: None)
        with pytest.raises(attnzoo.UnsupportedError, match=r"^attn_implementation: expected attnzoo's own "):
            attention_function.check_implementation(model.config)
        with pytest.raises((attnzoo.UnsupportedError, TypeError)):
            logits(model, tokens, attention_mask=padding_mask([3], 12))
    finally:
        attention_function.register()
    assert torch.equal(logits(model, tokens), said)


def test_models_that_share_a_configuration_are_undone_in_any_order() -> None:
    tokens = ids(1, 12)
    for order in ((0, 1), (1, 0)):
        models = [tiny(), tiny(seed=1)]
        for module in models[1].modules():
            if hasattr(module, "config"):
                module.config = models[0].config
        dense = [logits(model, tokens) for model in models]
        reports = [convert_as(model, "window") for model in models]
        reports[order[0]].undo()
        reports[order[1]].undo()
        assert models[0].config._attn_implementation == "sdpa"
        assert all(torch.equal(logits(model, tokens), said) for model, said in zip(models, dense, strict=True))


def test_a_block_with_a_configuration_of_its_own_is_switched_and_switched_back() -> None:
    model, tokens = tiny(), ids(1, 12)
    block = model.model.layers[1].self_attn
    block.config = copy.copy(block.config)
    dense = logits(model, tokens)
    report = convert_as(model, "window")
    with attnzoo.record(model) as record:
        logits(model, tokens)
    assert [len(plans) for plans in record.plans.values()] == [1, 1]
    report.undo()
    assert block.config._attn_implementation == "sdpa"
    assert torch.equal(logits(model, tokens), dense)


def test_a_read_pattern_that_is_gone_with_its_block_is_not_saved_as_if_it_stood(tmp_path: Path) -> None:
    model, other = tiny(), tiny(seed=1)
    convert_as(model, "window")
    model.model.layers[1].self_attn = other.model.layers[1].self_attn
    with pytest.raises(
        attnzoo.ConversionError, match=r"^model: model\.layers\.1\.self_attn: expected the read pattern of 'mha'"
    ):
        surgery.save(model, tmp_path / "model")


@pytest.mark.parametrize("kind", ["window", "latent", "replaced-mha"])
def test_a_pickled_model_reads_as_it_should_where_nothing_was_registered(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in another process that only loads the pickle.
    model, tokens = tiny(), ids(2, 12)
    convert_as(model, kind)
    said, stored = logits(model, tokens), pickle.dumps(model)
    for which in (AttentionInterface, AttentionMaskInterface):
        monkeypatch.delitem(which._global_mapping, "attnzoo")
    assert torch.equal(logits(pickle.loads(stored), tokens), said)
