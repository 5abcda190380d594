"""Scores of heads as a picture: a map of layers and heads for each kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attnzoo.heads.scores.head_scores import HeadScores
from attnzoo.reporting import charts
from attnzoo.reporting.drawn import Axes, Figure

RING = "#e4572e"


def picture(scores: HeadScores, title: str, path: Path, *, marked: int = 10) -> None:
    """Draws scores, as a PNG or whatever the suffix says: shares from 0 to 1, or what may be below 0, on either side.

    Args:
        scores: Of one kind or several, side by side.
        title: Over all.
        path: Where to.
        marked: How many of the best heads of each kind have a ring.
    """
    with charts.style():
        charts.save(draw(scores, title, marked), path)


def draw(scores: HeadScores, title: str, marked: int) -> Figure:
    """The picture: a map for each kind, all with the same colours."""
    kinds = scores.kinds
    cell = min(0.34, 16 / scores.heads, 10 / scores.layers)
    size = (max(2.6, cell * scores.heads) * len(kinds) + 2.2, max(2.4, cell * scores.layers) + 1.4)
    figure = charts.sheet(*size, title)
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)
    colours = _colours(scores)
    for axes, kind in zip(panels[0], kinds, strict=True):
        axes.imshow(scores[kind].numpy(), aspect="auto", origin="upper", **colours)
        _mark(axes, scores, kind, marked)
    panels[0][0].set_ylabel("layer")
    figure.colorbar(panels[0][0].images[0], ax=panels[0].tolist(), label="score", shrink=0.8)
    return figure


def _colours(scores: HeadScores) -> dict[str, Any]:
    """The map of colours, and what its ends are."""
    found = [scores[kind] for kind in scores.kinds]
    if all(bool(((x >= 0) & (x <= 1)).all()) for x in found):
        return {"cmap": "Blues", "vmin": 0, "vmax": 1}
    end = max(float(x.abs().max()) for x in found)
    return {"cmap": "RdBu", "vmin": -end, "vmax": end}


def _mark(axes: Axes, scores: HeadScores, kind: str, marked: int) -> None:
    """Rings round the best heads, and lines between the groups of KV heads."""
    from matplotlib.ticker import MaxNLocator

    best = scores.top(kind, min(marked, scores.layers * scores.heads))
    axes.scatter([one.head for one in best], [one.layer for one in best], s=60, facecolors="none", edgecolors=RING)
    group = scores.heads // scores.kv_heads
    if group > 1:
        for edge in range(group, scores.heads, group):
            axes.axvline(edge - 0.5, color="#888888", linewidth=0.6)
    for side in axes.spines.values():
        side.set_visible(True)
    axes.set_title(f"{kind}: the best {len(best)} ringed", fontsize=9.5)
    axes.set_xlabel("query head" if group == 1 else f"query head, {group} to a KV head")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
