"""One row of a converted block: read without a plan where that is known beforehand, and by a plan where it must be."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from transformers import StaticCache

import attnzoo
from attnzoo import surgery
from attnzoo.base.decoding import step
from attnzoo.surgery.hosts import attention_function, one_row
from attnzoo.surgery.hosts.calls import cache_name
from attnzoo.surgery.hosts.positions import are_counted
from attnzoo_kernels import attend_slots
from tests.attnzoo.surgery.conversions import convert_as
from tests.attnzoo.surgery.hosts.masks import padding_mask
from tests.attnzoo.surgery.tiny import READING, assert_close, ids, logits, tiny

EXACT = 1e-11
LENGTH = 26
BEGIN = 18
"""Behind which tokens are decoded one by one: beyond a window of 9."""

_models: dict[str, Any] = {}


def model_of(kind: str) -> Any:
    """One converted model of each kind; what a test changes it changes back."""
    if kind not in _models:
        _models[kind] = tiny()
        convert_as(_models[kind], kind, **({"evict": False} if kind in READING else {}))
    return _models[kind]


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Slots that rows had beforehand, one entry for each row."""
    found: list[int] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, slots: Any, **more: Any) -> Tensor:
        found.append(k.shape[2])
        return attend_slots(q, k, v, slots, **more)

    monkeypatch.setattr(one_row, "attend_slots", attend)
    monkeypatch.setattr(step, "attend_slots", attend)
    return found


def decode(model: Any, tokens: Tensor, *, mask: Tensor | None = None, grad: bool = False, poison: bool = False) -> Any:
    """Logits behind each of the last tokens, decoded one by one."""
    name = cache_name(type(model).forward)
    cache = surgery.new_cache(model)
    said = []
    with torch.no_grad():
        model(tokens[:, :BEGIN], attention_mask=None if mask is None else mask[:, :BEGIN], **{name: cache})
    if poison:
        for layer in cache.layers:
            # Between a sink of 2 and a window of 9.
            layer.keys[:, :, 2 : BEGIN - 8] = torch.nan
            layer.values[:, :, 2 : BEGIN - 8] = torch.nan
    for at in range(BEGIN, tokens.shape[1]):
        seen = None if mask is None else mask[:, : at + 1]
        with torch.set_grad_enabled(grad):
            said.append(model(tokens[:, at : at + 1], attention_mask=seen, **{name: cache}).logits.detach())
    return torch.cat(said, 1)


@pytest.mark.parametrize("kind", [*READING, "replaced-mha"])
def test_decoding_makes_no_plan_and_says_what_one_call_says(kind: str, rows: list[int]) -> None:
    model, tokens = model_of(kind), ids(2, LENGTH)
    assert_close(decode(model, tokens), logits(model, tokens)[:, BEGIN:], EXACT)
    assert len(rows) == 2 * (LENGTH - BEGIN)


def test_slots_that_nobody_reads_may_hold_anything(rows: list[int]) -> None:
    model, tokens = model_of("window"), ids(2, LENGTH)
    assert_close(decode(model, tokens, poison=True), logits(model, tokens)[:, BEGIN:], EXACT)
    assert rows


@pytest.mark.parametrize("kind", ["window", "replaced-mha"])
@pytest.mark.parametrize("what", ["padding", "gradients", "a record", "an implementation by name"])
def test_calls_that_need_a_plan_have_one(kind: str, what: str, rows: list[int]) -> None:
    model, tokens = model_of(kind), ids(2, LENGTH)
    mask = padding_mask([4, 0], LENGTH) if what == "padding" else None
    blocks = [layer.self_attn for layer in model.model.layers]
    layers = [block.layer if kind == "replaced-mha" else attention_function.pattern_of(block).layer for block in blocks]
    if what == "an implementation by name":
        for layer in layers:
            layer.impl = "reference"
    try:
        with attnzoo.record(model) if what == "a record" else nullcontext() as seen:
            found = decode(model, tokens, mask=mask, grad=what == "gradients")
    finally:
        for layer in layers:
            layer.impl = "auto"
    assert_close(found, logits(model, tokens, attention_mask=mask)[:, BEGIN:], EXACT)
    assert not rows
    if what == "a record":
        assert all(len(plans) == 1 + LENGTH - BEGIN for plans in seen.plans.values())


def test_positions_of_the_callers_own_are_rotated_by() -> None:
    model, tokens = model_of("replaced-mha"), ids(1, LENGTH)
    name = cache_name(type(model).forward)
    places = torch.arange(LENGTH).unsqueeze(0) + torch.tensor([3 * (t > 20) for t in range(LENGTH)])
    expected = logits(tiny(), tokens, position_ids=places)
    cache = surgery.new_cache(model)
    with torch.no_grad():
        said = [model(tokens[:, :BEGIN], position_ids=places[:, :BEGIN], **{name: cache}).logits]
        for t in range(BEGIN, LENGTH):
            said.append(model(tokens[:, t : t + 1], position_ids=places[:, t : t + 1], **{name: cache}).logits)
    assert_close(torch.cat(said, 1), expected, EXACT)


def test_positions_are_compared_with_those_that_a_layer_counts_by_itself() -> None:
    # Every third slot is a landmark, which has the position of the token before it.
    assert are_counted(torch.tensor([[0, 1, 1, 2, 3, 3, 4]]), 0, 3)
    assert are_counted(torch.tensor([[3, 3, 4]]), 4, 3)
    places = torch.tensor([[4, 5]])
    assert are_counted(places, 4)
    assert not are_counted(places, 4, 3)
    assert are_counted(places, 6, 3)
    assert not are_counted(places, 6)


def test_positions_that_are_changed_in_place_are_read_again() -> None:
    places = torch.arange(4, 8).unsqueeze(0)
    assert are_counted(places, 4)
    assert are_counted(places, 4)
    assert not are_counted(places, 3)
    places[0, 2] += 1
    assert not are_counted(places, 4)


@pytest.mark.parametrize("kind", ["latent", *(pytest.param(kind, marks=pytest.mark.slow) for kind in READING)])
def test_a_step_with_a_static_cache_compiles_to_one_graph(kind: str) -> None:
    model, tokens = model_of(kind), ids(1, 10)
    name = cache_name(type(model).forward)
    cache = StaticCache(config=model.config, max_cache_len=32)
    graphs = CompileCounter()
    torch._dynamo.reset()
    run = torch.compile(model, fullgraph=True, backend=graphs)
    with torch.no_grad():
        model(tokens[:, :6], **{name: cache})
        said = [run(tokens[:, t : t + 1], **{name: cache}).logits for t in range(6, 10)]
    assert_close(torch.cat(said, 1), logits(model, tokens)[:, 6:], EXACT)
    assert graphs.frame_count == 1
