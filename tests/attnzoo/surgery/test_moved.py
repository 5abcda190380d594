"""Undoing a conversion of a model that has moved since: old blocks come back as the model is by then, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnzoo
from attnzoo import surgery
from tests.attnzoo.surgery.conversions import ALL, BY_LAYERS, LOWRANK, convert_as
from tests.attnzoo.surgery.tiny import assert_untouched, ids, logits, snapshot, tiny

LOST = ("latent", "commuting", "mean", "expand")
"""Kinds whose old blocks have weights that are no part of the converted model."""


def frozen(model: Any) -> None:
    model.requires_grad_(False)


def keys_frozen(model: Any) -> None:
    for name, parameter in model.named_parameters():
        # A latent has one weight for both.
        if any(part in name for part in ("k_proj", "v_proj", "kv_up")):
            parameter.requires_grad_(False)


MOVES: dict[str, Callable[[Any], Any]] = {
    "bf16": lambda model: model.to(torch.bfloat16),
    "double": lambda model: model.double(),
    "keys frozen": keys_frozen,
    "half, training, frozen": lambda model: (model.train(), model.half(), frozen(model)),
}


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("move", MOVES)
def test_old_blocks_come_back_as_the_model_is_by_then(kind: str, move: str) -> None:
    # What the same moves make of a model that was never converted is what must come back.
    model, plain = tiny(dtype=torch.float32), tiny(dtype=torch.float32)
    report = convert_as(model, kind)
    MOVES[move](model)
    report.undo()
    MOVES[move](plain)
    assert {n: (x.dtype, x.device) for n, x in model.state_dict().items()} == {
        n: (x.dtype, x.device) for n, x in plain.state_dict().items()
    }
    assert {n: m.training for n, m in model.named_modules()} == {n: m.training for n, m in plain.named_modules()}
    assert {n: p.requires_grad for n, p in model.named_parameters()} == {
        n: p.requires_grad for n, p in plain.named_parameters()
    }
    assert all(torch.equal(x, plain.state_dict()[n]) for n, x in model.state_dict().items())
    assert torch.equal(logits(model, ids(1, 9)), logits(plain, ids(1, 9)))


@pytest.mark.parametrize("kind", ALL)
def test_a_model_that_has_not_moved_gets_back_what_was_there_whatever_that_was(kind: str) -> None:
    # Modes and trainability that differ from projection to projection.
    model = tiny(dtype=torch.float32).train()
    block = model.model.layers[0].self_attn
    block.k_proj.requires_grad_(False)
    block.v_proj.eval()
    before = snapshot(model)
    convert_as(model, kind).undo()
    assert_untouched(model, before)


@pytest.mark.parametrize(
    "kinds", [("expand", "window"), ("expand", "mean"), ("window", "latent"), ("mean", "replaced-mha")]
)
def test_nested_conversions_come_back_through_every_step(kinds: tuple[str, str]) -> None:
    model, plain = tiny(dtype=torch.float32), tiny(dtype=torch.float32).bfloat16().train()
    reports = []
    for kind in kinds:
        reports.append(convert_as(model, kind))
    model.bfloat16().train()
    with pytest.raises(attnzoo.ConversionError, match=r"^undo: a later conversion"):
        reports[0].undo()
    for report in reversed(reports):
        report.undo()
    assert torch.equal(logits(model, ids(1, 9)), logits(plain, ids(1, 9)))
    assert all(module.training for module in model.modules())
    for report in reports:
        with pytest.raises(attnzoo.ConversionError, match=r"^undo: this conversion was undone before"):
            report.undo()


class Linear(nn.Module):
    """As an adapter wraps a projection, by the name that PEFT's own has."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.in_features, self.out_features = base.in_features, base.out_features

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x)


@pytest.mark.parametrize("kind", [*LOWRANK, *BY_LAYERS])
def test_an_adapter_that_undo_would_drop_is_refused_by_name_and_undone_when_it_is_off(kind: str) -> None:
    model, tokens = tiny(dtype=torch.float32), ids(1, 9)
    before, dense = snapshot(model), logits(model, tokens)
    report = convert_as(model, kind)
    block = model.get_submodule(surgery.find(model)[1].path)
    inner = block if "q_proj" in dict(block.named_children()) else block.get_submodule("layer")
    plain = inner.q_proj
    inner.q_proj = Linear(plain)
    state = snapshot(model)
    with pytest.raises(attnzoo.ConversionError, match=rf"^undo: .*\.q_proj: .*{Linear.__module__}\.Linear.*PEFT"):
        report.undo()
    assert_untouched(model, state)
    inner.q_proj = plain
    report.undo()
    assert_untouched(model, before)
    assert torch.equal(logits(model, tokens), dense)


@pytest.mark.parametrize("kind", ALL)
def test_a_block_that_somebody_else_has_replaced_is_refused_by_name(kind: str) -> None:
    model, other = tiny(dtype=torch.float32), tiny(dtype=torch.float32)
    report = convert_as(model, kind)
    ours = model.model.layers[1].self_attn
    model.model.layers[1].self_attn = other.model.layers[1].self_attn
    with pytest.raises(
        attnzoo.ConversionError, match=r"^undo: model\.layers\.1\.self_attn: .*modeling_llama\.LlamaAtt"
    ):
        report.undo()
    # Nothing was put back by half.
    assert type(model.model.layers[0].self_attn) is type(ours)
    model.model.layers[1].self_attn = ours
    report.undo()
    assert torch.equal(logits(model, ids(1, 9)), logits(other, ids(1, 9)))


@pytest.mark.parametrize("kind", LOST)
def test_weights_that_are_gone_by_then_are_refused_by_name(kind: str) -> None:
    model = tiny(dtype=torch.float32)
    report = convert_as(model, kind)
    model.to("meta")
    with pytest.raises(attnzoo.ConversionError, match=r"^undo: .*on the meta device"):
        report.undo()


def test_an_adapter_in_a_block_that_only_reads_otherwise_stays() -> None:
    model, tokens = tiny(dtype=torch.float32), ids(1, 9)
    dense = logits(model, tokens)
    report = convert_as(model, "window")
    block = model.model.layers[0].self_attn
    block.q_proj = adapter = Linear(block.q_proj)
    report.undo()
    assert model.model.layers[0].self_attn.q_proj is adapter
    assert torch.equal(logits(model, tokens), dense)
