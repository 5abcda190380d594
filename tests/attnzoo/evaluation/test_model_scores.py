"""Scores and densities, on models small enough to count by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnzoo
from attnzoo.base.layer import AttentionLayer
from attnzoo.evaluation import model_scores
from attnzoo_kernels.errors import ConfigError

VOCAB = 7


class Output(dict[str, Any]):
    """An output as hosts give it: items that are attributes too."""

    __getattr__ = dict.__getitem__


class Bigrams(nn.Module):
    """Says the same behind the same token, whatever came before."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(1)))

    def forward(self, ids: Tensor, **_: Any) -> Any:
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
