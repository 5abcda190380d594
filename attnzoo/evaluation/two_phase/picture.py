"""Quality against what is held: a panel for each kind of probe, a line for each policy."""

from __future__ import annotations

from pathlib import Path

from attnzoo.evaluation.two_phase.rows import CONTROL, PolicyComparison, PolicyRow
from attnzoo.evaluation.two_phase.tasks import KEY, RECALL, TEXT
from attnzoo.reporting import charts, labels
from attnzoo.reporting.drawn import Axes, Figure

TITLES = {TEXT: "the text going on", RECALL: "spans repeated word for word", KEY: "passkeys found again"}


def families(comparison: PolicyComparison) -> dict[str, list[PolicyRow]]:
    """Rows that belong together, by what their names begin with; ascending by what is held."""
    found: dict[str, list[PolicyRow]] = {}
    for row in comparison.rows[1:]:
        found.setdefault(row.name.partition(":")[0], []).append(row)
    return {name: sorted(rows, key=cost) for name, rows in found.items()}


def cost(row: PolicyRow) -> float:
    """What is drawn to the right: what is held, or where everything is held what a step reads."""
    return min(row.held_share, row.read_share)


def picture(comparison: PolicyComparison, title: str, path: Path) -> None:
    """Draws a comparison, as a PNG or whatever the suffix says."""
    with charts.style():
        charts.save(draw(comparison, title), path)


def draw(comparison: PolicyComparison, title: str) -> Figure:
    """The picture: a panel for each kind of probe, each line named where it ends."""
    kinds = [kind for kind in (TEXT, RECALL, KEY) if comparison.dense.figure(kind) is not None]
    height = max(3.4, 0.2 * len(families(comparison)) + 0.4)
    title = f"What KV-cache policies lose for what they keep: {title}"
    figure = charts.sheet(8.4, height * len(kinds) + 1.4, title)
    panels = figure.subplots(len(kinds), 1, squeeze=False, sharex=True)[:, 0]
    for axes, kind in zip(panels, kinds, strict=True):
        _panel(axes, comparison, kind)
    figure.supylabel("nats per token above dense; lower is better", fontsize=10)
    panels[-1].set_xlabel("KV bytes held, of dense's (log scale); (read): bytes that a step reads")
    for axes in panels:
        labels.at_ends(axes)
    return figure


def _panel(axes: Axes, comparison: PolicyComparison, kind: str) -> None:
    """A line for each family of rows; one that keeps everything is at dense, and would take the room of the others."""
    shown = families(comparison)
    freeing = {name: rows for name, rows in shown.items() if any(cost(row) < 1 for row in rows)} or shown
    for number, (name, rows) in enumerate(shown.items()):
        if name not in freeing:
            continue
        above = [comparison.above(row, kind) for row in rows]
        reads = all(row.held_share >= 1 > row.read_share for row in rows)
        control = CONTROL in rows[0].flags
        # What is read alone frees nothing, and a control is there to fail: both are said and drawn hollow.
        axes.plot(
            [cost(row) for row in rows],
            [float("nan") if value is None else value for value in above],
            **charts.look(number),
            markerfacecolor="white" if reads or control else None,
            label=f"{name} (read)" if reads else f"{name} (control)" if control else name,
        )
    axes.axhline(0.0, color=charts.RULE, linewidth=1)
    axes.annotate("dense", (0.0, 0.0), (2, 2), axes.get_yaxis_transform(), textcoords="offset points", fontsize=9)
    costs = [cost(row) for rows in freeing.values() for row in rows]
    charts.logarithmic(axes, "x", min([0.5, *costs]) / 1.15, min(1.0, max([0.4, *costs])) * 1.15, most=7)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    axes.set_title(TITLES[kind])
    axes.grid(axis="y")
