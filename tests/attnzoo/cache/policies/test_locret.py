"""Rows that trained heads choose: scores beside the oracle's, what they are made from again, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from attnzoo.cache.policies.compose import Compose
from attnzoo.cache.policies.duo import Duo
from attnzoo.cache.policies.locret import Locret, RetainingHead
from attnzoo.cache.policies.protocol import policy_from
from attnzoo.oracles.evictions import retaining_scores
from attnzoo_kernels.errors import ConfigError, ShapeError
from tests.attnzoo.cache.policies.seen import chosen, seen_of


def tokens(count: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    widths = ((4, 6), (2, 6), (2, 5))
    q, k, v = (torch.randn(2, heads, count, width, generator=generator, dtype=dtype) for heads, width in widths)
    return q, k, v


def heads(layers: int) -> list[RetainingHead]:
    torch.manual_seed(0)
    return [RetainingHead(4 * 6 + 2 * 6 + 2 * 5, 2, hidden=8) for _ in range(layers)]


def test_scores_are_the_oracles_and_each_tokens_own() -> None:
    (head,) = heads(1)
    policy = Locret([head.double()], budget=20, local=3)
    q, k, v = tokens(7)
    found = policy.scores_of(q, k, v)
    for b in range(2):
        expected = retaining_scores(q[b], k[b], v[b], head.first.weight, head.second.weight)
        torch.testing.assert_close(found[b], expected, rtol=1e-12, atol=1e-12)
    parts = [policy.scores_of(*(x[:, :, part] for x in (q, k, v))) for part in (slice(0, 3), slice(3, 7))]
    torch.testing.assert_close(torch.cat(parts, 2), found, rtol=1e-12, atol=1e-12)
    assert not found.requires_grad


def test_the_best_scores_and_the_last_tokens_stay() -> None:
    policy = Locret(heads(1), budget=6, local=2)
    seen = seen_of(policy, [[12, 3]], tokens=[12])
    score = seen.signals["score"][0, 0].tolist()
    best = sorted(range(10), key=lambda j: (-score[j], j))[:4]
    assert chosen(policy.keep(seen), seen) == [[[*sorted(best), 10, 11], [0, 1, 2]]]
    held = Locret(heads(1), budget=6, local=2, stabilizers=5).keep(seen)
    assert chosen(held, seen)[0][0][-5:] == [7, 8, 9, 10, 11]


@pytest.mark.parametrize("composed", [False, True])
def test_settings_and_weights_make_it_again(composed: bool) -> None:
    policy = Locret(heads(3), budget=200, local=10, stabilizers=50)
    policy.check(3, 2)
    assert repr(policy) == "Locret(budget=200, retaining=3 layers, stabilizers=50, local=10)"
    whole = Compose(static=Duo(torch.zeros(3, 2, dtype=torch.bool)), score=policy) if composed else policy
    again = policy_from(json.loads(json.dumps(whole.settings())), whole.weights())
    assert again.settings() == whole.settings()
    q, k, v = tokens(4, torch.float32)
    for layer in range(3):
        assert torch.equal(again.of_layer(layer).scores_of(q, k, v), whole.of_layer(layer).scores_of(q, k, v))
    assert again.needs == {"score"}


def test_what_does_not_fit_is_named() -> None:
    q, k, v = tokens(4, torch.float32)
    with pytest.raises(ConfigError, match="retaining: expected the policy of one layer, got that of 2"):
        Locret(heads(2), budget=200).scores_of(q, k, v)
    with pytest.raises(ShapeError, match="q, k, v: expected 46 numbers for a token, got 40"):
        Locret(heads(1), budget=200).scores_of(q, k, v[..., :2])
    with pytest.raises(ConfigError, match="budget: expected 100 rows or more"):
        Locret(heads(1), budget=99)
    with pytest.raises(ConfigError, match="retaining: expected a RetainingHead for each layer"):
        Locret([], budget=200)
    with pytest.raises(ConfigError, match="local: expected a whole number"):
        Locret(heads(1), budget=200, local=-1)
    with pytest.raises(ConfigError, match="retaining: expected a head for layer 1, got 1"):
        Locret(heads(1), budget=200).of_layer(1)
    with pytest.raises(ConfigError, match=r"retaining: expected 3 heads with 2 scores each, got 1 with \[2\]"):
        Locret(heads(1), budget=200).check(3, 2)
    with pytest.raises(ConfigError, match="retaining: expected weights of each layer"):
        policy_from({"policy": "locret", "budget": 200})
    with pytest.raises(ConfigError, match="retaining: expected weights of each layer"):
        policy_from({"policy": "locret", "budget": 200}, {"0.first": torch.rand(8, 3), "1.second": torch.rand(2, 8)})
    with pytest.raises(ConfigError, match=r"retaining: expected weights \[hidden, width\]"):
        policy_from({"policy": "locret", "budget": 200}, {"0.first": torch.rand(8, 3), "0.second": torch.rand(2, 9)})
