"""The report of a conversion: its sums, its table, and that it is undone once."""

from __future__ import annotations

import pytest

from attnzoo.surgery.hosts.site import Site
from attnzoo.surgery.report import ConversionReport, SiteReport
from attnzoo_kernels.errors import ConversionError


def report(undone: list[int]) -> ConversionReport:
    sites = [Site(f"model.layers.{i}.self_attn", "llama", i, 6, 2, 16, 96) for i in range(2)]
    rows = [SiteReport(sites[0], 64, 32, kept=0.25, error=0.125), SiteReport(sites[1], 64, 48)]
    return ConversionReport("lowrank_gqa", {"method": "latent"}, rows, 4, lambda: undone.append(1))


def test_bytes_are_those_of_all_sites_before_and_afterwards() -> None:
    found = report([])
    assert found.cache_bytes == (128 * 4, 80 * 4)
    assert found.to_dict()["cache_bytes_per_token"] == {"before": 512, "after": 320}
    assert [site["kept"] for site in found.to_dict()["sites"]] == [0.25, None]


def test_the_table_has_each_figure_under_its_name() -> None:
    grid = report([]).grid()
    assert grid.title == "lowrank_gqa(method=latent): 2 sites, cache 512 -> 320 bytes per token"
    first, second = (dict(zip(grid.heads, row, strict=True)) for row in grid.rows)
    assert first == {
        "site": "model.layers.0.self_attn", "values/token": "64 -> 32", "energy kept": "0.2500",
        "output error": "0.1250",
    }  # fmt: skip
    assert (second["energy kept"], second["output error"]) == ("-", "-")
    text = str(report([]))
    assert all(value in text for value in ("64 -> 32", "0.2500", "0.1250"))


def test_a_conversion_is_undone_once() -> None:
    undone: list[int] = []
    found = report(undone)
    found.undo()
    with pytest.raises(ConversionError, match="undone before"):
        found.undo()
    assert undone == [1]


def test_an_undo_that_fails_may_be_tried_again() -> None:
    def refuse() -> None:
        raise ConversionError("undo: a later conversion still stands")

    found = report([])
    found._undo = refuse
    for _ in range(2):
        with pytest.raises(ConversionError, match="still stands"):
            found.undo()
