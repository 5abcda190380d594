"""Sequential refit: each site is solved for the inputs that the converted sites before it really give.

Teacher is the model as it was, student the model with the sites solved so far. While the teacher runs over the whole
calibration text as one batch, the student follows it layer by layer.

Letters: T teacher and S student in names of inputs, A the heads' joined outputs, Y the block's output.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from attnzoo.surgery.hosts.families.known import block_of
from attnzoo.surgery.hosts.projections import Projections
from attnzoo.surgery.hosts.site import Site
from attnzoo.surgery.lowrank import merge_heads
from attnzoo.surgery.lowrank import solve as factor
from attnzoo.surgery.lowrank.calibration import (
    Batch,
    Progress,
    Statistics,
    evaluating,
    in_full,
    real_tokens,
    with_constant,
)
from attnzoo.surgery.lowrank.one_site import Lazily
from attnzoo_kernels.errors import ConfigError

INPUT_RIDGE = 0.02
OUTPUT_RIDGE = 0.02


class EndOfRun(Exception):  # noqa: N818  (no error: it ends a partial run)
    """Ends the run of a layer once what is wanted of it has been seen."""


Result = tuple[Projections, float | None, float | None]


def refit_sites(
    model: nn.Module,
    sites: Sequence[Site],
    num_kv_heads: int,
    statistics: Statistics,
    *,
    read: Callable[[nn.Module], Projections],
    build: Callable[[Site, Projections], nn.Module],
    progress: Progress | None = None,
) -> dict[str, Result]:
    """Merges the KV heads of sites one after the other; the model is left as it was.

    Returns:
        By site path: the weights, the share of energy kept, and the relative error of the block's output.
    """
    student, batch = student_of(sites, num_kv_heads, statistics, read=read, build=build, progress=progress)
    with evaluating(model), torch.no_grad(), ExitStack() as hooks:
        for path, layer in _decoder_layers(model, next(iter(student.paths))):
            hooks.enter_context(student.follow(path, layer))
        # The run ends behind the last site.
        with suppress(EndOfRun):
            model(**batch, use_cache=False)
    return student.found


def student_of(
    sites: Sequence[Site],
    num_kv_heads: int,
    statistics: Statistics,
    *,
    read: Callable[[nn.Module], Projections],
    build: Callable[[Site, Projections], nn.Module],
    progress: Progress | None = None,
) -> tuple[Student, Batch]:
    """A student that has not begun, and the batch that its teacher is to read."""
    paths = {site.path.rpartition(".")[0]: site for site in sites}
    batch, weights = join_batches(statistics)
    student = Student(paths, num_kv_heads, statistics, weights, real_tokens(batch))
    student.read = read
    student.build = build
    student.progress = progress
    return student, batch


def join_batches(statistics: Statistics) -> tuple[Batch, Mapping[str, Tensor]]:
    """All calibration batches as one, padded on the right, and each site's token weights ``[B, T]`` beside it."""
    batches = statistics.batches
    more = sorted(set().union(*batches) - {"input_ids", "attention_mask", "labels"})
    if more:
        raise ConfigError(f"calibration: expected input_ids and attention_mask alone with refit, got {more[0]!r}")
    longest = max(batch["input_ids"].shape[1] for batch in batches)

    def padded(rows: Sequence[Tensor]) -> Tensor:
        return torch.cat([pad(x, (0, longest - x.shape[1])) for x in rows])

    joined = {"input_ids": padded([batch["input_ids"] for batch in batches])}
    real = padded([real_tokens(batch) for batch in batches])
    if not bool(real.all()):
        joined["attention_mask"] = real.long()
    if isinstance(statistics.sites, Lazily):
        sites = statistics.sites
        return joined, Lazily(
            list(sites), lambda path: padded(sites[path].token_weight or [torch.zeros(0, 0, device="cpu")])
        )
    return joined, {path: padded(site.token_weight) for path, site in statistics.sites.items() if site.token_weight}


