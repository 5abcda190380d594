"""What the refit takes from the calibration text: the batches, and how much each token counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from attnzoo import surgery
from attnzoo.surgery.lowrank import merge_heads
from attnzoo.surgery.lowrank.calibration import SiteStatistics, Statistics
from attnzoo.surgery.lowrank.refit import join_batches
from tests.attnzoo.surgery.lowrank.test_refit import streams
from tests.attnzoo.surgery.tiny import assert_close, calibration, convert, ids, tiny

PATHS = ("model.layers.0.self_attn", "model.layers.1.self_attn")


def ragged() -> list[dict[str, Tensor]]:
    """Batches of different lengths, with padding on both sides."""
    found = []
    for seed, length in enumerate((40, 23, 31)):
        mask = torch.ones(2, length, dtype=torch.long)
        mask[0, : 3 * seed] = 0
        mask[1, length - 2 :] = 0
        found.append({"input_ids": ids(2, length, seed=seed) * mask, "attention_mask": mask})
    return found


def psd(seed: int, size: int = 4) -> Tensor:
    x = torch.randn(9, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.T @ x


def test_batches_are_joined_on_the_left_with_their_weights_beside_them() -> None:
    weights = [torch.rand(2, length) for length in (40, 23, 31)]
    site = SiteStatistics(torch.zeros(1), torch.zeros(1), token_weight=weights)
    batches = ragged()
    joined, by_site = join_batches(Statistics({"a": site}, batches, with_gradients=True))
    assert set(joined) == {"input_ids", "attention_mask"}
    for at, (batch, weight) in enumerate(zip(batches, weights, strict=True)):
        rows, length = slice(2 * at, 2 * at + 2), batch["input_ids"].shape[1]
        for x, given in ((joined["input_ids"], batch["input_ids"]), (by_site["a"], weight)):
            assert torch.equal(x[rows, :length], given.to(x))
            assert not bool(x[rows, length:].any())
        assert torch.equal(joined["attention_mask"][rows, :length], batch["attention_mask"])
        assert not bool(joined["attention_mask"][rows, length:].any())


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("text", ["even", "ragged"])
def test_a_site_is_merged_by_the_moment_that_the_loss_weighs(
    text: str, gradients: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first site nothing has changed: the student's weighted moment is the statistics' own."""
    batches: list[Any] = calibration() if text == "even" else ragged()
    model, real, seen = tiny(), merge_heads.merge_site, list[Tensor]()
    statistics = surgery.collect(model, surgery.find(model), batches, gradients=gradients)

    def watch(projections: Any, weights: Any, moment: Tensor, fisher: Any, groups: Any) -> Any:
        seen.append(moment)
        return real(projections, weights, moment, fisher, groups)

    monkeypatch.setattr(merge_heads, "merge_site", watch)
    options = {"method": "commuting", "num_kv_heads": 1, "gradients": gradients}
    convert(model, "lowrank_gqa", calibration=statistics, **options)
    wanted = statistics.sites[PATHS[0]].loss_moment()
    scale = float(wanted.abs().max())
    assert_close(seen[0] / scale, wanted / scale, 1e-9)
    if gradients:
        # Tokens differ in weight: were all equal, this test would say nothing.
        plain = statistics.sites[PATHS[0]].mean_moment()
        assert float((plain - wanted).abs().max()) > 1e-2 * scale


def test_token_weights_change_the_weights_that_are_found() -> None:
    model = tiny()
    statistics = surgery.collect(model, surgery.find(model), calibration())
    found = []
    for turned in (False, True):
        sites = {
            path: replace(site, token_weight=[x.flip(1) if turned else x for x in site.token_weight])
            for path, site in statistics.sites.items()
        }
        here = tiny()
        known = Statistics(sites, statistics.batches, with_gradients=True)
        convert(here, "lowrank_gqa", calibration=known, method="commuting", num_kv_heads=1)
        found.append(here.model.layers[0].self_attn.k_proj.weight.detach())
    assert float((found[0] - found[1]).abs().max()) > 1e-3


def test_moments_are_means_and_the_sink_counts_by_sequences() -> None:
    site = SiteStatistics(psd(1), psd(2), weighted=psd(3), tokens=50, sequences=4)
    plain = site.moment / 50
    torch.testing.assert_close(site.mean_moment(), plain)
    torch.testing.assert_close(site.sink_moment(), plain + 0.1 * site.first / 4)
    assert site.weighted is not None
    scaled = site.weighted * (plain.trace() / site.weighted.trace())
    torch.testing.assert_close(site.loss_moment(), (scaled + plain) / 2)
    # How large gradients are plays no part, and where there are none the sink is given its weight by hand.
    louder = replace(site, weighted=1e6 * site.weighted)
    torch.testing.assert_close(louder.loss_moment(), site.loss_moment())
    for silent in (replace(site, weighted=None), replace(site, weighted=torch.zeros(4, 4, dtype=torch.float64))):
        torch.testing.assert_close(silent.loss_moment(), site.sink_moment())


def test_the_reported_error_is_that_of_a_run_where_outputs_have_a_bias() -> None:
    text = calibration(3, 4, 40)
    tokens = torch.cat(text)
    _, dense = streams(tiny(attention_bias=True), tokens)
    model = tiny(attention_bias=True)
    report = convert(model, "lowrank_gqa", method="commuting", num_kv_heads=1, calibration=text)
    given, behind = streams(model, tokens)
    for entry, wanted, mine, gave, block in zip(report.sites, dense, behind, given, model.model.layers, strict=True):
        goal, bias = wanted - (mine - gave), block.self_attn.o_proj.bias.detach()
        # The bias is no energy that a projection has to give.
        assert entry.error == pytest.approx(float((gave - goal).norm() / (goal - bias).norm()), rel=1e-3)
