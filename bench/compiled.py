"""What compiling a decoding step gains or costs: ``python -m bench.compiled``.

Every variant, compiled by inductor, beside the same step without a compiler, in turns; and ten lines of torch beside
theirs in the same rounds. A step is checked before it is timed. What is torch's own is measured too: the time in which
guards are checked, and that of a compiled call of the same layer and cache that computes next to nothing.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch._dynamo import guards
from torch._dynamo.testing import CompileCounterWithBackend

from attnzoo.cli import screen
from attnzoo.cli.progress import Bar
from attnzoo.evaluation.cost_setting import CostSetting
from attnzoo.evaluation.layer_costs import SPECS, build_baseline
from attnzoo.evaluation.timing import threads
from attnzoo.factory import create, read_spec
from attnzoo.reporting.outputs import check_writable, write_together
from attnzoo.reporting.tables import Grid
from attnzoo.reporting.warn import silent
from bench.cpu.parts import choose
from bench.cpu.report import about

TEN_LINES = "ten lines of torch"
NAMES = (*SPECS, "lowrank_gqa:latent_dim=128")
LIMIT = 1e-5
"""What two ways to compute a step may differ by, over the largest value."""
WARM = 6
"""Steps that are checked: the first programs are made in them."""
HEADS = ("layer", "compiled us", "not compiled us", "ratio", "ten lines' ratio", "guards us", "near-empty us", "graphs")


@dataclass(frozen=True, kw_only=True)
class CompiledReading:
    """What was found of a layer; microseconds of CPU time are medians, ratios medians of those of each round.

    Attributes:
        name: The layer.
        error: The largest difference to the step without a compiler, over the largest value.
        graphs: Programs that were made.
        compiled: Of the compiled step.
        plain: Of the step without a compiler.
        ratio: Compiled over plain.
        peer_ratio: The same of ten lines of torch, in the same rounds.
        guards: Of checking the guards of the compiled step.
        empty: Of a compiled call of the layer's first projection that counts the cache's tokens, and no more.
        wrong: Why nothing was timed.
    """

    name: str
    error: float
    graphs: int
    compiled: float = 0.0
    plain: float = 0.0
    ratio: float = 0.0
    peer_ratio: float = 0.0
    guards: float = 0.0
    empty: float = 0.0
    wrong: str = ""


class Guards:
    """While entered, keeps the guards of what is compiled, and the arguments that they were made for."""

    def __init__(self) -> None:
        self.last: tuple[Any, dict[str, Any]] | None = None

    def __enter__(self) -> Guards:
        known: Any = guards.CheckFunctionManager.__init__
        self._known = known

        def keep(manager: Any, code: Any, graph: Any, *rest: Any, **named: Any) -> None:
            scope = dict(graph.local_scope)
            known(manager, code, graph, *rest, **named)
            self.last = manager.guard_manager, scope

        guards.CheckFunctionManager.__init__ = keep  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        guards.CheckFunctionManager.__init__ = self._known  # type: ignore[method-assign]


class NearlyEmpty(nn.Module):
    """A layer's query projection, behind what a step reads and writes of a cache's length."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, cache: Any) -> Tensor:
        """The queries ``[B, 1, H * D]``; the cache counts a token."""
        cache.length = cache.length + 1
        cache.bound = cache.length
        found: Tensor = self.layer.q_proj(x)
        return found


def in_turns(contestants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Microseconds of CPU time of each, round by round."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds):
        names = list(contestants)
        for name in names if number % 2 else names[::-1]:
            start = time.process_time_ns()
            contestants[name]()
            found[name].append((time.process_time_ns() - start) / 1e3)
    return found


def ratio(found: dict[str, list[float]], first: str, second: str) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(found[first], found[second], strict=True))


class Peer:
    """Ten lines of torch, compiled and not, each with a cache of its own that holds as many tokens."""

    def __init__(self, setting: CostSetting, held: int) -> None:
        self.layer = build_baseline(setting).eval()
        self.compiled = torch.compile(self.layer, fullgraph=True, dynamic=True)
        self.caches = [self.layer.new_cache(1, setting.tokens) for _ in range(2)]
        self.held = held
        for _ in range(WARM):
            self.compiled(*self._arguments(0, setting))

    def _arguments(self, number: int, setting: CostSetting) -> tuple[Tensor, Tensor, int]:
        self.held += number == 0
        return setting.inputs(1), self.caches[number], self.held

    def contestants(self, setting: CostSetting) -> dict[str, Callable[[], Any]]:
        """A step of either."""
        x = setting.inputs(1)

        def compiled() -> None:
            self.held += 1
            self.compiled(x, self.caches[0], self.held)

        return {"peer": compiled, "plain peer": lambda: self.layer(x, self.caches[1], self.held)}


