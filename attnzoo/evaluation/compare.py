"""Comparing conversions of one model side by side: quality, what is read, what is remembered, and speed."""

from __future__ import annotations

import hashlib
import math
import platform
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnzoo import surgery
from attnzoo.base.registry import variants
from attnzoo.cache.policies.protocol import policies
from attnzoo.evaluation.decoding import Continuation, Decoding, race, twin_of
from attnzoo.evaluation.model_scores import Progress, Score, score
from attnzoo.factory import class_names, read_spec, spec_name
from attnzoo.policies.one_forward import UNSEEN, policy_on, why_one_forward_says_nothing
from attnzoo.reporting.choices import check_known
from attnzoo.surgery.lowrank.factor import CALIBRATED
from attnzoo_kernels.errors import ConfigError

ELSEWHERE = {
    "policy": "--policy of attnzoo compare takes the name of one, such as duo; attnzoo list --policies has them all",
    "heads": "attnzoo heads scores them, attnzoo.heads edits them",
}
"""What an inspection of a model names beside variants, and where it is done."""

SAME_LOGITS = 1e-5
"""Largest difference of logits, over the largest logit, at which two outputs count as equal but for rounding."""


@dataclass(frozen=True)
class ConversionSpec:
    """One call of ``surgery.convert``."""

    variant: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def needs_calibration(self) -> bool:
        """Whether it reads the calibration text."""
        return self.options.get("method") in CALIBRATED

    def __str__(self) -> str:
        options = ",".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.variant}:{options}" if options else self.variant


@dataclass(frozen=True)
class VariantSpec:
    """A row of a comparison: conversions applied one after the other; none is the model as it is.

    Attributes:
        name: What the row is called.
        conversions: What is done.
        exact: Whether the output must stay equal: a certificate.
        control: Whether the row is there to fail: a negative control.
        long: Whether decoding is timed behind longer prompts too, where some are asked for.
        own_cache: Whether the model decodes with a cache of ``surgery.new_cache``.
    """

    name: str
    conversions: tuple[ConversionSpec, ...] = ()
    exact: bool = False
    control: bool = False
    long: bool = True
    own_cache: bool = False

    @property
    def needs_calibration(self) -> bool:
        """Whether a conversion reads the calibration text."""
        return any(conversion.needs_calibration for conversion in self.conversions)

    @classmethod
    def parse(cls, text: str, argument: str = "variants") -> VariantSpec:
        """Reads ``variant:option=value,option=value``; "dense" is the model as it is.

        Args:
            text: Of the row.
            argument: What errors name; "to" is the variant that a model is converted to, which "dense" is none of.

        Raises:
            ConfigError: If the variant is unknown or an option is no ``name=value``.

        Example:
            >>> VariantSpec.parse("s2:block_size=32,sink_blocks=0").conversions[0].options
            {'block_size': 32, 'sink_blocks': 0}
        """
        if text == "dense" and argument != "to":
            return cls("dense")
        if text == "dense":
            raise ConfigError("to: expected a variant, got 'dense', which changes nothing")
        name = spec_name(text, argument)
        if name in policies:
            raise ConfigError(
                f"{argument}: {name!r} is a KV-cache policy, and lets go of something behind a prompt; one forward over"
                f" a text says nothing about it: use --policy {text} of attnzoo compare"
            )
        if name in ELSEWHERE:
            raise ConfigError(f"{argument}: {name!r} is no variant: {ELSEWHERE[name]}")
        known = sorted(variants) if argument == "to" else ["dense", *sorted(variants)]
        check_known(name, known, "variants", class_names())
        return cls(text, (ConversionSpec(*read_spec(text, argument)),))


def _lowrank(name: str, *, long: bool = False, **options: Any) -> VariantSpec:
    return VariantSpec(name, (ConversionSpec("lowrank_gqa", options),), long=long)


