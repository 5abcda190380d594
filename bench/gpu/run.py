"""Measuring one cell: check, then time; what is wrong has no time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from attnzoo_kernels import BlockLayout, visible_pairs
from bench.contestants import Missing, Run, Wrong
from bench.gpu import gate, peers
from bench.gpu.cells import PAIRS, Cell, pairs
from bench.gpu.machine import LONG, milliseconds

ROUNDS = 3
OURS = "ours"


def measure(cell: Cell, device: torch.device, *, tuned: bool, without: Sequence[str] = ()) -> dict[str, Any]:
    """Everything that is said about a cell.

    Args:
        cell: The cell.
        device: Where.
        tuned: Whether FlexAttention may search for its tiles.
        without: Contestants that are left out.

    Raises:
        torch.OutOfMemoryError: If the cell does not fit; the caller says so in its place.
    """
    result: dict[str, Any] = {"cell": asdict(cell), "ms": {}, "reasons": {}, "errors": {}}
    if cell.what == "recompilations":
        return result | recompilations(cell, device)
    layout = cell.layout(device)
    inputs = cell.inputs(device)
    visible, dense = visible_pairs(layout, causal=True, batch=1, heads=cell.heads)
    # As an honest kernel counts: multiplications and additions of the pairs that are seen, five products backwards.
    per_pair = 4 * cell.width * (2.5 if cell.what == "backward" else 1.0)
    result |= {"density": visible / dense, "flops": visible * per_pair, "dense flops": dense * per_pair}
    if cell.what == "decode":
        element = inputs[1].element_size()
        result["bytes"] = int(layout.count.sum()) * cell.block * cell.width * 2 * element
        if layout.start.shape[1] == 1:
            result["bytes"] *= cell.groups
    if cell.what == "form":
        return result | _forms(cell, layout, inputs)
    makers: dict[str, Callable[[], Run]] = {OURS: lambda: peers.ours(layout)}
    for name, make in peers.contestants(cell, layout, tuned=tuned).items():
        if name in without:
            result["reasons"][name] = "left out"
        else:
            makers[name] = make
    runs, dout = _right(cell, layout, inputs, result, makers)
    if OURS in runs:
        result["ms"] = _times(cell, runs, inputs, dout, device)
    if cell.what == "decode" and device.type == "cuda" and OURS in runs:
        result["ms"] |= _graphed(result["reasons"], runs, inputs, device)
    return result


def _right(
    cell: Cell,
    layout: BlockLayout,
    inputs: tuple[Tensor, Tensor, Tensor],
    result: dict[str, Any],
    makers: dict[str, Callable[[], Run]],
) -> tuple[dict[str, Run], Tensor | None]:
    """The contestants that are right; notes why others are missing."""
    backward = cell.what == "backward"
    dout = torch.randn_like(inputs[0]) if backward else None
    group = cell.groups - 1
    truth = gate.solve(*inputs, layout, group, dout)
    runs: dict[str, Run] = {}
    for name, make in makers.items():
        try:
            run = make()
            out, gradients = _once(run, inputs, dout)
            if name not in peers.DENSE:
                result["errors"][name] = gate.check(name, truth, out, gradients)
            elif not bool(out.isfinite().all()):
                result["reasons"][name] = "not finite"
                continue
        except Missing as reason:
            result["reasons"][name] = str(reason)
        except Wrong as finding:
            result["reasons"][name] = f"wrong: {finding}"
            result["wrong"] = result.get("wrong", False) or name == OURS
        except torch.OutOfMemoryError:
            if name == OURS:
                raise
            result["reasons"][name] = "out of memory"
        except Exception as error:  # a peer's own failure is its reason; ours is an error of this command
            if name == OURS:
                raise
            first = (str(error).strip().splitlines() or [""])[0]
            result["reasons"][name] = f"{type(error).__name__}: {first[:200]}"
        else:
            runs[name] = run
    return runs, dout


def _once(run: Run, inputs: tuple[Tensor, Tensor, Tensor], dout: Tensor | None) -> tuple[Tensor, Any]:
    if dout is None:
        return run(*inputs), None
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = run(*leaves)
    return out.detach(), torch.autograd.grad(out, leaves, dout)


def _times(
    cell: Cell, runs: dict[str, Run], inputs: tuple[Tensor, ...], dout: Tensor | None, device: torch.device
) -> dict[str, float | None]:
    """Milliseconds by contestant: the median of rounds in which they take turns."""
    steps = {name: _step(run, inputs, dout) for name, run in runs.items()}
    found: dict[str, list[float | None]] = {name: [] for name in steps}
    for done in range(ROUNDS if device.type == "cuda" else 1):
        for name, step in steps.items():
            # What takes long varies little.
            if not done or (found[name][0] or 0.0) < LONG:
                found[name].append(milliseconds(step, device))
    return {name: _median(values) for name, values in found.items()}


def _median(values: list[float | None]) -> float | None:
    known = sorted(x for x in values if x is not None)
    return known[len(known) // 2] if known else None


def _step(run: Run, inputs: tuple[Tensor, ...], dout: Tensor | None) -> Callable[[], Any]:
    """What is timed: a forward, or the backward alone of a graph that is kept."""
    if dout is None:
        return lambda: run(*inputs)
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = run(*leaves)
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def _graphed(
    reasons: dict[str, str], runs: dict[str, Run], inputs: tuple[Tensor, ...], device: torch.device
) -> dict[str, float | None]:
    """Decoding from a CUDA graph, as servers do: without the time it takes to start kernels."""
    found: dict[str, float | None] = {}
    for name in (OURS, *(name for name in runs if name.startswith("flex"))):
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                runs[name](*inputs)
        except Exception as error:  # a peer that cannot be captured must not cost our own time
            if name == OURS:
                raise
            first = (str(error).strip().splitlines() or [""])[0]
            reasons[f"{name}, graph"] = f"{type(error).__name__}: {first[:200]}"
            continue
        found[f"{name}, graph"] = _median([milliseconds(graph.replay, device) for _ in range(ROUNDS)])
    return found


def _forms(cell: Cell, layout: BlockLayout, inputs: tuple[Tensor, Tensor, Tensor]) -> dict[str, Any]:
    """A form of the forward loop beside the plain one: checked against it, then timed side by side."""
    device = inputs[0].device
    run = peers.ours(layout)
    truth = gate.solve(*inputs, layout, cell.groups - 1)
    with peers.form("plain"):
        plain = run(*inputs)
    found: dict[str, Any] = {"errors": {}, "reasons": {}, "ms": {}}
    try:
        found["errors"]["plain"] = gate.check("plain", truth, plain)
        with peers.form(cell.form):
            outs = [run(*inputs) for _ in range(3 if device.type == "cuda" else 2)]
        found["errors"][cell.form] = gate.check(cell.form, truth, outs[0])
        difference = float((outs[0].float() - plain.float()).abs().max())
        found["largest difference to plain"] = difference
    except Wrong as finding:
        return found | {"wrong": True, "reasons": {cell.form: f"wrong: {finding}"}}
    if not all(torch.equal(out, outs[0]) for out in outs):
        return found | {"wrong": True, "reasons": {cell.form: "wrong: repeated calls differ"}}
    for name in dict.fromkeys(("plain", cell.form)):
        with peers.form(name):
            times = [milliseconds(lambda: run(*inputs), device) for _ in range(ROUNDS if device.type == "cuda" else 1)]
        found["ms"][name] = _median(times)
    return found


def compiled() -> int:
    """Kernels that this process has compiled or loaded."""
    from attnzoo_kernels._triton import backward, forward

    kernels = (forward.forward_kernel, forward.join_kernel, backward.query_kernel, backward.key_kernel)
    caches = [getattr(kernel, "device_caches", {}) for kernel in kernels]
    return sum(len(entry[0]) for cache in caches for entry in cache.values())


def recompilations(cell: Cell, device: torch.device) -> dict[str, Any]:
    """How many kernels are compiled for random lengths and layouts, forward and backward, once warm."""

    def step(one: Cell) -> None:
        layout = one.layout(device)
        _once(peers.ours(layout), one.inputs(device), torch.ones_like(one.inputs(device)[0]))

    count = PAIRS if device.type == "cuda" else 2
    # Warm: a short call and a long one, since a short one splits its lists.
    for tokens in (cell.tokens // 8, cell.tokens // 8 + 1, cell.tokens * 2):
        step(Cell("forward", cell.width, max(tokens, 4), 0.5, cell.heads, cell.groups, cell.block))
    before = compiled()
    for one in pairs(cell, count):
        step(one)
    found = compiled() - before
    return {"recompilations": found if device.type == "cuda" else None, "pairs": count}
