"""Markdown and charts from the files of ``bench.gpu``: ``python -m bench.gpu.report OUT``. Needs no GPU."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Data = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """A figure to reach and what was measured.

    Attributes:
        what: In words.
        found: The figure, or ``None`` where it was not measured.
        bound: What it should be.
        at_most: Whether the bound is an upper one.
    """

    what: str
    found: float | None
    bound: float
    at_most: bool = False

    @property
    def holds(self) -> bool | None:
        """Whether it was reached."""
        if self.found is None:
            return None
        return self.found <= self.bound if self.at_most else self.found >= self.bound


def read(path: Path) -> Data | None:
    """A file's data, or ``None`` where there is none or it is damaged: it will be measured again."""
    try:
        data: Data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return data


def load(folder: Path) -> tuple[Data, dict[str, Data]]:
    """The machine and the cells by name."""
    files = {path.stem: read(path) for path in sorted(folder.glob("*.json"))}
    machine = files.pop("machine", None)
    if machine is None:
        raise FileNotFoundError(f"{folder / 'machine.json'}: expected the machine's description beside the cells")
    return machine, {name: data for name, data in files.items() if data is not None and "cell" in data}


def best(data: Data, *names: str) -> float | None:
    """The shortest time of contestants."""
    times = [data["ms"].get(name) for name in names]
    known = [x for x in times if x is not None]
    return min(known) if known else None


def ours(data: Data) -> float | None:
    """Our time: out of a graph where there is one."""
    return best(data, "ours, graph") or best(data, "ours")


def teraflops(data: Data, name: str = "ours") -> float | None:
    """Useful operations a second, 1e12; dense contestants do the dense ones."""
    time = best(data, name)
    if time is None:
        return None
    return float(data["dense flops" if name.startswith(("sdpa", "xformers", "flash")) else "flops"]) / time / 1e9


def bandwidth(data: Data, machine: Data) -> float | None:
    """The share of the memory's bandwidth with which a decoding step reads its blocks."""
    time = ours(data)
    peak = machine["peak"].get("copy")
    return None if time is None or not peak else data["bytes"] / time * 1e3 / peak


def roofline(data: Data, machine: Data) -> float | None:
    """The share of the device's products."""
    speed = teraflops(data)
    peak = machine["peak"].get("product")
    return None if speed is None or not peak else speed * 1e12 / peak


def ratio(data: Data, *names: str) -> float | None:
    """How many times faster we are than the best of others."""
    mine = best(data, "ours")
    other = best(data, *names)
    return None if mine is None or other is None else other / mine


def line(data: Data, machine: Data) -> str:
    """A cell in one line; no time where there is none."""
    if data.get("recompilations") is not None:
        return f"{data['recompilations']} kernels compiled over {data['pairs']} random calls"
    parts = [f"{name} {time:.3f} ms" for name, time in data["ms"].items() if time is not None]
    if "flops" in data and data["cell"]["what"] != "decode" and (speed := teraflops(data)) is not None:
        parts.append(f"{speed:.0f} TFLOP/s, {roofline(data, machine) or 0:.0%} of the roofline")
    if data["cell"]["what"] == "decode" and (share := bandwidth(data, machine)) is not None:
        parts.append(f"{share:.0%} of the bandwidth")
    own = ("ours", data["cell"]["form"])
    parts += [f"{name}: {why}" for name, why in data["reasons"].items() if name in own or why.startswith("wrong")]
    return "; ".join(parts) or "checked"


def _law(cells: dict[str, Data]) -> Iterator[Goal]:
    """The time at a density in relation to what the law allows: 1.1 rho time(1) + 20 us."""
    for data in cells.values():
        cell = data["cell"]
        if cell["what"] != "forward" or cell["density"] in (None, 1.0) or ours(data) is None:
            continue
        whole = cells.get(f"forward-d{cell['width']}-t{cell['tokens']}-rho1")
        if whole is None or (time := ours(whole)) is None:
            continue
        allowed = 1.1 * data["density"] * time + 0.02
        name = (
            f"D {cell['width']}, {cell['tokens']} tokens, density {cell['density']:g}: time / (1.1 rho time(1) + 20 us)"
        )
        yield Goal(name, (ours(data) or 0.0) / allowed, 1.0, True)


