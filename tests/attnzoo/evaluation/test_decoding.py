"""Decoding beside the dense model: who steps when, behind how many tokens, and what is read."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnzoo.base.recording import has_layers
from attnzoo.base.steps import Plan
from attnzoo.evaluation import decoding
from attnzoo.evaluation.decoding import ROUNDS, STEPS, Continuation, race, twin_of
from attnzoo_kernels import BlockLayout, Extras
from tests.attnzoo.surgery.conversions import ALL, convert_as
from tests.attnzoo.surgery.tiny import ids, tiny

VOCAB = 7


def plan(rows: list[int] | None, keep: Tensor) -> Plan:
    """A plan of one row a head over 10 slots in blocks of 4."""
    layout = BlockLayout.from_mask(keep.view(1, -1, 1, 3), 4, 4, 1, 10)
    q_pos = None if rows is None else torch.tensor(rows, dtype=torch.int32).view(1, -1, 1)
    return Plan(layout, Extras(q_pos=q_pos), causal=True, heads=keep.shape[0])


def test_what_a_step_reads_is_counted_in_slots_of_rows_that_are_there() -> None:
    everything = torch.ones(1, 3, dtype=torch.bool)
    assert decoding.read_share(plan(None, everything)) == 1.0
    assert decoding.read_share(plan(None, torch.tensor([[True, False, True]]))) == pytest.approx(6 / 10)
    assert decoding.read_share(plan([9, -1], torch.ones(2, 3, dtype=torch.bool))) == 0.5


def test_layers_that_share_a_layout_and_differ_in_rows_are_measured_apart() -> None:
    first = plan([9, 9], torch.ones(2, 3, dtype=torch.bool))
    other = Plan(first.layout, Extras(q_pos=torch.full((1, 2, 1), -1, dtype=torch.int32)), causal=True, heads=2)
    measured: list[Plan] = []

    def measure(plan: Plan) -> float:
        measured.append(plan)
        return decoding.read_share(plan)

    seen: Any = SimpleNamespace(plans={"a": [first, first], "b": [other, first]})
    assert decoding.mean_of_plans(seen, measure) == pytest.approx(0.75)
    assert measured == [first, other]


class Counting(nn.Module):
    """Says the next number behind every token; a call takes what a clock says."""

    device = torch.device("cpu")

    def __init__(self, clock: list[float], seconds: list[float]) -> None:
        super().__init__()
        self.clock, self.left, self.seen = clock, iter(seconds), list[list[int]]()

    def forward(self, tokens: Tensor, **options: Any) -> Any:
        self.clock[0] += next(self.left)
        self.seen.append(tokens[0].tolist())
        logits = nn.functional.one_hot((tokens + 1) % VOCAB, VOCAB)
        return Output(logits=logits[:, -1:] if options.get("logits_to_keep") else logits)


class Output(dict[str, Any]):
    """An output as hosts give it: items that are attributes too."""

    __getattr__ = dict.__getitem__


def test_both_take_turns_behind_steps_that_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    for name in ("perf_counter", "thread_time"):
        monkeypatch.setattr(time, name, lambda: clock[0])
    mine = Counting(clock, [50.0, 99.0, 99.0, *(3.0 + n for n in range(ROUNDS))])
    dense = Counting(clock, [50.0, 99.0, 99.0, *(2.0 * (3.0 + n) for n in range(ROUNDS - 1)), 1.0])
    sequences = []
    for model in (mine, dense):
        sequence = Continuation(model)
        sequence.read(torch.tensor([4, 5]))
        sequences.append(sequence)
    found = race(*sequences)
    assert found.tokens == 2
    # Round by round, and the median counts: one round that is out of order does not.
    assert found.times_dense == pytest.approx(0.5)
    assert found.tokens_per_s == pytest.approx(1 / (3.0 + (ROUNDS - 1) / 2))
    assert found.read_share == 1.0
    # Each goes on with what it said itself.
    assert mine.seen == dense.seen == [[4, 5], *([(6 + n) % VOCAB] for n in range(STEPS))]
    assert sequences[0].tokens == 2 + STEPS


def test_a_prompt_is_read_in_pieces_and_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "PIECE", 30)
    model = tiny(dtype=torch.float32)
    text = ids(1, 100)[0]
    whole, parts = Continuation(model), Continuation(model)
    logits = whole.read_all(text)
    torch.testing.assert_close(logits, model(text.unsqueeze(0)).logits[0])
    parts.read(text[:70])
    assert parts.tokens == 70
    other = parts.copy()
    other.step()
    parts.read(text[70:])
    assert (parts.tokens, other.tokens) == (100, 71)
    whole.step()
    parts.step()
    assert torch.equal(whole._next, parts._next)


@pytest.mark.parametrize("kind", ALL)
def test_a_twin_shares_every_weight_and_no_conversion(kind: str) -> None:
    model = tiny(dtype=torch.float32)
    twin = twin_of(model)
    assert [x.data_ptr() for x in twin.parameters()] == [x.data_ptr() for x in model.parameters()]
    text = ids(1, 40)
    before = model(text).logits
    convert_as(model, kind)
    assert torch.equal(twin(text).logits, before)
    assert not has_layers(twin)
