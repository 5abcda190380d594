"""The row that stands for what is lost: its bias, its moments, and which heads have one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from attnzoo.cache.policies.duo import Duo
from attnzoo.cache.policies.protocol import policy_from
from attnzoo.cache.policies.razor import Razor, second_moments
from attnzoo_kernels.errors import ConfigError

FULL = torch.tensor([[True, False], [False, False]])


@dataclass
class Scores:
    by_kind: dict[str, Tensor]
    kv_heads: int

    def __getitem__(self, kind: str) -> Tensor:
        return self.by_kind[kind]

    def kv(self, kind: str) -> Tensor:
        return self[kind].unflatten(1, (self.kv_heads, -1)).amax(2)


def test_fourteen_heads_of_a_hundred_by_induction_and_one_by_echo() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = Scores({kind: torch.rand(30, 9, generator=generator) for kind in ("induction", "echo")}, 3)
    full = Razor.from_scores(scores).full
    best = [
        set(scores[kind].flatten().topk(count).indices.tolist()) for kind, count in (("induction", 38), ("echo", 3))
    ]
    expected = {(head // 9, head % 9 // 3) for head in best[0] | best[1]}
    assert {(layer, head) for layer, head in full.nonzero().tolist()} == expected
    # Far more of the KV heads than of the query heads.
    assert len(expected) / 90 > 0.3
    alone = Razor.from_scores(scores, keep=1 / 270, kinds={"echo": 1}).full
    assert alone.sum() == 1
    with pytest.raises(ConfigError, match="keep: expected a share"):
        Razor.from_scores(scores, keep=1.2)
    with pytest.raises(ConfigError, match="kinds: expected"):
        Razor.from_scores(scores, kinds={})


def test_it_holds_what_duo_holds() -> None:
    razor = Razor(FULL, sink=4, window=8, block=4)
    duo = Duo(FULL, sink=4, window=8, block=4)
    assert razor.of_layer(0).retention(2) == duo.of_layer(0).retention(2)
    assert razor.folds
    assert "1 of 4 KV heads full" in repr(razor)
    assert "fold=rotated" in repr(razor)
    assert not Razor(FULL, fold="none").folds
    assert not razor.compacts
    assert not duo.folds


def test_the_bias_is_the_logarithm_of_what_is_lost() -> None:
    mass = torch.tensor([[0.0, 1.0, 7.0]])
    bias = Razor(torch.tensor([False] * 3)).fold_bias(torch.zeros(1, 3, 4), mass)
    assert bias.tolist() == [[-torch.inf, 0.0, pytest.approx(1.9459101)]]


def test_the_moment_is_the_mean_of_what_a_gaussian_lacks() -> None:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(2, 4, 4, generator=generator, dtype=torch.float64) / 3
    q = torch.randn(3, 4, 200, 4, generator=generator, dtype=torch.float64)
    k = torch.randn(1, 2, 500, 4, generator=generator, dtype=torch.float64) @ mix + 1
    moments = second_moments(q, 2, scale=0.7)
    assert moments.shape == (2, 4, 4)
    policy = Razor(torch.tensor([False, False]), bias="moment", moments=moments)
    moment = policy.moment_of(k)
    assert moment is not None
    mean = k.mean(2)
    bias = policy.fold_bias(mean, torch.full((1, 2), 500.0, dtype=torch.float64), moment.mean(2))
    for g in range(2):
        covariance = torch.cov(k[0, g].T, correction=0)
        half = sum(0.5 * 0.7**2 * row @ covariance @ row for h in range(2) for row in q[:, 2 * g + h].flatten(0, 1)) / (
            3 * 200 * 2
        )
        torch.testing.assert_close(bias[0, g], torch.tensor(500.0).double().log() + half, rtol=1e-9, atol=0)
        # It is nearer to the truth, in the mean over queries, than the logarithm alone.
        rows = 0.7 * q[:, 2 * g : 2 * g + 2].flatten(0, 2)
        truth = (torch.logsumexp(rows @ k[0, g].T, 1) - rows @ mean[0, g]).mean()
        assert abs(bias[0, g] - truth) < 0.3 * abs(truth - torch.tensor(500.0).double().log())


def test_keys_that_are_the_same_have_no_spread() -> None:
    moments = second_moments(torch.randn(1, 2, 9, 4, generator=torch.Generator().manual_seed(1)), 1)
    policy = Razor(torch.tensor([False]), bias="moment", moments=moments)
    k = torch.randn(1, 1, 1, 4, generator=torch.Generator().manual_seed(2)).expand(1, 1, 5, 4)
    moment = policy.moment_of(k)
    assert moment is not None
    bias = policy.fold_bias(k[:, :, 0], torch.tensor([[5.0]]), moment.mean(2))
    torch.testing.assert_close(bias, torch.tensor([[5.0]]).log(), rtol=0, atol=1e-5)
    assert policy.fold_bias(k[:, :, 0], torch.tensor([[0.0]]), moment.mean(2) * 0) == -torch.inf


def test_settings_make_it_again() -> None:
    plain = Razor(FULL, sink=0, window=64, fold="none")
    assert policy_from(json.loads(json.dumps(plain.settings()))).settings() == plain.settings()
    assert plain.weights() == {}
    moments = torch.rand(2, 2, 3, 3)
    policy = Razor(FULL, bias="moment", moments=moments)
    again = policy_from(json.loads(json.dumps(policy.settings())), policy.weights())
    assert isinstance(again, Razor)
    assert again.settings() == policy.settings()
    assert torch.equal(again.moments, moments)  # type: ignore[arg-type]
    assert torch.equal(policy.of_layer(1).moments, moments[1:])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("message", "bad"),
    [
        ("fold: expected one of rotated, none, got 'mean'", {"fold": "mean"}),
        ("bias: expected one of log_n, moment, got 'n'", {"bias": "n"}),
        ("moments: expected second moments with bias 'moment'", {"bias": "moment"}),
        ("moments: expected second moments with bias 'moment'", {"moments": torch.rand(2, 2, 3, 3)}),
        ("moments: expected [2, 2, D, D], got [2, 3, 3]", {"bias": "moment", "moments": torch.rand(2, 3, 3)}),
        ("window: expected a multiple of block 64", {"window": 100}),
    ],
)
def test_settings_that_do_not_fit_are_named(message: str, bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as found:
        Razor(FULL, **bad)
    assert str(found.value).startswith(message)
