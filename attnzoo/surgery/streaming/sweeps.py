"""Runs of a calibration text layer by layer: forward to the loss, backward through each layer anew, and a refit.

Every layer is read from its files once in a sweep, and all batches go through it. What goes into each layer is kept in
files until the way back has used it (activation checkpointing with a layer as the unit). The sums are those of
:func:`attnzoo.surgery.lowrank.calibration.collect`, to the bit: the same operations on the same batches.

Letters: B batch, T tokens, C model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from attnzoo.surgery.hosts.site import Site
from attnzoo.surgery.lowrank.calibration import (
    Batch,
    Progress,
    SiteStatistics,
    Statistics,
    has_biases,
    real_tokens,
    watched_sites,
)
from attnzoo.surgery.lowrank.factor import Solution
from attnzoo.surgery.lowrank.one_site import Lazily
from attnzoo.surgery.lowrank.refit import EndOfRun, Student
from attnzoo.surgery.streaming.skeleton import LayerCalls, Skeleton

TakeStatistics = Callable[[Site, nn.Module, SiteStatistics], None]
"""Given a site, its layer with weights, and the sums at the site; what it keeps stays in memory."""

TakeSolution = Callable[[Site, nn.Module, Solution], None]


@dataclass(frozen=True, eq=False, kw_only=True)
class Text:
    """A calibration text on its way through a model.

    Attributes:
        skeleton: The model.
        batches: The text.
        sites: By the path of their layer.
        scratch: A folder for what does not stay in memory.
        progress: Told of each layer.
    """

    skeleton: Skeleton
    batches: Sequence[Batch]
    sites: Mapping[str, Site]
    scratch: Path
    progress: Progress

    def collect(self, *, gradients: bool, take: TakeStatistics) -> None:
        """Sums up what the sites see, and gives the sums of each site while its layer is in memory.

        Args:
            gradients: Also go backward; sites then come from the last to the first.
            take: Takes the sums.
        """
        calls = [self.skeleton.calls(batch) for batch in self.batches]
        with_sites = [number for number, path in enumerate(self.skeleton.layers) if path in self.sites]
        if not gradients:
            self._forward_sums(calls, with_sites[-1] + 1, take)
            return
        hidden = self._forward(calls, with_sites[0])
        grads = []
        for number, (batch, x) in enumerate(zip(self.batches, hidden, strict=True)):
            grads.append(self.skeleton.loss_gradient(batch, x))
            self.progress("loss", number + 1, len(self.batches))
        self._backward(calls, with_sites[0], grads, take)

    def _forward_sums(self, calls: Sequence[LayerCalls], count: int, take: TakeStatistics) -> None:
        hidden = [call.hidden for call in calls]
        for number, path in enumerate(self.skeleton.layers[:count]):
            with self.skeleton.loaded(path) as layer, torch.no_grad():
                modules = self._blocks(path)
                found = _empty(self.sites.get(path), modules)
                for at, batch in enumerate(self.batches):
                    with watched_sites(modules, gradients=False) as seen:
                        hidden[at] = self.skeleton.run(layer, hidden[at], calls[at].arguments[number])
                    seen.add_to(found, real_tokens(batch))
                self._give(path, layer, found, take)
            self.progress("statistics", number + 1, count)

    def _forward(self, calls: Sequence[LayerCalls], first: int) -> list[Tensor]:
        """What the last layer gives; what goes into each from the first site on is kept in a file."""
        hidden = [call.hidden for call in calls]
        layers = self.skeleton.layers
        for number, path in enumerate(layers):
            if number >= first:
                _save({str(at): x.contiguous() for at, x in enumerate(hidden)}, self._kept(number))
            with self.skeleton.loaded(path) as layer:
                for at, x in enumerate(hidden):
                    # As with a graph, which may choose other kernels; it ends here.
                    with torch.enable_grad():
                        out = self.skeleton.run(layer, x.detach().requires_grad_(), calls[at].arguments[number])
                    hidden[at] = out.detach()
            self.progress("forward", number + 1, len(layers))
        return hidden

    def _backward(self, calls: Sequence[LayerCalls], first: int, grads: list[Tensor], take: TakeStatistics) -> None:
        layers = self.skeleton.layers
        for number in reversed(range(first, len(layers))):
            path = layers[number]
            inputs = _load(self._kept(number))
            self._kept(number).unlink()
            with self.skeleton.loaded(path) as layer:
                modules = self._blocks(path)
                found = _empty(self.sites.get(path), modules)
                for at, batch in enumerate(self.batches):
                    x = inputs.pop(str(at)).requires_grad_()
                    with watched_sites(modules, gradients=True) as seen, torch.enable_grad():
                        # Activation checkpointing: the layer once more, now with its graph.
                        out = self.skeleton.run(layer, x, calls[at].arguments[number])
                        out.backward(grads[at])
                    seen.add_to(found, real_tokens(batch))
                    grads[at] = x.grad if x.grad is not None else torch.zeros_like(x)
                    del seen, out
                self._give(path, layer, found, take)
            self.progress("statistics", len(layers) - number, len(layers) - first)

    def refit(self, student: Student, batch: Batch, take: TakeSolution) -> None:
        """Lets a student follow its teacher through the layers; gives each solution while its layer is in memory."""
        with torch.no_grad():
            calls = self.skeleton.calls(batch)
            hidden = calls.hidden
            for number, path in enumerate(self.skeleton.layers):
                with self.skeleton.loaded(path) as layer:
                    with suppress(EndOfRun), student.follow(path, layer):
                        hidden = self.skeleton.run(layer, hidden, calls.arguments[number])
                    site = self.sites.get(path)
                    if site is not None:
                        take(site, layer, Solution(*student.take(site)))
                if student.solved == len(self.sites):
                    return

    def _blocks(self, path: str) -> dict[str, nn.Module]:
        site = self.sites.get(path)
        return {} if site is None else {site.path: self.skeleton.model.get_submodule(site.path)}

    def _give(self, path: str, layer: nn.Module, found: Mapping[str, SiteStatistics], take: TakeStatistics) -> None:
        site = self.sites.get(path)
        if site is not None:
            take(site, layer, found[site.path])

    def _kept(self, number: int) -> Path:
        return self.scratch / f"inputs-{number}.safetensors"


class KeptStatistics:
    """Sums of sites in files of a folder."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.counts: dict[str, tuple[int, int]] = {}

    def keep(self, site: Site, layer: nn.Module, found: SiteStatistics) -> None:
        """Keeps the sums of a site."""
        named = {"moment": found.moment, "first": found.first, "weighted": found.weighted, "fisher": found.fisher}
        _save({name: x for name, x in named.items() if x is not None}, self._file(site.path, "sums"))
        _save({str(at): x for at, x in enumerate(found.token_weight)}, self._file(site.path, "tokens"))
        self.counts[site.path] = (found.tokens, found.sequences)

    def statistics(self, sites: Sequence[Site], batches: Sequence[Batch], *, gradients: bool) -> Statistics:
        """Statistics whose sums are read when they are asked for, those of one site at a time."""
        return Statistics(Lazily([site.path for site in sites], self._read), list(batches), gradients)

    def _read(self, path: str) -> SiteStatistics:
        tokens, sequences = self.counts[path]
        weights = _load(self._file(path, "tokens"))
        return SiteStatistics(
            **_load(self._file(path, "sums")),
            token_weight=[weights[str(at)] for at in range(len(weights))],
            tokens=tokens,
            sequences=sequences,
        )

    def _file(self, path: str, what: str) -> Path:
        return self.scratch / f"{path}.{what}.safetensors"


def _empty(site: Site | None, modules: Mapping[str, nn.Module]) -> dict[str, SiteStatistics]:
    """Sums over nothing, of a layer's site where it has one."""
    if site is None:
        return {}
    return {site.path: SiteStatistics.empty(site.width + int(has_biases(modules[site.path])))}


def _save(tensors: Mapping[str, Tensor], file: Path) -> None:
    from safetensors.torch import save_file

    save_file(dict(tensors), file)


def _load(file: Path) -> dict[str, Tensor]:
    """Tensors in memory of their own: the file may go."""
    from safetensors.torch import load_file

    return {name: x.clone() for name, x in load_file(file).items()}
