"""Policies as people type them: what is built, which heads are chosen, and what is refused before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnzoo import policies
from attnzoo.evaluation.two_phase.presets import CONTROLS, POLICY_PRESETS, SETTINGS, preset
from attnzoo.evaluation.two_phase.specs import PolicySpec, fit, random_heads
from attnzoo.heads import HeadScores, score_heads
from attnzoo_kernels.errors import ConfigError
from tests.attnzoo.surgery.tiny import tiny

SCORES = HeadScores({"induction": torch.arange(12.0).view(2, 6), "echo": torch.arange(12.0, 0, -1).view(2, 6)}, 2)


def built(text: str, scores: HeadScores | None = SCORES) -> Any:
    return PolicySpec.parse(text).policy(2, 2, scores)


def test_settings_are_those_that_were_typed() -> None:
    policy = built("duo:keep=0.5,sink=8,window=16,block=8")
    assert isinstance(policy, policies.Duo)
    assert (policy.sink, policy.window, policy.block) == (8, 16, 8)
    kept = built("snapkv:share=0.4")
    assert (kept.name, kept.share) == ("snapkv", 0.4)


def test_heads_are_chosen_by_scores_or_by_lot() -> None:
    # The best by induction are the last ones, the best by echo the first.
    assert built("duo:keep=0.5,heads=induction").full.tolist() == [[False, False], [True, True]]
    assert built("duo:keep=0.5,heads=echo").full.tolist() == [[True, True], [False, False]]
    assert torch.equal(built("duo:keep=0.5").full, policies.Duo.from_scores(SCORES, 0.5).full)
    by_lot = built("duo:keep=0.5,heads=random,seed=3", None).full
    assert torch.equal(by_lot, random_heads(2, 2, 0.5, 3))
    assert int(by_lot.sum()) == 2


def test_random_heads_are_a_share_rounded_down_and_differ_by_seed() -> None:
    assert int(random_heads(30, 3, 0.25, 0).sum()) == 22
    assert torch.equal(random_heads(30, 3, 0.25, 5), random_heads(30, 3, 0.25, 5))
    assert not torch.equal(random_heads(30, 3, 0.25, 5), random_heads(30, 3, 0.25, 6))


def test_parts_are_put_together_by_what_they_say() -> None:
    policy = built("duo:keep=0.5,sink=16,window=32,block=16+pages:page=16,budget=64")
    assert isinstance(policy, policies.Compose)
    assert {name: part.name for name, part in policy.parts().items()} == {"static": "duo", "read": "pages"}
    with pytest.raises(ConfigError, match=r"policy: expected parts of different kinds, got snapkv\+knorm"):
        built("snapkv:share=0.4+knorm:share=0.2")


WRONG = [
    ("duoo", "did you mean 'duo'"),
    ("dense", "policy: expected a policy, got 'dense', which is measured in any case"),
    ("duo:wndow=64", "did you mean 'window'"),
    ("duo:window", "policy: expected duo:name=value,..., got 'duo:window'"),
    ("duo:window=60", "window: expected a multiple of block 64"),
    ("duo:keep=2", "keep: expected a share from 0 to 1, got 2"),
    ("duo:heads=best", "heads: expected one of razor, induction, echo, random, got 'best'"),
    ("snapkv:keep=0.5,share=0.4", "keep: expected one of snapkv options"),
    ("snapkv", "budget: expected one of budget and share"),
    ("snapkv:share=0.4,budget=100", "budget: expected one of budget and share"),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_what_cannot_be_is_refused_without_a_model(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        PolicySpec.parse(text)
    assert message in str(error.value)


def test_scores_are_asked_for_only_where_heads_are_chosen_by_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(dtype=torch.float32)
    asked: list[Any] = []
    monkeypatch.setattr(
        "attnzoo.evaluation.two_phase.specs.score_heads",
        lambda model, **more: asked.append(model) or score_heads(model, length=8, **more),
    )
    by_lot = [PolicySpec.parse("duo:keep=0.5,heads=random"), PolicySpec.parse("snapkv:share=0.4", "rows", control=True)]
    found = fit(model, by_lot)
    assert not asked
    assert [(one.name, one.policy.name, one.control) for one in found] == [
        ("duo:keep=0.5,heads=random", "duo", False),
        ("rows", "snapkv", True),
    ]
    fit(model, [PolicySpec.parse("duo:keep=0.5"), PolicySpec.parse("razor:keep=0.5")])
    assert asked == [model]


def test_presets_are_policies_at_three_shares() -> None:
    for name in POLICY_PRESETS:
        rows = preset(name)
        assert len({row.name for row in rows}) == len(rows)
        assert any(row.control for row in rows)
    assert set(SETTINGS) >= CONTROLS
    everything = preset("policies")
    assert {row.name.rpartition(": ")[2] for row in everything} == {"40 %", "20 %", "10 %"}
    for row in everything:
        row.policy(2, 2, SCORES)
