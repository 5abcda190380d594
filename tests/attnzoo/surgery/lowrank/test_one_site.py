"""Calibration that says what it holds, and that can hold one site's statistics at a time, with the same result."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

import attnzoo
from attnzoo import surgery
from attnzoo.surgery.lowrank import calibration as statistics
from attnzoo.surgery.lowrank import one_site
from attnzoo.surgery.lowrank.calibration import SiteStatistics
from tests.attnzoo.surgery.tiny import assert_untouched, calibration, convert, ids, logits, snapshot, tiny

SITES = 3
METHODS: list[dict[str, Any]] = [
    {"method": "commuting", "num_kv_heads": 1},
    {"method": "commuting", "num_kv_heads": 1, "gradients": False},
    {"method": "commuting", "num_kv_heads": 1, "refit": False},
    {"method": "latent", "latent_dim": 20},
]


def held(site: SiteStatistics) -> int:
    parts = (site.moment, site.first, site.weighted, site.fisher)
    return sum(x.numel() * x.element_size() for x in parts if x is not None)


class Counter:
    """The most bytes that living statistics have held at once, looked at whenever progress is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.living: weakref.WeakSet[SiteStatistics] = weakref.WeakSet()
        self.most, self.told = 0, list[tuple[str, int, int]]()
        living = self.living

        class Counted(SiteStatistics):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                living.add(self)

        monkeypatch.setattr(statistics, "SiteStatistics", Counted)

    def progress(self, what: str, done: int, count: int) -> None:
        self.told.append((what, done, count))
        self.most = max(self.most, sum(held(site) for site in self.living))


@pytest.mark.parametrize("options", METHODS, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("bias", [False, True])
def test_one_site_at_a_time_gives_the_same_weights_and_holds_one(
    options: dict[str, Any], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = []
    for alone in (False, True):
        model, counter = tiny(layers=SITES, attention_bias=bias).train(), Counter(monkeypatch)
        gradients = options.get("gradients", True)
        promised = surgery.statistics_bytes(model, surgery.find(model), gradients=gradients)
        convert(
            model,
            "lowrank_gqa",
            calibration=calibration(2),
            progress=counter.progress,
            one_site_at_a_time=alone,
            **options,
        )
        assert counter.most == (max(promised.values()) if alone else sum(promised.values()))
        assert counter.told[0][0] == f"statistics, {one_site.in_words(counter.most)}"
        states.append(model.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())


def test_only_the_last_value_is_kept_and_asking_again_makes_nothing() -> None:
    made: list[str] = []
    found = one_site.Lazily(["a", "b"], lambda key: (made.append(key), key * 2)[1])
    assert [found["a"], found["a"], found["b"], found["a"]] == ["aa", "aa", "bb", "aa"]
    assert made == ["a", "b", "a"]
    assert (list(found), len(found), found.get("c")) == (["a", "b"], 2, None)


@pytest.mark.parametrize("alone", [False, True])
def test_statistics_that_do_not_fit_are_refused_before_anything_runs(
    alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(layers=SITES)
    before, each = snapshot(model), max(surgery.statistics_bytes(model, surgery.find(model)).values())
    options = {"method": "latent", "latent_dim": 20, "calibration": calibration(1), "one_site_at_a_time": alone}
    monkeypatch.setattr(one_site, "available_bytes", lambda: each - 1 if alone else SITES * each - 1)
    model.register_forward_pre_hook(lambda *_: pytest.fail("the text was run"))
    with pytest.raises(
        attnzoo.ConfigError, match=r"^calibration: expected statistics that fit into the .* got "
    ) as seen:
        convert(model, "lowrank_gqa", **options)
    assert ("one_site_at_a_time=True" in str(seen.value)) != alone
    model._forward_pre_hooks.clear()
    assert_untouched(model, before)
    monkeypatch.setattr(one_site, "available_bytes", lambda: each if alone else SITES * each)
    convert(model, "lowrank_gqa", **options)
    assert bool(logits(model, ids(1, 9)).isfinite().all())


def test_where_it_can_do_nothing_it_is_refused_by_name() -> None:
    model = tiny()
    with pytest.raises(attnzoo.ConfigError, match=r"^one_site_at_a_time: expected False with method 'mean'"):
        convert(model, "lowrank_gqa", method="mean", num_kv_heads=1, one_site_at_a_time=True)
    with pytest.raises(attnzoo.ConfigError, match=r"^one_site_at_a_time: "):
        convert(model, "lowrank_gqa", method="mean", num_kv_heads=1, one_site_at_a_time=1)
    known = surgery.collect(model, surgery.find(model), calibration(1))
    with pytest.raises(attnzoo.ConfigError, match=r"^one_site_at_a_time: expected False with statistics"):
        convert(model, "lowrank_gqa", method="latent", latent_dim=20, calibration=known, one_site_at_a_time=True)


def test_a_layer_of_width_2048_is_counted_as_it_was_measured() -> None:
    model = tiny(8, 4, layers=1, dtype=torch.float32)
    site = surgery.find(model)[0]
    assert surgery.statistics_bytes(model, [site])[site.path] == 8 * (3 * 128**2 + 128**2)
    assert one_site.in_words(109_051_904) == "109.1 MB"
    free = one_site.available_bytes()
    assert free is None or free > 0
