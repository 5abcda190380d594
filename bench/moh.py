"""What mixing heads saves on this CPU, in one command: ``python -m bench.moh``.

The operation on the routed rows against all heads of the same implementation; a whole layer against ``mha`` on dense
SDPA; a decoding step; and where computing the routed rows alone begins to pay, over lengths and densities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from torch import Tensor

import attnzoo
from attnzoo.evaluation import timing
from attnzoo.evaluation.ten_lines import TenLines
from attnzoo.reporting import charts, labels
from attnzoo.variants.moh.forms import gathering_pays, query_block
from attnzoo.variants.moh.routed_rows import Rows
from attnzoo.variants.moh.router import Counts, best
from attnzoo_kernels import BlockLayout, Extras, block_sparse_attention
from attnzoo_kernels.cpu import flash
from bench.cpu import gate
from bench.cpu.parts import choose, fail_on_red, measure
from bench.cpu.report import about, report
from bench.cpu.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TOKENS = 4096
HEADS = 8
WIDTH = 64
BLOCK = 64
OPERATION_MUST = (0.66, 0.62)
LAYER_MUST = (0.84, 0.76)
LENGTHS = (256, 512, 768, 1024, 2048, 4096)
ACTIVE = (2, 4, 5, 6, 7)
"""Heads of eight that run, in the table of crossings."""
CACHES = (1024, 4096, 16384)
ROOM = 200
"""Tokens that a cache has room for beyond these: one for each measurement."""


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _step(run: Callable[..., Tensor], leaves: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: torch.autograd.grad(run().sum(), leaves, materialize_grads=True, allow_unused=True)


def operation() -> Iterator[Row]:
    """The operation, choice of heads, gathering, scattering and schedule included."""
    with timing.threads(1):
        for shared in (0, 2):
            counts = Counts(shared=shared, routed=HEADS - shared, active=HEADS // 2 - shared)
            scores = _normal(1, TOKENS, counts.routed, seed=1)
            leaves = [_normal(1, HEADS, TOKENS, WIDTH, seed=n).requires_grad_() for n in (2, 3, 4)]
            q, k, v = leaves
            whole = BlockLayout.dense(BLOCK, BLOCK, TOKENS, TOKENS)

            def active(scores: Tensor = scores, counts: Counts = counts) -> Tensor:
                chosen = best(scores, counts).transpose(1, 2)
                always = torch.ones(1, counts.shared, TOKENS, dtype=torch.bool)
                return torch.cat([always, chosen], 1)

            def routed(q: Tensor = q, k: Tensor = k, v: Tensor = v, active: Callable[[], Tensor] = active) -> Tensor:
                rows = Rows.of(active())
                own = rows.gather(q)
                pos = rows.positions(None, 0)
                layout = BlockLayout.dense(query_block(BLOCK, own.shape[2]), BLOCK, own.shape[2], TOKENS)
                return rows.scatter(block_sparse_attention(own, k, v, layout, extras=Extras(q_pos=pos), impl="blocked"))

            def every(q: Tensor = q, k: Tensor = k, v: Tensor = v, layout: BlockLayout = whole) -> Tensor:
                return block_sparse_attention(q, k, v, layout, impl="blocked")

            _check_operation(routed, every, active().unsqueeze(-1), leaves)
            name = f"{HEADS // 2} of {HEADS} heads, {shared} of them shared, T = {TOKENS}"
            contestants = {"routed": routed, "all heads": every}
            yield from _forward_and_step("operation", name, contestants, leaves, ("all heads", (None, None)))
            with _in_blocks():
                _check_operation(routed, every, active().unsqueeze(-1), leaves)
                bounds = ("all heads", OPERATION_MUST)
                yield from _forward_and_step("operation in blocks", name, contestants, leaves, bounds)


@contextmanager
def _in_blocks() -> Iterator[None]:
    """Everything is computed in blocks, the implementation of our own, and nothing by torch's kernel."""
    before = flash.LEAST_ROWS
    flash.LEAST_ROWS = TOKENS + 1
    try:
        yield
    finally:
        flash.LEAST_ROWS = before


def _check_operation(
    routed: Callable[[], Tensor], every: Callable[[], Tensor], active: Tensor, leaves: list[Tensor]
) -> None:
    with torch.no_grad():
        gate.check("routed", routed(), every() * active)
    expected = _step(lambda: every() * active, leaves)()
    _check_close("gradient of routed", _step(routed, leaves)(), expected)