def _decoder_layers(model: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    """All layers of the list that a decoder layer stands in, with their paths."""
    container = path.rpartition(".")[0]
    return [(f"{container}.{name}", layer) for name, layer in model.get_submodule(container).named_children()]


@dataclass(frozen=True, eq=False)
class _Call:
    """What a decoder layer is called with behind its hidden states, by place and by name."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _run(layer: nn.Module, hidden: Tensor, call: _Call) -> Tensor:
    out = layer(hidden, *call.args, **call.kwargs)
    after: Tensor = out[0] if isinstance(out, tuple) else out
    return after


@contextmanager
def _watch(module: nn.Module, *, stop: bool = False) -> Iterator[list[Tensor]]:
    """The inputs that pass through a module, and optionally an end of the run there."""
    seen: list[Tensor] = []

    def see_input(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])
        if stop:
            raise EndOfRun

    handle = module.register_forward_pre_hook(see_input)
    try:
        with suppress(EndOfRun):
            yield seen
    finally:
        handle.remove()


class Student:
    """The converted model, which follows the teacher's run layer by layer."""

    read: Callable[[nn.Module], Projections]
    build: Callable[[Site, Projections], nn.Module]
    progress: Progress | None

    def __init__(
        self,
        paths: dict[str, Site],
        num_kv_heads: int,
        statistics: Statistics,
        weights: Mapping[str, Tensor],
        real: Tensor,
    ) -> None:
        self.paths = paths
        self.num_kv_heads = num_kv_heads
        self.statistics = statistics
        self.weights = weights
        self.real = real
        self.hidden: Tensor | None = None
        self.away = False
        self.found: dict[str, Result] = {}
        self.solved = 0

    def take(self, site: Site) -> Result:
        """The result of a site, which is not kept here any more."""
        return self.found.pop(site.path)

    @contextmanager
    def follow(self, path: str, layer: nn.Module) -> Iterator[None]:
        """Runs the student's layer whenever the teacher's has run."""
        site = self.paths.get(path)
        seen: list[Tensor] = []
        busy = False

        def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if not busy and not self.away:
                seen.append(args[0])

        def see_output(_: nn.Module, args: Any, y: Tensor) -> None:
            if not busy and not self.away:
                seen.append(y)

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            nonlocal busy
            if busy or self.away:
                return
            busy = True
            named = dict(kwargs)
            before = args[0] if args else named.pop("hidden_states")
            call = _Call(args[1:], named)
            try:
                self._step(site, module, (before, out[0] if isinstance(out, tuple) else out), call, seen)
            finally:
                busy = False
                seen.clear()
            if self.solved == len(self.paths):
                raise EndOfRun

        with ExitStack() as hooks:
            if site is not None:
                projections = block_of(layer.get_submodule(site.path.rpartition(".")[2])).projections
                hooks.callback(projections["k_proj"].register_forward_pre_hook(see).remove)
                hooks.callback(projections["o_proj"].register_forward_hook(see_output).remove)
            hooks.callback(layer.register_forward_hook(after, with_kwargs=True).remove)
            yield

    def _step(
        self,
        site: Site | None,
        layer: nn.Module,
        teacher: tuple[Tensor, Tensor],
        call: _Call,
        seen: list[Tensor],
    ) -> None:
        """Moves the student's hidden states through one layer, converted first where it has a site."""
        before, after = teacher
        if site is None:
            self.hidden = after if self.hidden is None else _run(layer, self.hidden, call)
            return
        hidden = before if self.hidden is None else self.hidden
        # The block also makes up for what the residual stream has lost so far.
        wanted = (seen[1] + (before - hidden))[self.real]
        refit = _SiteRefit(self, site, layer, hidden, call)
        self.found[site.path] = result = refit.solve(seen[0][self.real], wanted)
        self.solved += 1
        self.hidden = _run(refit.layer_with(result[0]), hidden, call)
        if self.progress is not None:
            self.progress("refit", self.solved, len(self.paths))


class _SiteRefit:
    """The refit of one site."""

    def __init__(self, student: Student, site: Site, layer: nn.Module, hidden: Tensor, call: _Call) -> None:
        self.student = student
        self.site = site
        self.layer = layer
        self.hidden = hidden
        self.call = call
        # Collecting it may run the whole model, in the middle of the teacher's run, which must not follow itself.
        student.away = True
        try:
            self.known = student.statistics.sites[site.path]
        finally:
            student.away = False
        self.name = site.path.rpartition(".")[2]
        self.attention = layer.get_submodule(self.name)

    def solve(self, teacher: Tensor, wanted: Tensor) -> Result:
        """New weights from the teacher's inputs ``[n, C]`` and the output that the block should have ``[n, C]``."""
        projections = self.student.read(self.attention)
        fisher = self.known.mean_fisher()
        count = self.student.num_kv_heads
        groups = merge_heads.choose_groups(projections, self.known.loss_moment(), fisher, count)
        weights = merge_heads.HeadWeights.of(projections)
        plain, moment, cross = self._moments(teacher, constant=weights.constant)
        corrected = weights.corrected(factor.correction(plain, cross, INPUT_RIDGE))
        merged, kept = merge_heads.merge_site(projections, corrected, moment, fisher, groups)
        refitted, error = self._refit_output(merged, wanted)
        return refitted, kept, error

    def layer_with(self, projections: Projections) -> nn.Module:
        """The decoder layer with another attention block; a shallow copy, so that the model keeps its own."""
        layer = copy.copy(self.layer)
        layer._modules = {**self.layer._modules, self.name: self.student.build(self.site, projections)}
        layer._forward_hooks = OrderedDict()
        return layer

    def _moments(self, teacher: Tensor, *, constant: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Means of ``S^T S``, of the same as the loss weighs it, and of ``S^T (T - S)``."""
        with _watch(block_of(self.attention).projections["k_proj"], stop=True) as x:
            _run(self.layer, self.hidden, self.call)
        student = with_constant(in_full(x[0][self.student.real]), constant)
        gap = with_constant(in_full(teacher), constant) - student
        tokens = student.shape[0]
        plain = (student.T @ student).double().cpu() / tokens
        cross = (student.T @ gap).double().cpu() / tokens
        weight = self.student.weights.get(self.site.path)
        if weight is None or not bool(weight.any()):
            # Without gradients the sink is given its weight by hand.
            return plain, plain + self.known.sink_moment() - self.known.mean_moment(), cross
        by_token = weight[self.student.real.cpu()].to(student).unsqueeze(1)
        weighted = ((student * by_token).T @ student).double().cpu()
        return plain, (weighted * (plain.trace() / weighted.trace()) + plain) / 2, cross

    def _refit_output(self, projections: Projections, wanted: Tensor) -> tuple[Projections, float]:
        """The output projection that comes closest to the wanted outputs, and the error that is left."""
        layer = self.layer_with(projections)
        o_proj = block_of(layer.get_submodule(self.name)).projections["o_proj"]
        with _watch(o_proj, stop=True) as a:
            _run(layer, self.hidden, self.call)
        heads = in_full(a[0][self.student.real])
        goal = in_full(wanted) if projections.o_bias is None else in_full(wanted) - in_full(projections.o_bias)
        gram, cross = ((heads.T @ y).double().cpu() for y in (heads, goal))
        energy = float(goal.double().square().sum())
        fitted = factor.refit(gram, cross, projections.o.double().cpu().T, OUTPUT_RIDGE)
        lost = energy - 2 * float((fitted * cross).sum()) + float((fitted * (gram @ fitted)).sum())
        error = (max(lost, 0.0) / max(energy, 1e-300)) ** 0.5
        return replace(projections, o=fitted.T.contiguous().to(projections.o)), error
