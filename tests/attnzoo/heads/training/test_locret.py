"""Retaining heads: labels and loss beside plain loops, what is captured of a model, and that training learns it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnzoo.heads.training.locret import (
    RetainingCase,
    RetainingTraining,
    answer_labels,
    retaining_cases,
    retaining_heads,
    retaining_loss,
    train_retaining_head,
)
from attnzoo_kernels.errors import ConfigError, ShapeError
from tests.attnzoo.heads.hosts import FAMILIES, host


def test_a_label_is_the_largest_logit_of_an_answer_and_of_a_group() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 3, 6, generator=generator)
    k = torch.randn(2, 2, 5, 6, generator=generator)
    found = answer_labels(q, k)
    for b in range(2):
        for g in range(2):
            for t in range(5):
                logits = [q[b, h, a] @ k[b, g, t] / 6**0.5 for h in (2 * g, 2 * g + 1) for a in range(3)]
                torch.testing.assert_close(found[b, g, t], max(logits))
    torch.testing.assert_close(answer_labels(q, k, 1.0), found * 6**0.5)
    with pytest.raises(ShapeError, match="q: expected queries"):
        answer_labels(q[:, :, :0], k)
    with pytest.raises(ShapeError, match="q: expected queries"):
        answer_labels(q[:, :3], k)


def test_the_loss_is_that_of_its_formula() -> None:
    scores = torch.tensor([[[0.0, 2.0, 1.0]]])
    labels = torch.tensor([[[0.5, 0.0, 1.0]]])
    assert float(retaining_loss(scores, labels, 0.1)) == pytest.approx((0.125 + 1.5 + 0) / 3 + 0.1 * (4 + 1) / 2)
    assert float(retaining_loss(scores[..., :1], labels[..., :1])) == pytest.approx(0.125)


def test_rates_rise_over_a_tenth_and_fall_to_nothing() -> None:
    training = RetainingTraining(steps=20)
    rates = [training.rate(step) for step in range(20)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 0 < rates[-1] < 0.1
    for bad in ({"steps": 0}, {"hidden": 0}, {"lr": 0.0}, {"smoothness": -1.0}):
        with pytest.raises(ConfigError, match=f"{next(iter(bad))}: expected"):
            RetainingTraining(**bad)


def test_a_head_learns_what_its_tokens_tell() -> None:
    generator = torch.Generator().manual_seed(0)
    cases = []
    for _ in range(40):
        q, k, v = (torch.randn(1, heads, 40, 4, generator=generator) for heads in (4, 2, 2))
        # What a key's first channel says.
        cases.append(RetainingCase(q, k, v, 3 * k[..., 0]))
    training = RetainingTraining(hidden=32, steps=300, lr=3e-3)
    head = train_retaining_head(cases, training)
    again = train_retaining_head(cases, training)
    before = train_retaining_head(cases, RetainingTraining(hidden=32, steps=1, lr=1e-9))
    q, k, v = (torch.randn(1, heads, 40, 4, generator=generator) for heads in (4, 2, 2))
    error = [float((each(q, k, v) - 3 * k[..., 0]).abs().mean()) for each in (head, before)]
    assert error[0] < 0.3 * error[1]
    assert torch.equal(again.first.weight, head.first.weight)
    assert not head.first.weight.requires_grad
    with pytest.raises(ConfigError, match="cases: expected one or more"):
        train_retaining_head([])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_is_shown_its_tokens_before_rotation(family: str) -> None:
    model = host(family)
    ids = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(0))
    cases = retaining_cases(model, ids, 9)
    assert len(cases) == 2
    seen: list[torch.Tensor] = []
    attention = model.model.layers[0].self_attn
    hook = attention.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    with hook, torch.no_grad():
        model(ids)
    hidden = seen[0][:, :9]
    assert cases[0].q.shape[:3] == (2, 6, 9)
    assert cases[0].labels.shape == (2, 2, 9)
    with torch.no_grad():
        v = attention.v_proj(hidden).unflatten(2, (2, -1)).transpose(1, 2)
        k = attention.k_proj(hidden).unflatten(2, (2, -1))
        k = (attention.k_norm(k) if family == "qwen3" else k).transpose(1, 2)
    torch.testing.assert_close(cases[0].v, v)
    torch.testing.assert_close(cases[0].k, k)
    with pytest.raises(ShapeError, match="answer: expected a place inside ids"):
        retaining_cases(model, ids, 12)


def test_every_layer_has_a_head_of_its_own() -> None:
    model: Any = host("llama")
    before = {name: x.clone() for name, x in model.state_dict().items()}
    ids = torch.randint(0, 61, (1, 20), generator=torch.Generator().manual_seed(0))
    heads = retaining_heads(model, [(ids, 15)], RetainingTraining(hidden=8, steps=2))
    assert [(head.first.weight.shape, head.second.weight.shape) for head in heads] == [((8, 10 * 16), (2, 8))] * 2
    assert not torch.equal(heads[0].first.weight, heads[1].first.weight)
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    with pytest.raises(ConfigError, match="prompts: expected one or more"):
        retaining_heads(model, [])
