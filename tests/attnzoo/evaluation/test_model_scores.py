"""Scores, densities and shares of what is read, on models small enough to count by hand."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnzoo
from attnzoo.base.layer import AttentionLayer
from attnzoo.base.steps import Plan
from attnzoo.evaluation import model_scores
from attnzoo_kernels import BlockLayout, Extras
from attnzoo_kernels.errors import ConfigError

VOCAB = 7


class Output(dict[str, Any]):
    """An output as hosts give it: items that are attributes too."""

    __getattr__ = dict.__getitem__


class Bigrams(nn.Module):
    """Says the same behind the same token, whatever came before; a step costs what the clock says."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(1)))
        self.lengths: list[int] = []

    def forward(self, ids: Tensor, **_: Any) -> Any:
        self.lengths.append(ids.shape[1])
        return Output(logits=self.table[ids])


class Stack(Bigrams):
    """The same with layers of attention beside it."""

    def __init__(self, *layers: AttentionLayer) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, ids: Tensor, **_: Any) -> Any:
        for layer in self.layers:
            layer(torch.zeros(*ids.shape, 8))
        return super().forward(ids)


def windows(count: int = 2, length: int = 50) -> Tensor:
    return torch.randint(0, VOCAB, (count, length), generator=torch.Generator().manual_seed(2))


def test_windows_follow_each_other_behind_the_offset() -> None:
    text = torch.arange(30)
    assert model_scores.cut_windows(text, length=4, offset=5, count=2).tolist() == [[5, 6, 7, 8], [9, 10, 11, 12]]
    assert model_scores.cut_windows(text, length=10, offset=0, count=3).shape == (3, 10)
    with pytest.raises(ConfigError, match="31 tokens"):
        model_scores.cut_windows(text, length=10, offset=1, count=3)


def test_every_token_but_the_first_is_scored_by_what_was_said_before_it() -> None:
    model, text = Bigrams(), windows()
    found = model_scores.score(model, text)
    table = model.table.detach().log_softmax(-1)
    expected = [-float(table[row[:-1], row[1:]].mean()) for row in text]
    assert found.nll == pytest.approx(expected, rel=1e-5)
    assert found.mean_nll == pytest.approx(sum(expected) / 2, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(sum(expected) / 2), rel=1e-5)
    assert found.density == 1.0
    assert torch.equal(found.probe, model.table.detach()[text[0, -model_scores.PROBE_ROWS :]])


def test_density_is_the_mean_over_all_layers() -> None:
    windowed = attnzoo.create("mha", dim=8, num_heads=2, window=5, block_size=4)
    dense = attnzoo.create("mha", dim=8, num_heads=2)
    pairs = sum(min(t + 1, 5) for t in range(50)) / (50 * 51 / 2)
    for layers in ((windowed, dense), (dense, windowed)):
        assert model_scores.score(Stack(*layers), windows()).density == pytest.approx((1 + pairs) / 2)


def plan(rows: list[int] | None, keep: Tensor) -> Plan:
    """A plan of one row a head over 10 slots in blocks of 4."""
    layout = BlockLayout.from_mask(keep.view(1, -1, 1, 3), 4, 4, 1, 10)
    q_pos = None if rows is None else torch.tensor(rows, dtype=torch.int32).view(1, -1, 1)
    return Plan(layout, Extras(q_pos=q_pos), causal=True, heads=keep.shape[0])


def test_what_a_step_reads_is_counted_in_slots_of_rows_that_are_there() -> None:
    everything = torch.ones(1, 3, dtype=torch.bool)
    assert model_scores._read_share(plan(None, everything)) == 1.0
    assert model_scores._read_share(plan(None, torch.tensor([[True, False, True]]))) == pytest.approx(6 / 10)
    assert model_scores._read_share(plan([9, -1], torch.ones(2, 3, dtype=torch.bool))) == 0.5


def test_layers_that_share_a_layout_and_differ_in_rows_are_measured_apart() -> None:
    first = plan([9, 9], torch.ones(2, 3, dtype=torch.bool))
    other = Plan(first.layout, Extras(q_pos=torch.full((1, 2, 1), -1, dtype=torch.int32)), causal=True, heads=2)
    measured: list[Plan] = []

    def measure(plan: Plan) -> float:
        measured.append(plan)
        return model_scores._read_share(plan)

    seen: Any = SimpleNamespace(plans={"a": [first, first], "b": [other, first]})
    assert model_scores._mean_of_plans(seen, measure) == pytest.approx(0.75)
    assert measured == [first, other]


def test_warming_up_is_not_timed_and_the_median_step_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, now = Bigrams(), 0.0
    seconds = iter([50.0, 100.0, 100.0, 100.0, 2.0, 4.0, 9.0])

    def forward(ids: Tensor, **more: Any) -> Any:
        nonlocal now
        now += next(seconds)
        return Bigrams.forward(model, ids, **more)

    monkeypatch.setattr(model, "forward", forward)
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    found = model_scores.decode(model, windows()[0], steps=3, warm_up=3)
    assert model.lengths == [50, 1, 1, 1, 1, 1, 1]
    assert found.tokens_per_s == pytest.approx(1 / 4.0)
    assert found.read_share == 1.0