_S2 = {"block_size": 32, "local_blocks": 4, "vert_stride": 3}
_RETURN = (
    ConversionSpec("lowrank_gqa", {"method": "expand", "num_kv_heads": 9}),
    ConversionSpec("lowrank_gqa", {"method": "commuting", "num_kv_heads": 3, "refit": False, "gradients": False}),
)
_MOH = {"router": "norm", "shared_heads": 5, "active_heads": 2}
_LONGHEADS = {"chunk_size": 64, "attention_length": 512, "select": "block"}
PRESETS: dict[str, tuple[VariantSpec, ...]] = {
    "demo": (
        VariantSpec("dense"),
        VariantSpec("dense, cache in place", own_cache=True),
        VariantSpec("expand and return", _RETURN, exact=True, long=False),
        VariantSpec("sink 4 + window 256", (ConversionSpec("mha", {"window": 256, "sink": 4}),)),
        VariantSpec("window 256 without sink", (ConversionSpec("mha", {"window": 256}),), control=True, long=False),
        VariantSpec("s2 with sink", (ConversionSpec("s2", {**_S2, "sink_blocks": 1}),)),
        VariantSpec("s2 without sink", (ConversionSpec("s2", {**_S2, "sink_blocks": 0}),), control=True, long=False),
        _lowrank("mean_pool 3->1", method="mean", num_kv_heads=1),
        _lowrank("commuting 3->1", method="commuting", num_kv_heads=1),
        _lowrank("latent 192", method="latent", latent_dim=192),
        _lowrank("latent 128", long=True, method="latent", latent_dim=128),
        VariantSpec("moh, all heads", (ConversionSpec("moh", {}),), exact=True, long=False),
        VariantSpec("moh, 7 of 9 heads", (ConversionSpec("moh", _MOH),)),
        VariantSpec("landmarks without gates", (ConversionSpec("landmark", {"block_size": 64}),), exact=True),
        VariantSpec("longheads 512", (ConversionSpec("longheads", _LONGHEADS),)),
        VariantSpec("rcmha, untrained", (ConversionSpec("rcmha", {}),), exact=True, long=False),
    )
}
"""Named sets of rows. "demo" is for a model of 9 query and 3 KV heads."""


@dataclass(frozen=True)
class LongDecoding:
    """What decoding costs behind a prompt that is longer than the windows.

    Attributes:
        tokens: Of the prompt.
        tokens_per_s: Measured; differs from run to run.
        times_dense: A step's time over the dense model's, median of rounds; differs from run to run.
        kv_bytes_read: Cached bytes for each token that a step gathers.
    """

    tokens: int
    tokens_per_s: float
    times_dense: float
    kv_bytes_read: int


@dataclass(frozen=True)
class Row:
    """One row's figures.

    Attributes:
        name: What the row is called.
        conversions: What was done, as text.
        nll: Of each window, nats per token.
        perplexity: Over all windows.
        ratio: Perplexity over the dense model's.
        delta_nll: Mean NLL less the dense model's.
        density: Measured, see :class:`attnzoo.evaluation.model_scores.Score`.
        kv_bytes_held: Cached bytes for each token, all layers.
        kv_bytes_read: Of these, what a decode step behind a window gathers.
        max_logit_diff: Largest difference to the dense model's logits where they were kept.
        flags: NO-OP, certificate, negative control; that one forward says nothing about a KV-cache policy.
        decode_tokens_per_s: Behind a window; measured, differs from run to run.
        decode_times_dense: A step's time over the dense model's in the same rounds, the median; likewise. ``None`` in
            results of before it was measured.
        convert_seconds: Measured; differs from run to run.
        longer: What decoding costs behind longer prompts.
    """

    name: str
    conversions: list[str]
    nll: list[float]
    perplexity: float
    ratio: float
    delta_nll: float
    density: float
    kv_bytes_held: int
    kv_bytes_read: int
    max_logit_diff: float
    flags: list[str]
    decode_tokens_per_s: float
    convert_seconds: float
    decode_times_dense: float | None = None
    longer: list[LongDecoding] = field(default_factory=list)


@dataclass(frozen=True)
class Comparison:
    """Rows and where they come from."""

    about: dict[str, Any]
    rows: list[Row]