def goals(machine: Data, cells: dict[str, Data]) -> list[Goal]:
    """What was promised, and what was measured."""
    found = []

    def add(what: str, name: str, figure: Any, bound: float, *, at_most: bool = False) -> None:
        found.append(Goal(what, figure(cells[name]) if name in cells else None, bound, at_most))

    dense = "forward-d128-t32768-rho1"
    add("forward, D 128, dense, 32k: TFLOP/s", dense, teraflops, 520)
    add("the same over SDPA flash", dense, lambda data: ratio(data, "sdpa flash"), 1.2)
    add("the same over FlashAttention-3's published 616 TFLOP/s", dense, lambda d: (teraflops(d) or 0) / 616, 0.8)
    for rho, bound in ((1, 1.15), (0.25, 1.25), (0.05, 1.4)):
        name = f"forward-d128-t32768-rho{rho:g}"
        add(
            f"forward over compiled FlexAttention, density {rho:g}",
            name,
            lambda d: ratio(d, "flex", "flex tuned"),
            bound,
        )
    add("backward, D 128, dense, 32k: TFLOP/s", "backward-d128-t32768-rho1", teraflops, 380)
    for name, data in cells.items():
        if data["cell"]["what"] == "decode" and data["cell"]["tokens"] == 131072 and data.get("bytes", 0) >= 100e6:
            add(f"share of the bandwidth, {name}", name, lambda d: bandwidth(d, machine), 0.8)
        if data["cell"]["what"] == "recompilations":
            add("kernels compiled once warm", name, lambda d: d.get("recompilations"), 0, at_most=True)
    return [*found, *_law(cells)]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def markdown(machine: Data, cells: dict[str, Data]) -> str:
    """Everything as Markdown."""
    lines = [
        f"{machine['device']}, torch {machine['torch']}, triton {machine['triton']}, {machine['date']}"
        f"{', FlexAttention tuned' if machine['tuned'] else ''}",
        "",
        f"bf16, batch 1. Peaks are {machine['peak is']}: "
        + ", ".join(f"{name} {value / 1e12:.3g}e12/s" for name, value in machine["peak"].items()),
        "", "| goal | measured | bound | |", "| --- | --- | --- | --- |",
    ]  # fmt: skip
    verdict = {True: "reached", False: "missed", None: "not measured"}
    for goal in goals(machine, cells):
        sign = "<=" if goal.at_most else ">="
        lines.append(f"| {goal.what} | {_number(goal.found, '.3g')} | {sign} {goal.bound:g} | {verdict[goal.holds]} |")
    for what in ("forward", "backward", "decode", "form"):
        chosen = {name: data for name, data in cells.items() if data["cell"]["what"] == what}
        if chosen:
            lines += ["", f"## {what}", "", "| cell | density | ms | TFLOP/s | roofline | notes |"]
            lines += [
                "| --- | --- | --- | --- | --- | --- |",
                *(_row(name, data, machine) for name, data in chosen.items()),
            ]
    return "\n".join(lines) + "\n"


def _row(name: str, data: Data, machine: Data) -> str:
    decoding = data["cell"]["what"] == "decode"
    form = data["cell"]["form"] or "ours"
    times = "; ".join(f"{who} {_number(time, '.3f')}" for who, time in data["ms"].items() if time is not None)
    speed = None if decoding or "flops" not in data else teraflops(data, form)
    share = bandwidth(data, machine) if decoding and "bytes" in data else roofline(data, machine)
    if form != "ours" and speed is not None and machine["peak"].get("product"):
        share = speed * 1e12 / machine["peak"]["product"]
    notes = "; ".join(f"{who}: {why}" for who, why in data["reasons"].items()).replace("|", "/")
    return f"| {name} | {_number(data.get('density'), '.3f')} | {times} | {_number(speed, '.0f')} | {_number(share, '.0%')} | {notes} |"  # noqa: E501


