"""The pictures of the operation's page: what is drawn is what a call sees, and the files are what the command draws."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from attnzoo_kernels import visible_pairs
from bench import layout_pictures
from bench.layout_pictures import CELL, Panel, rectangles

ROOT = Path(__file__).resolve().parents[2]
PICTURES = layout_pictures.pictures()
PANELS = {
    f"{name}: {panel.label}": panel
    for source in (layout_pictures.layouts, layout_pictures.switches, layout_pictures.variants)
    for name, _, panels in source()
    for panel in panels
}


def test_the_files_are_what_the_command_draws_and_a_page_shows_each() -> None:
    folder = ROOT / "docs" / "pictures"
    page = "".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("operation.md", "index.md"))
    for name, text in PICTURES.items():
        assert (folder / name).read_text(encoding="utf-8") == text, f"{name}: python -m bench.layout_pictures"
        assert f"](pictures/{name})" in page


@pytest.mark.parametrize("name", PANELS)
def test_the_area_that_is_drawn_as_read_is_what_the_call_sees(name: str) -> None:
    panel = PANELS[name]
    text = "".join(layout_pictures.marks(panel, 0.0, 0.0))
    drawn = 0.0
    for path in re.findall(r'<path d="([^"]+)" class="seen"', text):
        for left, top, right, bottom in re.findall(r"M(\S+) (\S+)H(\S+)V(\S+)H\S+z", path):
            # Sides at a block's edge are a little apart from it.
            wide = round((float(right) - float(left)) / CELL)
            drawn += wide * round((float(bottom) - float(top)) / CELL)
    assert drawn == int((panel.weights > 0).sum())
    if panel.extras is None or panel.extras.gate is None:
        heads = panel.layout.start.shape[1]
        seen, _ = visible_pairs(panel.layout, causal=panel.causal, extras=panel.extras, batch=1, heads=heads)
        assert seen == sum(
            int((Panel("", panel.layout, panel.extras, panel.causal, head).weights > 0).sum()) for head in range(heads)
        )


@pytest.mark.parametrize("seed", range(8))
def test_rectangles_cover_a_mask_once(seed: int) -> None:
    mask = torch.rand(6, 7, generator=torch.Generator().manual_seed(seed)) < (seed + 1) / 8
    times = torch.zeros(6, 7, dtype=torch.int64)
    for x, y, wide, high in rectangles(mask):
        times[y : y + high, x : x + wide] += 1
    assert torch.equal(times, mask.long())


def test_a_layout_without_origins_has_no_numbers() -> None:
    numbered = [panel for panel in PANELS.values() if panel.origins]
    assert [panel.label for panel in numbered] == ["origins"]
    (panel,) = numbered
    # The own block's keys lie where they would if all that is read lay before it without a gap.
    assert panel.origins[7, 7] == (7 - 2) * 4
    assert f">{panel.origins[7, 7]}</text>" in PICTURES["layout-origins.svg"]
