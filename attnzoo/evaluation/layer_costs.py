"""What layers cost on this machine beside ten lines of torch, once it is known that they compute right.

Letters: B batch, T tokens, C model width, G KV heads.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo.base.layer import AttentionLayer
from attnzoo.cache.kv_cache import KVCache, Stream
from attnzoo.evaluation import timing
from attnzoo.evaluation.cost_setting import KINDS, Cost, CostSetting
from attnzoo.evaluation.layer_checks import check, check_baseline, train
from attnzoo.evaluation.ten_lines import TenLines
from attnzoo.factory import create, read_spec
from attnzoo.reporting.warn import silent
from attnzoo_kernels import clear_memory
from attnzoo_kernels.errors import ConfigError

LEAST = 5
MOST = 100
"""Rounds."""

IN_MIDST = 17
"""Slots that stay free behind a decoding step: it lies in the midst of a block, as nearly all steps do."""

BASELINE = "ten lines of torch"
SPECS = (
    "mha",
    "mha:window=512,sink=4",
    "s2:local_blocks=4,vert_stride=4",
    "lowrank_gqa",
    "moh",
    "longheads:attention_length=512,chunk_size=64",
    "landmark",
    "rcmha",
)
"""What is measured if nothing is asked for: every variant, at options where it is sparse at 2,048 tokens."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Contestant:
    """Something to be timed.

    Attributes:
        run: What is timed; it is done when this returns.
        before: What has to be done before each run, not timed; or nothing.
    """

    run: Callable[[], Any]
    before: Callable[[], Any] | None = None


def build(setting: CostSetting, specs: Iterable[str]) -> dict[str, AttentionLayer]:
    """A layer for each ``variant:option=value,...``; all are built before anything is measured.

    Raises:
        ConfigError: If a spec is wrong, or an option does not fit the setting.
    """
    layers = {}
    for spec in specs:
        variant, options = read_spec(spec)
        with _seeded():
            layers[spec] = create(variant, **{**setting.heads(), **options}, device=setting.device, dtype=setting.dtype)
        config = layers[spec].config
        if config.dim != setting.dim or not config.causal:
            raise ConfigError(f"variants: expected causal layers of dim {setting.dim}, got {spec!r}")
        layers[spec].impl = setting.impl
    return layers


def build_baseline(setting: CostSetting) -> TenLines:
    """Ten lines of torch at a setting's sizes."""
    return TenLines(**setting.heads(), most=setting.tokens, device=setting.device, dtype=setting.dtype)


@silent()
def measure(setting: CostSetting, specs: list[str], progress: Progress) -> list[Cost]:
    """What each layer costs; ten lines of torch come first, checked like the others.

    Raises:
        ConfigError: Before anything is measured, if a spec is wrong.
    """
    layers = build(setting, specs)
    anchor = build(setting, ["mha"])["mha"]
    total = 1 + len(layers) * (1 + len(KINDS))
    progress(f"{BASELINE}: check", 0, total)
    baseline = build_baseline(setting)
    first = check_baseline(BASELINE, baseline, anchor, setting)
    costs = [first]
    runs_of_baseline = {kind: list[float]() for kind in KINDS}
    for row, (name, layer) in enumerate(layers.items()):
        done = 1 + row * (1 + len(KINDS))
        progress(f"{name}: check", done, total)
        cost = check(name, layer, setting)
        costs.append(cost)
        comparable = cost.problem is None and first.problem is None
        for step, kind in enumerate(KINDS if comparable else ()):
            progress(f"{name}: {kind}", done + 1 + step, total)
            found = compete(kind, layer, baseline, setting)
            cost.milliseconds[kind] = statistics.median(found["this"])
            cost.times_baseline[kind] = timing.paired(found, "this", "baseline")
            runs_of_baseline[kind] += found["baseline"]
    first.milliseconds = {kind: statistics.median(runs) for kind, runs in runs_of_baseline.items() if runs}
    first.times_baseline = dict.fromkeys(first.milliseconds, 1.0)
    return costs


