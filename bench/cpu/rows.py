"""The rows of the CPU table: each checks first, then measures its contestants in turns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attnzoo.evaluation import timing
from attnzoo_kernels import BlockLayout, Extras, block_sparse_attention
from attnzoo_kernels.dispatch import path_of
from attnzoo_kernels.op import make_call
from bench.contestants import Missing, Run
from bench.cpu import cases, clock, gate, peers


@dataclass
class Row:
    """One row.

    Attributes:
        part: Which table it belongs to.
        name: The case.
        figures: What was measured, by contestant or quantity.
        unit: Of the figures.
        ratio: The row's verdict: how many times faster than the baseline, or a cost; ``None`` where there is none.
        must: The bound on the ratio, on any machine: it is one to a peer or a floor of the same run; or ``None``.
        at_most: Whether the bound is an upper one.
        notes: Which path of the CPU ran, and reasons of those that are missing.
    """

    part: str
    name: str
    figures: dict[str, float] = field(default_factory=dict)
    unit: str = "ms"
    ratio: float | None = None
    must: float | None = None
    at_most: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool | None:
        """Whether the bound holds; ``None`` without one."""
        if self.ratio is None or self.must is None:
            return None
        return self.ratio <= self.must if self.at_most else self.ratio >= self.must


FLEX_MUST = {"fp32": (1.1, 1.15, 1.2), "bf16": (1.6, 1.6, 1.6)}
STEP_MUST = (1.5, 1.9, 2.6)
DECODE_MUST = 2.5
FEW_ROWS = {1: (8.0, 8.0), 16: (5.0, 5.0), 64: (2.0, 3.0)}
"""Rows of a small call, and how many times SDPA's time it may take: forward; forward and backward."""


def ours(layout: BlockLayout, extras: Extras | None = None) -> Run:
    """The blocked implementation."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return block_sparse_attention(q, k, v, layout, extras=extras, impl="blocked")

    return run


def path_taken(layout: BlockLayout, q: Tensor, k: Tensor, v: Tensor) -> str:
    """Which path of the CPU computes a plain causal call."""
    call = make_call((q, k, v), layout, causal=True, scale=q.shape[3] ** -0.5, extras=Extras())
    return f"path: {path_of(call)}"


def forward(dtype: torch.dtype, threads: int) -> Iterator[Row]:
    """Forward against compiled FlexAttention, with dense attention beside it."""
    short = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    part = f"forward, {short}, {threads} thread{'s' if threads > 1 else ''}"
    with timing.threads(threads):
        for case, must in zip(cases.FORWARD, FLEX_MUST[short], strict=True):
            case = case.with_dtype(dtype)
            layout = case.layout()
            (q, k, v) = case.inputs()
            row = Row(part, case.name, must=must, notes=[path_taken(layout, q, k, v)])
            contestants: dict[str, Run] = {"ours": ours(layout)}
            try:
                contestants["flex"] = peers.flex(layout)
            except Missing as reason:
                row.notes.append(f"flex: {reason}")
            expected = gate.truth(q, k, v, layout)
            for name, run in contestants.items():
                gate.check(name, run(q, k, v), expected)
            contestants["dense sdpa"] = peers.sdpa
            found = timing.rounds(_bind(contestants, q, k, v), wall=threads > 1)
            row.figures = timing.middle(found)
            if "flex" in found:
                row.ratio = timing.paired(found, "flex", "ours")
            row.figures["of density x dense"] = row.figures["ours"] / (layout.density() * row.figures["dense sdpa"])
            yield row


def _bind(contestants: dict[str, Run], *inputs: Tensor) -> dict[str, Callable[[], Any]]:
    def bind(run: Run) -> Callable[[], Any]:
        return lambda: run(*inputs)

    return {name: bind(run) for name, run in contestants.items()}


def training() -> Iterator[Row]:
    """A training step over density x dense attention's: no other block-sparse attention trains on CPUs."""
    with timing.threads(1):
        for case, must in zip(cases.FORWARD, STEP_MUST, strict=True):
            layout = case.layout()
            leaves = [x.requires_grad_() for x in case.inputs()]
            expected = _gradients(layout, leaves)
            for gradient, wanted in zip(_step(ours(layout), leaves)(), expected, strict=True):
                gate.check("ours", gradient, wanted)
            row = Row("training step, fp32, 1 thread", case.name, must=must, at_most=True)
            row.notes.append(path_taken(layout, *(x.detach() for x in leaves)))
            contestants = {"ours": _step(ours(layout), leaves), "dense sdpa": _step(peers.sdpa, leaves)}
            found = timing.rounds(contestants, wall=False, seconds=8, least=3)
            row.figures = timing.middle(found)
            row.figures["times faster than dense"] = timing.paired(found, "dense sdpa", "ours")
            row.ratio = timing.paired(found, "ours", "dense sdpa") / layout.density()
            yield row