@silent()
@torch.no_grad()
def measure(name: str, setting: CostSetting, held: int, rounds: int, backend: str) -> CompiledReading:
    """A layer behind ``held`` tokens, checked and then timed."""
    torch.compiler.reset()
    variant, options = read_spec(name)
    layer = create(variant, **setting.heads(), **options).eval()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    caches = [layer.new_cache(1, setting.tokens) for _ in range(2)]
    x = setting.inputs(held + WARM)
    for cache in caches:
        layer(x[:, :held], cache=cache)
    error = 0.0
    with Guards() as kept:
        for t in range(held, held + WARM):
            expected = layer(x[:, t : t + 1], cache=caches[1])
            off = (compiled(x[:, t : t + 1], cache=caches[0]) - expected).abs().max() / expected.abs().max().clamp(
                min=1
            )
            error = max(error, float(off))
    if not error <= LIMIT:
        return CompiledReading(name=name, error=error, graphs=counter.frame_count, wrong=f"off by {error:.1e}")
    token = x[:, -1:]
    near = NearlyEmpty(layer)
    nearly = torch.compile(near, fullgraph=True, backend=backend)
    other = layer.new_cache(1, setting.tokens)
    for _ in range(WARM):
        nearly(token, other)
    contestants: dict[str, Callable[[], Any]] = {
        "compiled": lambda: compiled(token, cache=caches[0]),
        "plain": lambda: layer(token, cache=caches[1]),
        "empty": lambda: nearly(token, other),
        **Peer(setting, held).contestants(setting),
    }
    if kept.last is not None:
        manager, scope = kept.last
        contestants["guards"] = lambda: manager.check(scope)
    found = in_turns(contestants, rounds)
    middle = {key: statistics.median(values) for key, values in found.items()}
    return CompiledReading(
        name=name,
        error=error,
        graphs=counter.frame_count,
        compiled=middle["compiled"],
        plain=middle["plain"],
        ratio=ratio(found, "compiled", "plain"),
        peer_ratio=ratio(found, "peer", "plain peer"),
        guards=middle.get("guards", 0.0),
        empty=middle["empty"],
    )


def cells(reading: CompiledReading) -> tuple[str, ...]:
    """A row of the table."""
    if reading.wrong:
        return (reading.name, *["-"] * (len(HEADS) - 2), reading.wrong)
    times = (f"{reading.compiled:.0f}", f"{reading.plain:.0f}", f"{reading.ratio:.2f}", f"{reading.peer_ratio:.2f}")
    return (reading.name, *times, f"{reading.guards:.0f}", f"{reading.empty:.0f}", str(reading.graphs))


def title(where: dict[str, Any]) -> str:
    """One line about machine and sizes."""
    return (
        f"A compiled decoding step behind {where['held']} tokens, {where['dim']} wide, {where['heads']} heads, fp32: "
        f"{where['cpu']} ({where['class']}), one thread, CPU time, torch {where['torch']}, {where['date']}"
    )


def summary(path: Path) -> list[str]:
    """The lines of a page about stored readings: what compiling makes of a step's time, and of that of ten lines."""
    data = json.loads(path.read_text(encoding="utf-8"))
    readings = [CompiledReading(**row) for row in data["rows"]]
    lines = [
        "| layer | compiled over not compiled | the same of ten lines of torch | graphs |",
        "| --- | --- | --- | --- |",
    ]
    lines += [f"| `{r.name}` | {r.ratio:.2f} | {r.peer_ratio:.2f} | {r.graphs} |" for r in readings if not r.wrong]
    return [*lines, "", f"{title(data['about'])}; `python -m bench.compiled`."]


def write(readings: list[CompiledReading], where: dict[str, Any], out: Path) -> None:
    """Writes OUT.json and OUT.md."""
    rows = ["| " + " | ".join(line) + " |" for line in (HEADS, ["---"] * len(HEADS), *map(cells, readings))]
    data = {"about": where, "rows": [asdict(reading) for reading in readings]}
    text = json.dumps(data, indent=2) + "\n"
    page = "\n".join([title(where), "", *rows, ""])
    write_together(
        out,
        {
            "json": lambda path: path.write_text(text, encoding="utf-8"),
            "md": lambda path: path.write_text(page, encoding="utf-8"),
        },
    )


def run(names: list[str], held: int, rounds: int, backend: str) -> Iterator[CompiledReading]:
    """Each layer in turn."""
    # Room for what is checked, warmed up and timed, twice over.
    setting = CostSetting(tokens=held + 2 * (rounds + 2 * WARM) + 1)
    for name in names:
        yield measure(name, setting, held, rounds, backend)


def main(
    out: Annotated[Path, typer.Option(help="Write OUT.json and OUT.md.")] = Path("out/compiled-step"),
    only: Annotated[list[str] | None, typer.Option(help="Layers by name; may be repeated.")] = None,
    held: Annotated[int, typer.Option(help="Tokens in the cache.")] = 1024,
    rounds: Annotated[int, typer.Option(help="Steps timed.")] = 150,
    backend: Annotated[str, typer.Option(help="Of torch.compile.")] = "inductor",
) -> None:
    """Compiled decoding steps beside others; half a minute a layer."""
    chosen = choose(list(NAMES), only)
    names = [name for name in NAMES if name in chosen]
    check_writable(out)
    where = {**about(), "held": held, "rounds": rounds, "dim": 512, "heads": 8, "backend": backend}
    readings: list[CompiledReading] = []
    with threads(1), Bar() as progress:
        for number, name in enumerate(names):
            progress(name, number, len(names))
            readings.extend(run([name], held, rounds, backend))
            write(readings, where, out)
    screen.table(Grid(HEADS, [cells(reading) for reading in readings], title=title(where)))
    if any(reading.wrong for reading in readings):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
