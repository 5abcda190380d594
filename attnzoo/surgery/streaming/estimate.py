"""What a conversion of a folder will take, said before it starts: memory, disk, runs of the text, and a rough time.

Letters: C model width, G KV heads, D head width.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attnzoo.reporting.tables import Grid
from attnzoo.surgery.hosts.families.known import weights_of
from attnzoo.surgery.hosts.site import Site
from attnzoo.surgery.lowrank.calibration import Batch, SiteStatistics, has_biases, real_tokens, watched_sites
from attnzoo.surgery.lowrank.factor import Request, solve_site
from attnzoo.surgery.lowrank.one_site import available_bytes, in_words, statistics_bytes
from attnzoo.surgery.streaming.skeleton import Skeleton
from attnzoo_kernels.errors import ConfigError

LIBRARIES = 600 << 20
"""Bytes of a process that has imported torch and transformers, roughly."""

_FP64 = 8
_SOLVER_MATRICES = 8
"""Matrices of a site's size that are there at once while it is solved, roughly."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a conversion takes.

    Attributes:
        weights: Bytes of all weights as they are held.
        least: Bytes without which a conversion layer by layer cannot be done: one layer, and one site's statistics.
        by_layers: Peak memory layer by layer, in bytes, roughly.
        in_memory: Peak memory of ``convert`` and ``save``, in bytes, roughly.
        disk: Bytes beside the result while layers are converted.
        result: Bytes of the result, at most.
        tokens: Of the calibration text.
        forward: Times that the text goes forward through the model, layer by layer.
        backward: Times that it goes backward.
        free: Bytes of memory that are free; ``None`` where nothing says so.
        seconds: How long it takes layer by layer, from one layer and the first batch; ``None`` where not measured.
    """

    weights: int
    least: int
    by_layers: int
    in_memory: int
    disk: int
    result: int
    tokens: int
    forward: int
    backward: int
    free: int | None
    seconds: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain data, for JSON."""
        return asdict(self)

    def grid(self) -> Grid:
        """The figures as a table."""
        text = "no calibration text"
        if self.tokens:
            text = f"{self.forward} times forward, {self.backward} times backward, {self.tokens:,} tokens"
        rows = [
            ("weights", in_words(self.weights)),
            ("memory, layer by layer", f"about {in_words(self.by_layers)}"),
            ("memory, the model whole", f"about {in_words(self.in_memory)}"),
            ("memory that is free", "unknown" if self.free is None else in_words(self.free)),
            ("disk meanwhile, beside the result", in_words(self.disk)),
            ("runs of the text", text),
            ("time, layer by layer", "not measured" if self.seconds is None else f"about {_in_time(self.seconds)}"),
        ]
        return Grid(("what", "how much"), rows, title="what it takes")

    def check(self, out: Path) -> None:
        """Raises where memory or disk is clearly missing.

        Raises:
            ConfigError: If it is.
        """
        if self.free is not None and self.least > self.free:
            raise ConfigError(
                f"memory: expected {in_words(self.least)} for one layer and its statistics, got "
                f"{in_words(self.free)} that are free"
            )
        parent = next(path for path in out.absolute().parents if path.exists())
        room = shutil.disk_usage(parent).free
        if self.disk + self.result > room:
            raise ConfigError(
                f"out: expected room for {in_words(self.disk + self.result)} in {parent}, got {in_words(room)}"
            )