def _step(run: Run, leaves: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward of the sum of outputs."""
    return lambda: torch.autograd.grad(run(*leaves).sum(), leaves)


def _gradients(layout: BlockLayout, leaves: list[Tensor]) -> list[Tensor]:
    """Gradients of the sum of outputs by masked attention, head by head."""
    mask = peers.token_mask(layout)
    parts = []
    for head in range(leaves[0].shape[1]):
        one = [x.detach()[:, head : head + 1].requires_grad_() for x in leaves]
        shared = mask[:, head : head + 1] if mask.shape[1] > 1 else mask
        q, k, v = one
        parts.append(torch.autograd.grad(scaled_dot_product_attention(q, k, v, attn_mask=shared).sum(), one))
    return [torch.cat(x, 1) for x in zip(*parts, strict=True)]


def decoding() -> Iterator[Row]:
    """A decoding step, the making of its layout included, over a copy of the keys and values that it reads."""
    with timing.threads(2):
        for case in cases.DECODES:
            q, k, v = case.inputs()
            contestants = _decoders(case)
            layout = BlockLayout.from_indices(case.index(), 1, case.block, 1, case.cache)
            gate.check("ours", contestants["ours"](q, k, v), gate.truth(q, k, v, layout))
            gate.check("folded", contestants["folded sdpa"](q, k, v), contestants["dense sdpa"](q, k, v))
            row = Row("decoding, fp32, 2k of 16k tokens, 2 threads", case.name, must=DECODE_MUST, at_most=True)
            row.notes.append(path_taken(layout, q, k, v))
            found = timing.rounds(_bind(contestants, q, k, v), wall=True, most=201)
            row.figures = timing.middle(found)
            row.figures["times faster than dense"] = timing.paired(found, "dense sdpa", "ours")
            row.ratio = timing.paired(found, "ours", "copy")
            yield row


def _decoders(case: cases.Decode) -> dict[str, Run]:
    index = case.index()
    group = case.heads // case.groups

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layout = BlockLayout.from_indices(index, 1, case.block, 1, case.cache)
        return block_sparse_attention(q, k, v, layout, impl="blocked")

    def folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q.view(1, -1, group, q.shape[3]), k, v).view_as(q)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, enable_gqa=True)

    def copy(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.stack([k[:, :, : case.selected], v[:, :, : case.selected]])

    return {"ours": step, "dense sdpa": dense, "folded sdpa": folded, "copy": copy}


def few_rows() -> Iterator[Row]:
    """Calls of a few rows whose layout is kept, over dense attention: forward, and forward and backward."""
    with timing.threads(1):
        for tokens, bounds in FEW_ROWS.items():
            case = cases.Case(f"T = {tokens}", tokens=tokens)
            layout = BlockLayout.dense(case.block, case.block, tokens, tokens)
            contestants: dict[str, Run] = {"ours": ours(layout), "sdpa": peers.sdpa}
            inputs = case.inputs()
            leaves = [x.clone().requires_grad_() for x in inputs]
            gate.check("ours", contestants["ours"](*inputs), gate.truth(*inputs, layout))
            for found, wanted in zip(_step(contestants["ours"], leaves)(), _gradients(layout, leaves), strict=True):
                gate.check("ours", found, wanted)
            calls = {
                "forward": _bind(contestants, *inputs),
                "forward and backward": {name: _step(run, leaves) for name, run in contestants.items()},
            }
            for (kind, runs), must in zip(calls.items(), bounds, strict=True):
                row = Row("a call of few rows, fp32, 1 thread", f"{case.name}, {kind}", must=must, at_most=True)
                row.notes.append(path_taken(layout, *inputs))
                times = timing.rounds(runs, wall=False, seconds=1, most=401)
                row.figures = timing.middle(times)
                row.ratio = timing.paired(times, "ours", "sdpa")
                yield row


_MEMORY = """
import sys, torch
from bench.cpu import cases
from attnzoo_kernels import block_sparse_attention
torch.set_num_threads(1)
case = getattr(cases, sys.argv[1])
def setting(case):
    layout, extras = cases.switch(sys.argv[2], case, case.layout())
    return case.inputs(), layout, extras
def run(inputs, layout, extras):
    if sys.argv[3] == "train":
        leaves = [x.requires_grad_() for x in inputs]
        out = block_sparse_attention(*leaves, layout, extras=extras, impl="blocked")
        torch.autograd.grad(out.sum(), leaves)
    else:
        block_sparse_attention(*inputs, layout, extras=extras, impl="blocked")
big = setting(case)
run(*setting(cases.Case("warm", tokens=512)))
ready()
run(*big)
"""


def memory() -> Iterator[Row]:
    """Growth of peak memory by forward and backward."""
    for name, must in (("none", 100.0), ("origin", 165.0)):
        growth = clock.peak_growth(_MEMORY, "MEMORY", name, "train")
        case = "plain" if name == "none" else name
        yield Row(
            "peak memory of a training step, T = 8k, density .12", case, {"growth": growth}, "MiB", growth, must, True
        )


def switches() -> Iterator[Row]:
    """What each switch costs against the same layout without it, its own gradients included."""
    case = cases.FORWARD[1]
    small = cases.Case("small", tokens=512, density=0.3)
    layout = case.layout()
    inputs = case.inputs()
    with timing.threads(1):
        for name in cases.SWITCHES:
            if name == "none":
                continue
            _check_switch(name, small)
            figures = _switch_costs(layout, *cases.switch(name, case, layout), inputs)
            growth = clock.peak_growth(_MEMORY, "LONG", name, "forward")
            yield Row("switches, density .06", name, figures, "x", max(figures.values()), 1.6, True)
            yield Row("switches, peak memory at T = 16k", name, {"growth": growth}, "MiB", growth, 150.0, True)


def _check_switch(name: str, case: cases.Case) -> None:
    layout, extras = cases.switch(name, case, case.layout())
    inputs = case.inputs()
    gate.check(
        name, ours(layout, extras)(*inputs), block_sparse_attention(*inputs, layout, extras=extras, impl="reference")
    )


def _switch_costs(
    layout: BlockLayout, turned: BlockLayout, extras: Extras, inputs: tuple[Tensor, Tensor, Tensor]
) -> dict[str, float]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    plain = ours(layout)
    run = ours(turned, extras)
    trained = replace(
        extras,
        key_bias=_leaf(extras.key_bias),
        aux=None if extras.aux is None else tuple(_leaf(x) for x in extras.aux),
        gate=_leaf(extras.gate),
    )
    more = [x for x in (trained.key_bias, *(trained.aux or ()), trained.gate) if isinstance(x, Tensor)]
    step = ours(turned, trained)
    contestants = {
        "plain": lambda: plain(*inputs),
        "with": lambda: run(*inputs),
        "plain step": lambda: torch.autograd.grad(plain(*leaves).sum(), leaves),
        "step": lambda: torch.autograd.grad(step(*leaves).sum(), [*leaves, *more]),
    }
    found = timing.rounds(contestants, wall=False, seconds=4)
    return {"forward": timing.paired(found, "with", "plain"), "step": timing.paired(found, "step", "plain step")}


def _leaf(x: Any) -> Any:
    return x.clone().requires_grad_() if isinstance(x, Tensor) else x


def dense_peers() -> Iterator[Row]:
    """Who computes dense causal attention how fast: for orientation."""
    case = cases.Case("T = 1024, dense", tokens=1024, density=1.0)
    layout = case.layout()
    (q, k, v) = case.inputs()
    expected = gate.truth(q, k, v, layout)
    row = Row("dense, fp32, 1 thread", case.name, notes=[path_taken(layout, q, k, v)])
    every = BlockLayout.dense(case.block, case.block, case.tokens, case.tokens)
    contestants: dict[str, Run] = {
        "ours": ours(every),
        "ours, block by block": ours(layout),
        "sdpa": peers.sdpa,
        "naive": peers.naive(layout),
    }
    try:
        contestants["x-transformers"] = peers.x_transformers()
    except Missing as reason:
        row.notes.append(str(reason))
    with timing.threads(1):
        for name, run in contestants.items():
            gate.check(name, run(q, k, v), expected)
        row.figures = timing.medians(_bind(contestants, q, k, v), wall=False, seconds=3)
    row.ratio = row.figures["sdpa"] / row.figures["ours"]
    yield row


def scaling() -> Iterator[Row]:
    """Time against length at eight blocks a row; the last row has the exponent."""
    points = []
    with timing.threads(1):
        for case in cases.SCALING:
            layout = case.layout()
            (q, k, v) = case.inputs()
            run = ours(layout)
            if case is cases.SCALING[0]:
                gate.check("ours", run(q, k, v), gate.truth(q, k, v, layout))
            contestants = {"ours": lambda run=run, x=(q, k, v): run(*x)}
            time = timing.medians(contestants, wall=False, seconds=2, least=3)["ours"]
            points.append((math.log(case.tokens), math.log(time)))
            yield Row("scaling, 8 blocks a row, 1 thread", case.name, {"ours": time})
    mean = [sum(x) / len(points) for x in zip(*points, strict=True)]
    slope = sum((x - mean[0]) * (y - mean[1]) for x, y in points) / sum((x - mean[0]) ** 2 for x, _ in points)
    yield Row("scaling, 8 blocks a row, 1 thread", "exponent", {"exponent": slope}, "", slope, 1.1, True)


PARTS: dict[str, Callable[[], Iterator[Row]]] = {
    "forward fp32": lambda: forward(torch.float32, 1),
    "forward fp32, 2 threads": lambda: forward(torch.float32, 2),
    "forward bf16": lambda: forward(torch.bfloat16, 1),
    "training": training,
    "decoding": decoding,
    "few rows": few_rows,
    "memory": memory,
    "switches": switches,
    "dense": dense_peers,
    "scaling": scaling,
}