SHOWN = ("ours", "flex", "flex tuned", "sdpa flash", "sdpa cudnn")
"""Contestants with a line, in the order of their looks."""


def charts(machine: Data, cells: dict[str, Data], folder: Path) -> list[Path]:
    """Speed over length at each density, forward and backward; bandwidth of decoding over bytes."""
    # For who draws: a GPU's machine may lack matplotlib.
    from attnzoo.reporting import charts as look

    shown = [data for data in cells.values() if ours(data) is not None and data["cell"]["pattern"] == "random"]
    written = []
    with look.style():
        for what in ("forward", "backward"):
            chosen = [data for data in shown if data["cell"]["what"] == what]
            if chosen:
                written.append(folder / f"{what}.png")
                look.save(_speeds(f"Speed of the {what}: {machine['device']}, bf16", chosen), written[-1])
        decodes = [data for data in shown if data["cell"]["what"] == "decode" and bandwidth(data, machine) is not None]
        if decodes:
            written.append(folder / "decode.png")
            look.save(_bandwidths(machine, decodes), written[-1])
    return written


def _bandwidths(machine: Data, decodes: list[Data]) -> Any:
    from attnzoo.reporting import charts as look

    figure = look.sheet(7, 4.4, f"Decoding out of a CUDA graph: {machine['device']}, bf16")
    axes = figure.subplots()
    megabytes = [data["bytes"] / 1e6 for data in decodes]
    axes.scatter(megabytes, [bandwidth(data, machine) or 0.0 for data in decodes], s=18, color=look.PLAIN)
    look.logarithmic(axes, "x", min(megabytes) / 1.3, max(megabytes) * 1.3)
    axes.set(xlabel="MB read by a step (log scale)", ylabel="share of the memory's bandwidth; higher is better")
    axes.axhline(0.8, color=look.RULE, linewidth=1)
    axes.annotate("goal", (0.0, 0.8), (2, 2), axes.get_yaxis_transform(), textcoords="offset points", fontsize=9)
    return figure


def _speeds(title: str, chosen: list[Data]) -> Any:
    """A panel for each width and density, a line for each contestant."""
    from attnzoo.reporting import charts as look

    widths = sorted({data["cell"]["width"] for data in chosen})
    densities = sorted({data["cell"]["density"] for data in chosen}, reverse=True)
    figure = look.sheet(2.7 * len(densities) + 1, 2.6 * len(widths) + 1.2, title)
    grid = figure.subplots(len(widths), len(densities), sharex=True, sharey="row", squeeze=False)
    for row, width in zip(grid, widths, strict=True):
        for axes, density in zip(row, densities, strict=True):
            here = [d for d in chosen if d["cell"]["width"] == width and d["cell"]["density"] == density]
            here.sort(key=lambda data: data["cell"]["tokens"])
            for number, name in enumerate(SHOWN):
                points = [(d["cell"]["tokens"], teraflops(d, name)) for d in here if best(d, name) is not None]
                if points:
                    axes.plot(*zip(*points, strict=True), label=name, **look.look(number))
            axes.set_xscale("log", base=2)
            axes.set_title(f"width {width}, density {density:g}", fontsize=9)
        row[0].set_ylabel("useful TFLOP/s")
        row[0].set_ylim(bottom=0)
    lengths = sorted({data["cell"]["tokens"] for data in chosen})
    for axes in grid[-1]:
        look.ticks(axes.xaxis, lengths[:: -(-len(lengths) // 4)], look.tokens)
        axes.set_xlabel("tokens (log scale)")
    handles = {name: line for axes in figure.axes for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles) or 1)
    return figure


def write(folder: Path) -> list[Path]:
    """Writes the report; charts only where matplotlib is there."""
    machine, cells = load(folder)
    page = folder / "report.md"
    page.write_text(markdown(machine, cells), encoding="utf-8")
    drawn = charts(machine, cells, folder) if importlib.util.find_spec("matplotlib") else []
    return [page, *drawn]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m bench.gpu.report OUT")
    print("\n".join(str(path) for path in write(Path(sys.argv[1]))))
