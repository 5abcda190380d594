"""Converting a checkpoint from folder to folder, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.reporting.versions import check_transformers
from attnzoo.surgery import files, stored
from attnzoo.surgery.convert import choose_sites
from attnzoo.surgery.hosts import checkpoint, folders
from attnzoo.surgery.hosts.families.known import block_of, weights_of, with_weights
from attnzoo.surgery.hosts.site import Site
from attnzoo.surgery.kinds import kind_for
from attnzoo.surgery.kinds.kind import Kind, Order
from attnzoo.surgery.kinds.weights import Weights
from attnzoo.surgery.lowrank.calibration import Progress, SiteStatistics, Statistics, as_batches
from attnzoo.surgery.lowrank.factor import Request, Solution, solve_site
from attnzoo.surgery.lowrank.refit import student_of
from attnzoo.surgery.recipes import beside_of, recipe_of
from attnzoo.surgery.report import ConversionReport
from attnzoo.surgery.streaming.estimate import Needs, needs_of, timed
from attnzoo.surgery.streaming.skeleton import Skeleton
from attnzoo.surgery.streaming.sweeps import KeptStatistics, Text
from attnzoo.surgery.streaming.writer import ShardWriter
from attnzoo.surgery.transaction import Change, make_changes
from attnzoo_kernels.errors import ConfigError, ConversionError, UnsupportedError


@dataclass(frozen=True, kw_only=True)
class Dtypes:
    """In which dtypes a checkpoint is converted.

    Attributes:
        weights: Of those that are written; ``None`` leaves each as it is stored.
        run: Of weights and activations while a calibration text runs and weights are solved; ``None`` is that of the
            weights. On CPUs that have no products in half precision, ``torch.float32`` is several times as quick.
    """

    weights: torch.dtype | None = None
    run: torch.dtype | None = None


AS_STORED = Dtypes()


def convert_folder(
    source: str | Path,
    out: str | Path,
    variant: str,
    *,
    where: Callable[[Site], bool] | None = None,
    calibration: Iterable[Any] | None = None,
    dtypes: Dtypes = AS_STORED,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> ConversionReport:
    """Converts a checkpoint into another folder with one layer in memory at a time.

    What is written is what :func:`attnzoo.surgery.convert` and :func:`attnzoo.surgery.save` would have made of the same
    model, but for its files, of which there is one for each layer. A calibration text goes through the layers one
    after the other; what goes into each is kept beside ``out`` meanwhile, and so are statistics where ``refit`` asks
    for them.

    Args:
        source: A folder with a plain checkpoint in safetensors.
        out: Where to; it appears whole or not at all.
        variant: "lowrank_gqa", or a variant that changes what is read or remembered.
        where: Which sites; all by default.
        calibration: Token ids int64 ``[B, T]`` or mappings for ``model(**batch)``.
        dtypes: Of the weights that are written, and of the run of the text.
        overwrite: Whether to replace a folder that is not empty.
        progress: Told how far it is.
        **options: Of the variant, as :func:`attnzoo.surgery.convert` takes them.

    Returns:
        What was done; there is nothing to undo, the source is as it was.

    Raises:
        ConfigError: If no site matches, or an option is unknown or does not fit.
        UnsupportedError: If the model or the variant cannot be converted so.
        ConversionError: If the source is missing, damaged or not to be trusted, or ``out`` must not be replaced.
        OSError: If the disk refuses. Nothing is left then, as after any other error.
    """
    out = Path(out)
    files.check_target(out, overwrite=overwrite)
    # Weights made in inference mode could never be trained.
    with torch.inference_mode(False):
        conversion = _prepared(
            Path(source),
            variant,
            options,
            dtypes=dtypes,
            where=where,
            calibration=calibration,
            progress=progress,
        )
        conversion.needs().check(out)
        with folders.writing(out), folders.temporary_folder(out) as scratch, folders.temporary_folder(out) as folder:
            report = conversion.run(ShardWriter(folder), scratch)
            files.swap(folder, out)
    conversion.skeleton.warn_of_values()
    return report


def what_it_takes(
    source: str | Path,
    variant: str,
    *,
    where: Callable[[Site], bool] | None = None,
    calibration: Iterable[Any] | None = None,
    dtypes: Dtypes = AS_STORED,
    **options: Any,
) -> Needs:
    """What :func:`convert_folder` would take with these arguments; nothing is written.

    One layer is read, the first batch runs through it, and one site is solved, for a rough time.

    Raises:
        ConfigError: As the conversion would.
        UnsupportedError: As the conversion would.
        ConversionError: As the conversion would.
    """
    with torch.inference_mode(False):
        conversion = _prepared(
            Path(source), variant, options, dtypes=dtypes, where=where, calibration=calibration, progress=None
        )
        needs = conversion.needs()
        request = conversion.plan.request
        if request is None or not conversion.plan.batches:
            return needs
        return timed(needs, conversion.skeleton, conversion.sites, request, conversion.plan.batches)


def _prepared(
    source: Path,
    variant: str,
    options: dict[str, Any],
    *,
    dtypes: Dtypes,
    where: Callable[[Site], bool] | None,
    calibration: Iterable[Any] | None,
    progress: Progress | None,
) -> _Conversion:
    """A conversion of which it is sure that it can be done."""
    check_transformers()
    if not source.exists():
        raise folders.not_here(source)
    if (source / files.RECIPE).is_file():
        raise ConversionError(f"{source}: expected a plain checkpoint, got a converted one; convert it in memory")
    skeleton = Skeleton(source, dtype=dtypes.weights, run_in=dtypes.run)
    sites = choose_sites(skeleton.model, where)
    kind = kind_for(variant, options, {site.host for site in sites})
    order = Order(
        model=skeleton.model,
        sites=sites,
        variant=variant,
        options=kind.completed(variant, options),
        calibration=calibration,
        progress=progress,
    )
    return _Conversion(skeleton, kind, order, _plan(kind, order))


@dataclass(frozen=True, eq=False)
class _Plan:
    """What is going to be done, once it is sure that it can be.

    Attributes:
        changes: Of sites whose weights stay, or
        request: what is asked of weights.
        batches: The calibration text, where one is read.
    """

    changes: list[Change]
    request: Request | None
    batches: list[dict[str, Tensor]]


def _plan(kind: Kind, order: Order) -> _Plan:
    if not kind.changes_weights:
        return _Plan(kind.prepare(order), None, [])
    if not isinstance(kind, Weights):
        reason = f"{order.variant!r} puts layers in the blocks' places, which are built from a model in memory"
        raise UnsupportedError(f"variant: cannot be converted layer by layer: {reason}", (reason,))
    request = kind.request(order, weights_come=True)
    if not request.needs_calibration:
        return _Plan([], request, [])
    ahead = [site.path for site in order.sites if not block_of(order.module(site)).causal]
    if ahead:
        reason = f"{ahead[0]} is not causal, and a text runs layer by layer towards its next tokens"
        raise UnsupportedError(f"model: cannot be converted layer by layer: {reason}", (reason,))
    if order.calibration is None or isinstance(order.calibration, Statistics):
        raise ConfigError(
            f"calibration: expected token ids, which method {request.method!r} needs, got "
            f"{'None' if order.calibration is None else 'statistics'}"
        )
    return _Plan([], request, as_batches(order.calibration))


class _Conversion:
    """A conversion on its way through the layers."""

    writer: ShardWriter

    def __init__(self, skeleton: Skeleton, kind: Kind, order: Order, plan: _Plan) -> None:
        self.skeleton = skeleton
        self.kind = kind
        self.order = order
        self.plan = plan
        self.changes: dict[str, Change] = {change.report.site.path: change for change in plan.changes}
        self.sites = {self._layer_of(site): site for site in order.sites}

    def _layer_of(self, site: Site) -> str:
        return next(path for path in self.skeleton.layers if site.path.startswith(f"{path}."))

    def _tell(self, what: str, done: int, total: int) -> None:
        if self.order.progress is not None:
            self.order.progress(what, done, total)

    def needs(self) -> Needs:
        """What it takes, from sizes alone."""
        return needs_of(self.skeleton, self.order.sites, self.plan.request, self.plan.batches)

    def run(self, writer: ShardWriter, scratch: Path) -> ConversionReport:
        """Converts and writes all layers; the writer's folder is complete then."""
        self.writer = writer
        if self.plan.batches:
            self._calibrate(scratch)
        # Layers that no text has gone through for, straight from shard to shard.
        missing = [path for path in self.skeleton.layers if self._number(path) not in self.writer.parts]
        for done, path in enumerate(missing):
            self._write_plain(path)
            self._tell("writing", done + 1, len(missing))
        return self._finish()

    def _calibrate(self, scratch: Path) -> None:
        request = self.plan.request
        if request is None:
            return
        text = Text(
            skeleton=self.skeleton, batches=self.plan.batches, sites=self.sites, scratch=scratch, progress=self._tell
        )
        if not request.refits or request.num_kv_heads is None:
            text.collect(gradients=request.gradients, take=self._solve)
            return
        kept = KeptStatistics(scratch)
        text.collect(gradients=request.gradients, take=kept.keep)
        student, batch = student_of(
            self.order.sites,
            request.num_kv_heads,
            kept.statistics(self.order.sites, self.plan.batches, gradients=request.gradients),
            read=weights_of,
            build=lambda site, projections: with_weights(self.order.module(site), projections),
            progress=self.order.progress,
        )
        text.refit(student, batch, self._change)

    def _solve(self, site: Site, layer: nn.Module, found: SiteStatistics) -> None:
        request = self.plan.request
        if request is not None:
            self._change(site, layer, solve_site(weights_of(self.order.module(site)), request, found))

    def _change(self, site: Site, layer: nn.Module, solution: Solution) -> None:
        """Writes a layer whose block gets solved weights."""
        if not isinstance(self.kind, Weights):
            return
        path = self._layer_of(site)
        change = self.kind.change(site, self.order.module(site), solution)
        new = change.module
        inside = f"{site.path}."
        tensors = {name: x for name, x in layer.state_dict(prefix=f"{path}.").items() if not name.startswith(inside)}
        if new is not None:
            tensors |= new.state_dict(prefix=inside)
            # What stands in the model from now on says sizes, and holds no values.
            change = replace(change, module=new.to("meta"))
        self.writer.write(self._number(path), self.skeleton.as_written(tensors))
        self.changes[site.path] = change

    def _write_plain(self, path: str) -> None:
        site = self.sites.get(path)
        request = self.plan.request
        if site is None or request is None:
            tensors = self.skeleton.read(self.skeleton.names_of(path))
            self.writer.write(self._number(path), self.skeleton.as_written(tensors))
            return
        with self.skeleton.loaded(path) as layer:
            self._change(site, layer, solve_site(weights_of(self.order.module(site)), request))

    def _number(self, path: str) -> int:
        """The number of a layer's part; what belongs to no layer comes first."""
        return self.skeleton.layers.index(path) + 1

    def _finish(self) -> ConversionReport:
        """Makes the changes on what is left of the model, which then says what its folder must."""
        model = self.skeleton.model
        changes = [self.changes[site.path] for site in self.order.sites]
        report = make_changes(model, changes, self.order.variant, self.kind.told(self.order.options))
        self.skeleton.forget_run()
        recipe = recipe_of(model)
        settings = stored.settings_of(model)
        expected = stored.model_to_load(model, recipe, settings)
        twice = {name for names in checkpoint.shared_names(expected) for name in names[1:]}
        own = model.state_dict(keep_vars=True)
        self.writer.write(0, {name: own[name].detach() for name in self.skeleton.outer if name not in twice})
        stored.check_shapes(self.writer.shapes, expected, but=twice)
        folder = self.writer.folder
        self.writer.finish(ordinary=stored.is_ordinary(model, recipe))
        files.write_around(model, recipe, settings, folder)
        files.write_beside(stored.apart(beside_of(model, recipe)), folder)
        report._undo = _nothing_to_undo
        return report


def _nothing_to_undo() -> None:
    raise ConversionError("undo: a folder was converted into another one; the source is as it was")
