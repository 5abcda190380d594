"""Quality against what is held: a panel for each kind of probe, a line for each policy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from attnzoo.evaluation.two_phase.rows import CONTROL, PolicyComparison, PolicyRow
from attnzoo.evaluation.two_phase.tasks import KEY, RECALL, TEXT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#8a6d00",
    "#cc79a7",
    "#56b4e9",
    "#5b4ea8",
    "#000000",
    "#999999",
    "#6fae2b",
    "#b0413e",
    "#3d6b6b",
)
MARKERS = "osD^vPX<>*hdp8"
TITLES = {TEXT: "the text going on", RECALL: "spans word for word", KEY: "passkeys"}
MARKS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 1.0)


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
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = [kind for kind in (TEXT, RECALL, KEY) if comparison.dense.figure(kind) is not None]
    figure, panels = pyplot.subplots(
        1, len(kinds), figsize=(4.4 * len(kinds) + 2.4, 4.6), layout="constrained", squeeze=False
    )
    for axes, kind in zip(panels[0], kinds, strict=True):
        _panel(axes, comparison, kind)
    panels[0][0].set_ylabel("nats per token above dense; 0 is as good")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11, x=0.02, ha="left")
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def _panel(axes: Axes, comparison: PolicyComparison, kind: str) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    shown = families(comparison)
    for number, (name, rows) in enumerate(shown.items()):
        above = [comparison.above(row, kind) for row in rows]
        reads = all(row.held_share >= 1 > row.read_share for row in rows)
        axes.plot(
            [cost(row) for row in rows],
            [float("nan") if value is None else value for value in above],
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            # What is read alone frees nothing, and a control is there to fail.
            linestyle=":" if reads else "--" if CONTROL in rows[0].flags else "-",
            markerfacecolor="white" if reads else None,
            label=f"{name}, read" if reads else name,
        )
    axes.axhline(0.0, color="#444444", linewidth=1)
    axes.set_xscale("log")
    costs = [cost(row) for rows in shown.values() for row in rows]
    least, most = min([0.5, *costs]) / 1.15, min(1.0, max([0.4, *costs])) * 1.15
    axes.set_xlim(least, most)
    axes.xaxis.set_major_locator(FixedLocator([mark for mark in MARKS if least <= mark <= most]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axes.set_xlabel("bytes held over dense's (read: of a step)")
    axes.set_title(TITLES[kind], fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