def compete(
    kind: str, layer: AttentionLayer, baseline: TenLines, setting: CostSetting, *, least: int = LEAST
) -> dict[str, list[float]]:
    """Milliseconds of a layer ("this") and of ten lines of torch ("baseline"), in turns, of one of ``KINDS``.

    Args:
        kind: What is measured.
        layer: Known to be right.
        baseline: Likewise.
        setting: Sizes, and how long to measure.
        least: Fewest rounds.
    """
    entered = {"this": prepare(kind, layer, setting), "baseline": prepare(kind, baseline, setting)}
    return timing.rounds(
        {name: contestant.run for name, contestant in entered.items()},
        wall=timing.by_wall(setting.device),
        seconds=setting.seconds,
        least=least,
        most=MOST,
        before={name: contestant.before for name, contestant in entered.items() if contestant.before is not None},
    )


def prepare(kind: str, layer: AttentionLayer | TenLines, setting: CostSetting) -> Contestant:
    """One of ``KINDS``, to be timed."""
    device = setting.device
    if kind == "step":
        layer.train()
        x = setting.inputs(setting.tokens).requires_grad_()
        return Contestant(_until_done(lambda: train(layer, x), device))
    layer.eval()
    if kind == "forward":
        x = setting.inputs(setting.tokens)
        return Contestant(_until_done(lambda: layer(x), device, grad=False))
    x = setting.inputs(1)
    if isinstance(layer, TenLines):
        return _plain_step(layer, x, setting)
    return _step(layer, x, setting)


def _step(layer: AttentionLayer, x: Tensor, setting: CostSetting) -> Contestant:
    """One more token behind as many as there always are: what a run has appended is taken back before the next.

    The step before it is made anew too, with nothing kept of the runs before. A step then finds what it finds when a
    sequence is decoded: what the last one has left, and nothing made for its own length.
    """
    slots = max(0, setting.tokens - IN_MIDST)
    cache = layer.new_cache(setting.batch, slots + 1, device=setting.device, dtype=setting.dtype)
    fill(cache, layer.streams(), slots, setting)
    run = _until_done(lambda: layer(x, cache=cache), setting.device, grad=False)

    def before() -> None:
        clear_memory()
        cache.crop(max(0, slots - 1))
        if slots > 0:
            run()

    return Contestant(run, before)


def _plain_step(baseline: TenLines, x: Tensor, setting: CostSetting) -> Contestant:
    """The same: each run writes the same slot, and the step before it is made anew too."""
    slots = max(0, setting.tokens - IN_MIDST)
    cache = baseline.new_cache(setting.batch, slots + 1)
    cache[:, :, :, :slots].normal_(generator=_generator(setting))
    run = _until_done(lambda: baseline(x, cache, slots), setting.device, grad=False)
    return Contestant(run, _until_done(lambda: baseline(x, cache, max(0, slots - 1)), setting.device, grad=False))


def fill(cache: KVCache, streams: dict[str, Stream], tokens: int, setting: CostSetting) -> None:
    """Normal values for so many tokens, instead of a prefill: what a step costs does not depend on who made them."""
    if tokens == 0:
        return
    generator = _generator(setting)

    def values(stream: Stream) -> Tensor:
        rows = tokens // (stream.every or 1)
        dtype = stream.dtype or setting.dtype
        shape = (setting.batch, stream.heads, rows, stream.width)
        if not dtype.is_floating_point:
            # Positions.
            return torch.arange(rows, dtype=dtype, device=setting.device).view(1, 1, rows, 1).expand(shape)
        return torch.empty(shape, dtype=dtype, device=setting.device).normal_(generator=generator)

    cache.append({name: values(x) for name, x in streams.items() if x.every is None}, tokens, differentiable=False)
    groups = {name: values(x) for name, x in streams.items() if x.every is not None}
    if groups:
        cache.complete(groups, 0)


def _generator(setting: CostSetting) -> torch.Generator:
    return torch.Generator(setting.device).manual_seed(2)


def _until_done(run: Callable[[], Any], device: torch.device, *, grad: bool = True) -> Callable[[], Any]:
    def finish() -> Any:
        with torch.set_grad_enabled(grad):
            found = run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return found

    return finish


@contextmanager
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
