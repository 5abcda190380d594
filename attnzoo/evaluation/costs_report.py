"""What layers cost, for a terminal, as Markdown, as JSON and as a picture."""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from attnzoo.doctor import cpu_model
from attnzoo.evaluation.cost_setting import KINDS, Cost, CostSetting
from attnzoo.evaluation.timing import by_wall
from attnzoo.reporting import charts
from attnzoo.reporting.drawn import Axes, Figure
from attnzoo.reporting.outputs import write_together
from attnzoo.reporting.tables import Grid
from attnzoo_kernels.runtime.processor import cpu_class

HEADS = ("layer", "density", *(name for kind in KINDS for name in (f"{kind} ms", f"{kind} x torch")), "off by")

CAPTION = (
    "x torch: time over that of ten lines of torch (linear maps, a rotation, scaled_dot_product_attention, a "
    "preallocated cache) in the same rounds, the median of ratios"
)


def about(setting: CostSetting) -> dict[str, Any]:
    """Where the figures come from."""
    cpu = {"cpu": cpu_model(), "class": cpu_class(), "threads": torch.get_num_threads()}
    where = cpu if setting.device.type == "cpu" else {"gpu": torch.cuda.get_device_name(setting.device)}
    sizes = {name: value for name, value in asdict(setting).items() if name not in ("device", "dtype")}
    dtype = str(setting.dtype).removeprefix("torch.")
    clock = "wall" if by_wall(setting.device) else "CPU time"
    return {**where, "clock": clock, "torch": torch.__version__, "date": time.strftime("%F"), "dtype": dtype, **sizes}


def title(where: dict[str, Any]) -> str:
    """One line about machine and sizes."""
    machine = where.get("gpu") or f"{where['cpu']} ({where['class']}), threads: {where['threads']}"
    kv_heads = "" if where["num_kv_heads"] is None else f" ({where['num_kv_heads']} for keys)"
    sizes = f"{where['batch']} x {where['tokens']:,} tokens, width {where['dim']}, {where['num_heads']} heads{kv_heads}"
    return f"{machine}; {sizes}, {where['dtype']}, beside ten lines of torch"


def cells(cost: Cost) -> list[str]:
    """One layer's cells; nothing about time where the layer is wrong."""
    figures = []
    for kind in KINDS:
        known = kind in cost.milliseconds
        figures += [f"{cost.milliseconds[kind]:.3g}", f"{cost.times_baseline[kind]:.2f}"] if known else ["", ""]
    density = "" if cost.density is None else f"{cost.density:.3f}"
    return [cost.name, density, *figures, "" if cost.error is None else f"{cost.error:.0e}"]


def grid(costs: list[Cost], where: dict[str, Any]) -> Grid:
    """The costs as a table for a terminal."""
    return Grid(
        HEADS,
        [cells(cost) for cost in costs],
        title=title(where),
        caption=CAPTION,
        numbers=frozenset(range(1, len(HEADS))),
        bad=frozenset(i for i, cost in enumerate(costs) if cost.problem is not None),
    )


def markdown(costs: list[Cost], where: dict[str, Any]) -> str:
    """The costs as Markdown."""
    lines = [title(where), ""]
    lines += ["| " + " | ".join(line) + " |" for line in (HEADS, ["---"] * len(HEADS), *map(cells, costs))]
    lines += ["", *(f"- {cost.name}: {cost.problem}" for cost in costs if cost.problem is not None)]
    return "\n".join([*lines, f"Where it comes from: {json.dumps(where)}", ""])


def to_json(costs: list[Cost], where: dict[str, Any]) -> str:
    """The costs as JSON; only ``milliseconds`` and ``times_baseline`` differ when it is run again."""
    return json.dumps({"about": where, "layers": [asdict(cost) for cost in costs]}, indent=2) + "\n"


def write(costs: list[Cost], where: dict[str, Any], out: Path) -> None:
    """Writes OUT.json, OUT.md and OUT.png."""
    write_together(
        out,
        {
            "json": lambda path: path.write_text(to_json(costs, where), encoding="utf-8"),
            "md": lambda path: path.write_text(markdown(costs, where), encoding="utf-8"),
            "png": lambda path: picture(costs, where, path),
        },
    )


def picture(costs: list[Cost], where: dict[str, Any], path: Path) -> None:
    """Draws each layer's time over that of ten lines of torch, as a PNG or whatever the suffix says."""
    with charts.style():
        charts.save(draw(costs, where), path)


def draw(costs: list[Cost], where: dict[str, Any]) -> Figure:
    """The picture: bars from 1 on, to the left where a layer is quicker; a panel for each kind of call."""
    shown = [cost for cost in costs if cost.milliseconds]
    figure = charts.sheet(12, 0.36 * len(shown) + 1.9, f"Time of a layer: {title(where)}")
    panels = figure.subplots(1, len(KINDS), sharey=True, squeeze=False)[0]
    for kind, axes in zip(KINDS, panels, strict=True):
        _bars(axes, kind, shown)
    panels[0].set_yticks(range(len(shown))[::-1], [re.sub(",(?! )", ",\n", cost.name) for cost in shown])
    return figure


def _bars(axes: Axes, kind: str, costs: list[Cost]) -> None:
    """Plain bars where a layer is slower, hollow ones where it is quicker."""
    ratios = [cost.times_baseline[kind] for cost in costs]
    place = list(range(len(costs)))[::-1]
    fills = ["white" if ratio < 1 else charts.PLAIN for ratio in ratios]
    lengths = [ratio - 1 for ratio in ratios]
    axes.barh(place, lengths, left=1, color=fills, edgecolor=charts.PLAIN, linewidth=1.2, height=0.62)
    for y, cost, ratio in zip(place, costs, ratios, strict=True):
        text = f"{ratio:.2f}  ({cost.milliseconds[kind]:.3g} ms)"
        axes.text(max(1, ratio) * 1.06, y, text, va="center", fontsize=9)
    axes.axvline(1.0, color=charts.RULE, linewidth=1)
    low = min([0.5, *ratios]) / 1.2
    charts.logarithmic(axes, "x", low, low * (max([2.0, *ratios]) / low) ** 1.8, most=6)
    axes.set_title(kind)
    axes.set_xlabel("times ten lines of torch (log scale)")