def _check_close(name: str, found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for x, y in zip(found, wanted, strict=True):
        # Nothing but the balance loss moves a router of one active head: its gradient here is 0.
        size = y.detach().abs().max().clamp(min=1e-9)
        gate.check(name, x.detach() / size, y.detach() / size)


def _forward_and_step(
    part: str,
    name: str,
    contestants: dict[str, Callable[[], Tensor]],
    leaves: list[Tensor],
    against: tuple[str, tuple[float | None, float | None]],
) -> Iterator[Row]:
    """One row for the forward pass without a graph, one for forward and backward."""

    def forward(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def quietly() -> Tensor:
            with torch.no_grad():
                return run()

        return quietly

    baseline, bounds = against
    first = next(iter(contestants))
    kinds: tuple[Callable[[Callable[[], Tensor]], Callable[[], Any]], ...] = (forward, lambda run: _step(run, leaves))
    for kind, prepare, must in zip(("forward", "step"), kinds, bounds, strict=True):
        runs = {name: prepare(run) for name, run in contestants.items()}
        found = timing.rounds(runs, wall=False, seconds=75 if must is not None else 1.5, least=5)
        ratio = timing.paired(found, first, baseline)
        yield Row(f"{part}, {kind}, 1 thread", name, timing.middle(found), ratio=ratio, must=must, at_most=True)


def _layers(active: int) -> dict[str, Any]:
    """A layer in both ways of computing and ``mha``, of the same weights; up to two of the active heads are shared."""
    shared = min(2, active - 1)
    options = {"dim": HEADS * WIDTH, "num_heads": HEADS}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kinds = {"routed": "routed", "all heads x gates": "dense"}
        layers: dict[str, Any] = {
            name: attnzoo.create("moh", **options, shared_heads=shared, active_heads=active - shared, compute=compute)
            for name, compute in kinds.items()
        }
        ten_lines = TenLines(**options, most=max(TOKENS, *CACHES) + 1)
        plain = {"mha": attnzoo.create("mha", **options), "mha on dense sdpa": ten_lines}
    weights = layers["routed"].state_dict()
    with torch.no_grad():
        weights["router.weight"].normal_(std=0.5, generator=torch.Generator().manual_seed(5))
    layers["all heads x gates"].load_state_dict(weights)
    for layer in plain.values():
        layer.load_state_dict({name: x for name, x in weights.items() if "router" not in name})
    return {**layers, **plain}


def _check_layers(layers: dict[str, Any], x: Tensor) -> None:
    results = []
    for name in ("routed", "all heads x gates"):
        out = layers[name](x)
        leaves = [x, *layers[name].parameters()]
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    _check_close("routed", *results)


def layer() -> Iterator[Row]:
    """A whole layer of width 512, projections, routers and gates included, against ``mha`` on dense SDPA."""
    with timing.threads(1):
        layers = _layers(HEADS // 2)
        x = _normal(1, TOKENS, HEADS * WIDTH, seed=6).requires_grad_()
        _check_layers(layers, x)
        contestants: dict[str, Callable[[], Tensor]] = {
            name: lambda layer=layer: layer(x) for name, layer in layers.items()
        }
        leaves = [x, *(p for layer in layers.values() for p in layer.parameters())]
        name = f"width 512, {HEADS // 2} of {HEADS} heads, 2 of them shared, T = {TOKENS}"
        yield from _forward_and_step("layer", name, contestants, leaves, ("mha on dense sdpa", LAYER_MUST))


def crossover() -> Iterator[Row]:
    """The layer, routed rows against all heads times gates: below 1 gathering pays."""
    with timing.threads(1):
        for tokens in LENGTHS:
            x = _normal(1, tokens, HEADS * WIDTH, seed=6).requires_grad_()
            for active in ACTIVE:
                layers = _layers(active)
                del layers["mha"], layers["mha on dense sdpa"]
                if tokens == LENGTHS[0]:
                    _check_layers(layers, x)
                contestants: dict[str, Callable[[], Tensor]] = {
                    name: lambda layer=layer, x=x: layer(x) for name, layer in layers.items()
                }
                leaves = [x, *(p for layer in layers.values() for p in layer.parameters())]
                name = f"T = {tokens}, {active} of {HEADS} heads"
                rows = _forward_and_step("crossover", name, contestants, leaves, ("all heads x gates", (None, None)))
                for training, row in enumerate(rows):
                    chosen = gathering_pays(tokens, active / HEADS, training=bool(training))
                    row.notes.append(f"auto takes {'the routed rows' if chosen else 'all heads'}")
                    yield row


def decoding() -> Iterator[Row]:
    """One more token with a cache: the KV heads that its heads need against all."""
    with timing.threads(1), torch.no_grad():
        for slots in CACHES:
            layers = _layers(HEADS // 2)
            contestants: dict[str, Callable[[], Tensor]] = {}
            token = _normal(1, 1, HEADS * WIDTH, seed=8)
            held = _normal(1, HEADS, slots - 1, WIDTH, seed=7)
            for name, layer in layers.items():
                contestants[name] = _one_more_token(layer, token, held)
            gate.check("routed", contestants["routed"](), contestants["all heads x gates"]())
            figures = timing.medians(contestants, wall=False, seconds=3, most=ROOM - 2)
            ratio = figures["routed"] / figures["all heads x gates"]
            yield Row("decoding, 1 thread", f"{slots} tokens, 4 of 8 heads", figures, ratio=ratio, at_most=True)


def _one_more_token(layer: Any, token: Tensor, held: Tensor) -> Callable[[], Tensor]:
    """Behind so many keys, and as many values; each run of a layer finds one more, ten lines of torch as many."""
    slots = held.shape[2]
    if isinstance(layer, TenLines):
        buffers = layer.new_cache(1, slots + 1)
        buffers[:, :, :, :slots] = held
        return lambda: layer(token, buffers, slots)
    cache = layer.new_cache(1, slots + ROOM)
    cache.append({"k": held, "v": held}, slots, differentiable=False)
    return lambda: layer(token, cache=cache)


PARTS: dict[str, Callable[[], Iterator[Row]]] = {
    "operation": operation,
    "layer": layer,
    "decoding": decoding,
    "crossover": crossover,
}


def picture(rows: list[Row], where: dict[str, Any], path: Path) -> None:
    """Draws where gathering pays: time against all heads times gates, over the share of heads that run."""
    with charts.style():
        title = f"When computing chosen heads alone pays: {where['cpu']}, class {where['class']}, width 512, 8 heads"
        figure = charts.sheet(10.5, 4.6, title)
        panels = figure.subplots(1, 2, sharey=True)
        for axes, kind in zip(panels, ("forward", "step"), strict=True):
            _crossings(axes, kind, rows)
        panels[0].set_ylabel("time, times all heads with gates (log scale)")
        ratios = [r.ratio for r in rows if r.part.startswith("crossover") and r.ratio is not None]
        charts.logarithmic(panels[0], "y", min([0.8, *ratios]) / 1.05, max([1.25, *ratios]) * 1.05, most=10)
        for axes in panels:
            labels.at_ends(axes)
        charts.save(figure, path)


def _crossings(axes: Axes, kind: str, rows: list[Row]) -> None:
    """A line for each length."""
    for number, tokens in enumerate(LENGTHS):
        start = f"T = {tokens},"
        own = [r for r in rows if r.part == f"crossover, {kind}, 1 thread" and r.name.startswith(start)]
        line = [r.ratio for r in own if r.ratio is not None]
        if line:
            shares = [active / HEADS for active in ACTIVE]
            axes.plot(shares, line, label=f"{tokens:,} tokens", **charts.look(number))
    axes.axhline(1.0, color=charts.RULE, linewidth=1)
    axes.set_title("training step" if kind == "step" else kind)
    axes.set_xlabel("share of (token, head) pairs that run")
    axes.grid(axis="y")


def main(
    out: Annotated[Path, typer.Option(help="Write OUT.json, OUT.md, and OUT.png of the crossings.")] = Path("out/moh"),
    only: Annotated[list[str] | None, typer.Option(help=f"Parts: {', '.join(PARTS)}; may be repeated.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Measures mixture-of-head attention on this CPU: rows that are not routed are not computed."""
    chosen = choose(PARTS, only)
    where = about()
    rows = measure(PARTS, chosen)
    report(rows, where, out, as_json=as_json)
    if "crossover" in chosen:
        picture(rows, where, out.with_name(f"{out.name}.png"))
    fail_on_red(rows)


if __name__ == "__main__":
    typer.run(main)
