"""A layer's time over that of ten lines of torch, length by length, and where it falls below 1.

Letters: T tokens.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from attnzoo.base.layer import AttentionLayer
from attnzoo.evaluation import timing
from attnzoo.evaluation.cost_setting import KINDS, CostSetting
from attnzoo.evaluation.layer_checks import check, check_baseline
from attnzoo.evaluation.layer_costs import BASELINE, Progress, build, build_baseline, compete
from attnzoo.evaluation.ten_lines import TenLines
from attnzoo.reporting.warn import silent

LENGTHS = tuple(512 << n for n in range(8))
CHECKED = 1024
"""Tokens on which layers are checked, before anything is timed."""

ROUNDS = 3
"""Fewest rounds of a length."""

GROWTH = {"forward": 4, "step": 4, "decode": 2}
"""How many times as long the double length takes, at most."""

QUICKER = 0.97
"""From this ratio on a layer counts as quicker: what is nearer to 1 changes sides from run to run."""


@dataclass
class Curve:
    """One kind of call of one layer.

    Attributes:
        layer: ``variant:option=value,...``.
        kind: One of ``KINDS``.
        problem: Why nothing was measured; no time is given of a layer that is wrong.
        tokens: The lengths that were measured, ascending.
        times_baseline: The layer's time over that of ten lines of torch in the same rounds, median, for each length.
        milliseconds: The layer's own, for each length; they differ from machine to machine.
    """

    layer: str
    kind: str
    problem: str | None = None
    tokens: list[int] = field(default_factory=list)
    times_baseline: list[float] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)

    @property
    def quicker_from(self) -> str:
        """From which length on the layer is quicker, in words."""
        if not self.tokens:
            return "not measured"
        return crossing(self.tokens, self.times_baseline)


def crossing(tokens: Sequence[int], ratios: Sequence[float]) -> str:
    """From which length on a ratio stays below ``QUICKER``, in words; between two lengths by a line on logarithms."""
    slower = [i for i, ratio in enumerate(ratios) if ratio >= QUICKER]
    if not slower:
        return f"{tokens[0]:,} or less"
    last = slower[-1]
    if last == len(tokens) - 1:
        return f"never up to {tokens[-1]:,}"
    fall = math.log(ratios[last] / QUICKER) / math.log(ratios[last] / ratios[last + 1])
    exact = tokens[last] * (tokens[last + 1] / tokens[last]) ** fall
    digits = 10 ** (int(math.log10(exact)) - 1)
    return f"about {round(exact / digits) * digits:,}"


def longer_than(limit: float, pair: float, kind: str) -> bool:
    """Whether the next length would take more seconds than that, judged by the last one's pair of runs."""
    return pair * GROWTH[kind] * (ROUNDS + 1) > limit


def measure(
    setting: CostSetting, specs: Sequence[str], lengths: Sequence[int], limit: float, progress: Progress
) -> Iterator[list[Curve]]:
    """The curves of each layer, one for each of ``KINDS``, as they are ready.

    Args:
        setting: Sizes; how many seconds a length is measured.
        specs: The layers.
        lengths: T, ascending. A curve ends before one that would take too long.
        limit: Seconds that a length may take, warming up included.
        progress: Told of each length.

    Raises:
        ConfigError: Before anything is measured, if a spec is wrong.
    """
    small = replace(setting, tokens=min(CHECKED, max(lengths)))
    baseline = build_baseline(replace(setting, tokens=max(lengths)))
    with silent():
        layers = build(setting, specs)
        wrong = check_baseline(BASELINE, baseline, build(setting, ["mha"])["mha"], small).problem
    for done, (name, layer) in enumerate(layers.items()):
        progress(f"{name}: check", done, len(layers))
        with silent():
            problem = wrong or check(name, layer, small).problem
        curves = [Curve(name, kind, problem) for kind in KINDS]
        for curve in curves if problem is None else ():
            for tokens in _lengths_of(curve, layer, baseline, replace(setting, tokens=1), (lengths, limit)):
                progress(f"{name}: {curve.kind}, {tokens:,} tokens", done, len(layers))
        yield curves


def _lengths_of(
    curve: Curve, layer: AttentionLayer, baseline: TenLines, setting: CostSetting, bounds: tuple[Sequence[int], float]
) -> Iterator[int]:
    """Measures length after length, each told before it is measured, until one would take too long."""
    lengths, limit = bounds
    pair = 0.0
    for tokens in lengths:
        if longer_than(limit, pair, curve.kind):
            return
        yield tokens
        with silent():
            found = compete(curve.kind, layer, baseline, replace(setting, tokens=tokens), least=ROUNDS)
        middle = timing.middle(found)
        pair = sum(middle.values()) / 1e3
        curve.tokens.append(tokens)
        curve.times_baseline.append(round(timing.paired(found, "this", "baseline"), 3))
        curve.milliseconds.append(round(statistics.median(found["this"]), 4))