class Comparer:
    """Runs rows on one model, which is left as it was.

    Args:
        model: A causal language model.
        windows: int64 ``[n, L]``, to score.
        calibration: int64 ``[n, L]``, another text.
        progress: Told how far it is.
        longer: Prompts that go on behind the first window, int64 ``[any]``, in the order of their lengths; decoding is
            timed behind each of them, as it is behind the first window.
    """

    def __init__(
        self,
        model: Any,
        windows: Tensor,
        calibration: Tensor | None,
        *,
        progress: Progress | None = None,
        longer: Sequence[Tensor] = (),
    ) -> None:
        self.model = model
        self.windows = windows
        self.progress = progress
        self.batches = [] if calibration is None else [row.unsqueeze(0) for row in calibration]
        self.longer = longer
        self._statistics: surgery.Statistics | None = None
        self._dense: Score | None = None
        self._starts: list[Continuation] = []

    def run(self, specs: Sequence[VariantSpec], about: dict[str, Any]) -> Comparison:
        """All rows; the dense model is measured first, whether it has a row or not.

        Raises:
            ConfigError: Before anything is measured, if the model has no attention blocks that are known.
        """
        surgery.cache_bytes(self.model)
        # Conversions of the model leave a twin of the same weights as it is: the dense model of every round.
        self._dense = score(twin_of(self.model), self.windows, progress=self.progress)
        self._starts = [start.copy() for start in self._prompts(self._dense.sequence, long=True)]
        sha = hashlib.sha256(self.windows.cpu().numpy().tobytes()).hexdigest()
        about = {**about, "windows": list(self.windows.shape), "tokens_sha256": sha, "torch": torch.__version__}
        about["machine"] = f"{platform.machine()}, {torch.get_num_threads()} threads"
        return Comparison(about, [self._row(spec) for spec in specs])

    def _prompts(self, sequence: Continuation, *, long: bool) -> Iterator[Continuation]:
        """A sequence behind the first window, then behind each longer prompt; who takes it may go on in between."""
        yield sequence
        for prompt in self.longer if long else ():
            self._tell(f"reading {len(prompt):,} tokens")
            sequence.read(prompt[sequence.tokens :])
            yield sequence

    def _races(self, sequence: Continuation, *, long: bool) -> list[Decoding]:
        """Decoding in turns with the dense model behind each prompt."""
        found = []
        for start, mine in zip(self._starts, self._prompts(sequence, long=long), strict=False):
            self._tell(f"decoding behind {mine.tokens:,} tokens")
            found.append(race(mine, start.copy()))
        return found

    def _tell(self, what: str) -> None:
        if self.progress is not None:
            self.progress(what, 0, 1)

    def _row(self, spec: VariantSpec) -> Row:
        if self._dense is None:
            raise ConfigError("run: expected the dense model to be measured first")
        if not spec.conversions:
            # Its own second contestant: what the rounds say of it is how exact they are.
            return self._figures(spec, self._dense, self._races(self._unconverted(spec), long=spec.long), 0.0)
        reports: list[surgery.ConversionReport] = []
        begin = time.perf_counter()
        try:
            for conversion in spec.conversions:
                reports.append(self._convert(conversion, first=not reports))
            seconds = time.perf_counter() - begin
            found = score(self.model, self.windows, progress=self.progress)
            return self._figures(spec, found, self._races(found.sequence, long=spec.long), seconds)
        finally:
            for report in reversed(reports):
                report.undo()

    def _unconverted(self, spec: VariantSpec) -> Continuation:
        """The dense model behind the first window, with its own cache or one that is written in place."""
        if not spec.own_cache:
            return self._starts[0].copy()
        sequence = Continuation(self.model, cache=surgery.new_cache(self.model))
        sequence.read(self.windows[0])
        return sequence

    def _convert(self, conversion: ConversionSpec, *, first: bool) -> surgery.ConversionReport:
        calibration: Any = None
        if conversion.needs_calibration:
            if not self.batches:
                raise ConfigError("calibrate: expected a calibration text, got none")
            # Statistics of the model as it was do not describe one that was converted before.
            calibration = self._collected() if first else self.batches[:1]
        with warnings.catch_warnings():
            # A comparison shows what is lost; warnings about it would only repeat the table.
            warnings.filterwarnings("ignore", message=".*(without a sink|baseline|healing|the same function up to).*")
            return surgery.convert(
                self.model, conversion.variant, calibration=calibration, progress=self.progress, **conversion.options
            )

    def _collected(self) -> surgery.Statistics:
        if self._statistics is None:
            self._statistics = surgery.collect(
                self.model, surgery.find(self.model), self.batches, progress=self.progress
            )
        return self._statistics

    def _figures(self, spec: VariantSpec, found: Score, decoding: list[Decoding], seconds: float) -> Row:
        dense = found if self._dense is None else self._dense
        difference = float((found.probe - dense.probe).abs().max())
        same = difference <= SAME_LOGITS * float(dense.probe.abs().max())
        held = surgery.cache_bytes(self.model)
        flags = ["negative control"] if spec.control else []
        if spec.exact:
            flags.append("certificate holds" if same else "CERTIFICATE FAILS")
        elif why_one_forward_says_nothing(policy_on(self.model)) is not None:
            flags.append(UNSEEN)
        elif spec.conversions and found.density == 1 and same:
            flags.append("NO-OP")
        return Row(
            name=spec.name,
            conversions=[str(conversion) for conversion in spec.conversions],
            nll=list(found.nll),
            perplexity=found.perplexity,
            ratio=math.exp(found.mean_nll - dense.mean_nll),
            delta_nll=found.mean_nll - dense.mean_nll,
            density=found.density,
            kv_bytes_held=held,
            kv_bytes_read=round(held * decoding[0].read_share),
            max_logit_diff=difference,
            flags=flags,
            decode_tokens_per_s=round(decoding[0].tokens_per_s, 2),
            decode_times_dense=round(decoding[0].times_dense, 3),
            convert_seconds=round(seconds, 1),
            longer=[
                LongDecoding(
                    tokens=one.tokens,
                    tokens_per_s=round(one.tokens_per_s, 2),
                    times_dense=round(one.times_dense, 3),
                    kv_bytes_read=round(held * one.read_share),
                )
                for one in decoding[1:]
            ],
        )