def _in_time(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def needs_of(skeleton: Skeleton, sites: Sequence[Site], request: Request | None, batches: Sequence[Batch]) -> Needs:
    """What a conversion takes, from sizes alone."""
    size = {name: x.numel * skeleton.held[name].itemsize for name, x in skeleton.stored.items()}
    layers = {path: sum(size[name] for name in skeleton.names_of(path)) for path in skeleton.layers}
    whole = sum(size.values())
    layer = max(layers.values())
    outer = whole - sum(layers.values())
    if request is None or not batches:
        return _plain(whole, outer, layer)
    tokens = [batch["input_ids"].numel() for batch in batches]
    at_once = sum(tokens) if request.refits else max(tokens)
    width = max(site.width for site in sites)
    item = max(dtype.itemsize for dtype in skeleton.held.values())
    held = statistics_bytes(skeleton.model, sites, gradients=request.gradients)
    largest = max(held.values())
    # The solver's matrices, and what one layer's graph or one run of the text through it holds.
    matrix = _FP64 * max(max(site.width, 2 * site.kv_heads * site.head_dim) for site in sites) ** 2
    solving = _SOLVER_MATRICES * matrix
    graph = 2 * item * at_once * _features(skeleton.model.get_submodule(skeleton.layers[0]))
    logits = max(tokens) * (item + 12) * _vocabulary(skeleton.model) if request.gradients else 0
    hidden = sum(tokens) * width * item
    running = max(solving, graph, logits)
    return Needs(
        weights=whole,
        least=outer + layer + largest,
        by_layers=LIBRARIES + outer + 2 * layer + largest + running + 3 * hidden,
        in_memory=LIBRARIES
        + 2 * whole
        + (largest if request.one_site_at_a_time else sum(held.values()))
        + max(running, len(layers) * graph if request.gradients else 0),
        disk=(len(layers) * hidden if request.gradients else 0) + (sum(held.values()) if request.refits else 0),
        result=whole,
        tokens=sum(tokens),
        forward=1 + int(request.gradients) + 2 * int(request.refits),
        backward=int(request.gradients),
        free=available_bytes(),
    )


def _plain(whole: int, outer: int, layer: int) -> Needs:
    return Needs(
        weights=whole,
        least=outer + layer,
        by_layers=LIBRARIES + outer + 3 * layer,
        in_memory=LIBRARIES + 2 * whole,
        disk=0,
        result=2 * whole,
        tokens=0,
        forward=0,
        backward=0,
        free=available_bytes(),
    )


def _features(layer: nn.Module) -> int:
    """Values that a layer makes of one token."""
    return sum(module.out_features for module in layer.modules() if isinstance(module, nn.Linear))


def _vocabulary(model: Any) -> int:
    head = model.get_output_embeddings()
    return 0 if head is None else int(head.weight.shape[0])


def timed(
    needs: Needs, skeleton: Skeleton, sites: Mapping[str, Site], request: Request, batches: Sequence[Batch]
) -> Needs:
    """The same with a rough time: the first batch through one layer, and one site solved, for all of them.

    Args:
        needs: Without a time.
        skeleton: The model.
        sites: By the path of their layer.
        request: What is asked of them.
        batches: The text.
    """
    path = next(path for path in skeleton.layers if path in sites)
    site = sites[path]
    batch = batches[0]
    call = skeleton.calls(batch)
    number = skeleton.layers.index(path)
    with skeleton.loaded(path) as layer:
        block = skeleton.model.get_submodule(site.path)
        found = {site.path: SiteStatistics.empty(site.width + int(has_biases(block)))}
        began = time.perf_counter()
        hidden = call.hidden.requires_grad_(request.gradients)
        modules = {site.path: block}
        with watched_sites(modules, gradients=request.gradients) as seen, torch.set_grad_enabled(request.gradients):
            out = skeleton.run(layer, hidden, call.arguments[number])
            forward = time.perf_counter() - began
            if request.gradients:
                out.sum().backward()
        seen.add_to(found, real_tokens(batch))
        both = time.perf_counter() - began
        began = time.perf_counter()
        solve_site(weights_of(block), replace(request, refit=False) if request.refits else request, found[site.path])
        solving = time.perf_counter() - began
    shares = needs.tokens / batch["input_ids"].numel()
    runs = both + forward * (needs.forward - 1)
    return replace(needs, seconds=runs * shares * len(skeleton.layers) + solving * len(sites))
