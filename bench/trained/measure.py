"""One trained model, converted in every way: certificates first, then perplexities and their controls.

Letters: B batch, L tokens in a window, n windows, T tokens, H query heads.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from attnzoo import surgery
from attnzoo.base.recording import has_layers, record
from attnzoo.evaluation.decoding import mean_of_plans
from attnzoo.surgery import ConversionReport
from attnzoo.variants.moh.layer import MoHAttention
from attnzoo_kernels.errors import ConfigError, UnsupportedError
from bench.trained.conversions import Conversion, at_random, conversions
from bench.trained.results import CERTIFICATE, CONTROL, CONVERSION, ORIGINAL, TrainedRow
from bench.trained.texts import Texts
from bench.trained.training import next_token_nll

LONGER = 4
"""Times the length of a training window that the longer windows have."""

CALIBRATION = 24
"""Windows of the training text that a conversion sees, a second pass of the model over it at most."""

BOUND = 1e-5
"""The largest difference of logits over the largest logit that is rounding, in fp32."""

BATCH = 8

Progress = Callable[[str, int, int], None]


def scores(model: Any, windows: Tensor, **more: Any) -> float:
    """Mean NLL of windows ``[n, L]``, all but their first tokens, nats per token."""
    with torch.no_grad():
        parts = [(float(next_token_nll(model, part, **more)), len(part)) for part in windows.split(BATCH)]
    return sum(nll * count for nll, count in parts) / sum(count for _, count in parts)


class HostTable:
    """The rows of one model, which is left as it was.

    Args:
        host: What it is called.
        model: A causal language model.
        texts: What it was trained on, and what is held out.
        context: Tokens of a window in training.
        any_length: Whether it takes longer windows.
        most: Windows that are scored, at most; all by default.
    """

    def __init__(
        self, host: str, model: Any, texts: Texts, *, context: int, any_length: bool, most: int | None = None
    ) -> None:
        self.host = host
        self.model = model
        self.context = context
        self.windows = texts.windows(context, most)
        self.longer = texts.windows(LONGER * context, most) if any_length else None
        self.calibration = texts.calibration(context, min(CALIBRATION, most or CALIBRATION))
        self.sites = surgery.find(model)
        self.original = self._logits()
        self._statistics: surgery.Statistics | None = None

    def rows(self, progress: Progress) -> Iterator[TrainedRow]:
        """The original, and each conversion with its control; none of a kind whose certificate fails."""
        yield self._original()
        asked = conversions(self.sites[0], self.context)
        failed: dict[str, str] = {}
        for done, conversion in enumerate(asked):
            progress(f"{self.host}: {conversion.name}", done, len(asked))
            if conversion.kind in failed and not conversion.guarantees:
                yield self._row(conversion, CONVERSION, problem=failed[conversion.kind])
                continue
            for row in self._converted(conversion):
                if row.role == CERTIFICATE and row.problem is None and not row.holds:
                    failed[conversion.kind] = f"not measured: {conversion.name} is not the model itself"
                yield row

    def _original(self) -> TrainedRow:
        return TrainedRow(
            host=self.host,
            kind=ORIGINAL,
            name=ORIGINAL,
            role=ORIGINAL,
            nll=scores(self.model, self.windows),
            long_nll=None if self.longer is None else scores(self.model, self.longer),
            values=self._values(),
        )

    def _converted(self, conversion: Conversion) -> Iterator[TrainedRow]:
        """All layers where they can be, else those without windows of their own; then the control."""
        role = CERTIFICATE if conversion.guarantees else CONVERSION
        for layers in self._layers(conversion):
            try:
                report = self._convert(conversion, layers)
            except (ConfigError, UnsupportedError) as error:
                yield self._row(conversion, role, layers=layers, problem=str(error))
                continue
            yield self._measured(conversion, role, layers, report)
            if role == CONVERSION:
                yield from self._controls(conversion, layers)
            return

    def _layers(self, conversion: Conversion) -> tuple[str, ...]:
        """Which layers are tried, one after the other; a control at random is fair without further windows alone."""
        if all(site.window is None for site in self.sites):
            return ("all",)
        return ("all", "global") if conversion.reads is None else ("global",)

    def _convert(self, conversion: Conversion, layers: str) -> ConversionReport:
        calibration = self._collected() if conversion.calibrated and self._takes(conversion, layers) else None
        with warnings.catch_warnings():
            # What is lost is what the table says.
            warnings.simplefilter("ignore")
            return surgery.convert(
                self.model,
                conversion.variant,
                where=lambda site: layers == "all" or site.window is None,
                calibration=calibration,
                **conversion.options,
            )

    def _takes(self, conversion: Conversion, layers: str) -> bool:
        """Whether no site refuses: then it is worth collecting statistics."""
        reasons = surgery.inspect(self.model).reasons
        asked = [why for site, why in zip(self.sites, reasons, strict=True) if layers == "all" or site.window is None]
        return not any(why[conversion.variant] for why in asked)

    def _collected(self) -> surgery.Statistics:
        if self._statistics is None:
            self._statistics = surgery.collect(self.model, self.sites, self.calibration)
        return self._statistics

    def _measured(self, conversion: Conversion, role: str, layers: str, report: ConversionReport) -> TrainedRow:
        """The row of a converted model, which is put back."""
        try:
            found = self._figures(certificate=role == CERTIFICATE)
        finally:
            report.undo()
        undone = torch.equal(self._logits(), self.original)
        bound = BOUND if role == CERTIFICATE else None
        return self._row(conversion, role, layers=layers, undone=undone, bound=bound, **found)

    def _figures(self, *, certificate: bool) -> dict[str, Any]:
        """What is measured of the model as it stands."""
        density = None
        if has_layers(self.model):
            with record(self.model) as seen:
                logits = self._logits()
            density = mean_of_plans(seen, lambda plan: plan.density)
        else:
            logits = self._logits()
        found: dict[str, Any] = {
            "off": float((logits - self.original).abs().max() / self.original.abs().max()),
            "nll": scores(self.model, self.windows),
            "values": self._values(),
            "density": density,
        }
        if self.longer is not None and not certificate:
            found["long_nll"] = scores(self.model, self.longer)
        return found

    def _controls(self, conversion: Conversion, layers: str) -> Iterator[TrainedRow]:
        """What stands beside a conversion."""
        if conversion.reads is not None:
            yield self._at_random(conversion, layers)
        if conversion.averaged is not None:
            options = {"method": "mean", "num_kv_heads": conversion.averaged}
            name = f"{conversion.averaged} averaged KV heads"
            averaged = Conversion(kind=conversion.kind, name=name, variant=conversion.variant, options=options)
            yield self._measured(averaged, CONTROL, layers, self._convert(averaged, layers))
        if conversion.random_heads:
            options = {**conversion.options, "router": "learned"}
            name = f"{conversion.name}: at random"
            random = Conversion(kind=conversion.kind, name=name, variant=conversion.variant, options=options)
            report = self._convert(random, layers)
            self._randomise_routers()
            yield self._measured(random, CONTROL, layers, report)

    def _randomise_routers(self) -> None:
        """Heads for no reason: routers with next to no weights, whose gates are next to 1."""
        generator = torch.Generator("cpu").manual_seed(0)
        with torch.no_grad():
            for module in self.model.modules():
                if isinstance(module, MoHAttention) and module.router is not None:
                    weight = module.router.weight
                    weight.copy_(1e-4 * torch.randn(weight.shape, generator=generator, device="cpu"))

    def _at_random(self, conversion: Conversion, layers: str) -> TrainedRow:
        """The model as it was, under a mask."""
        if conversion.reads is None:
            raise ConfigError("reads: expected how many tokens each row reads, got None")
        mask = at_random(conversion.reads, self.sites[0].heads, self.context, seed=0)
        found = {
            "nll": scores(self.model, self.windows, **self._masked(mask)),
            "density": float(mask.sum() / (mask.shape[1] * self.context * (self.context + 1) / 2)),
        }
        return self._row(conversion, CONTROL, name=f"{conversion.name}: at random", layers=layers, **found)

    def _masked(self, mask: Tensor) -> dict[str, Any]:
        """A mask bool ``[1, H, T, T]`` as the model takes it, for layers without windows of their own."""
        tokens = mask.shape[-1]
        place = torch.arange(tokens, device="cpu")
        more = {"position_ids": place.unsqueeze(0)}
        windows = {site.window for site in self.sites} - {None}
        if not windows:
            return {"attention_mask": mask, **more}
        (width,) = windows
        distance = place[:, None] - place
        near = ((distance >= 0) & (distance < width)).expand_as(mask)
        return {"attention_mask": {"full_attention": mask, "sliding_attention": near}, **more}

    def _logits(self) -> Tensor:
        """Logits of the first windows."""
        with torch.no_grad():
            logits: Tensor = self.model(input_ids=self.windows[:2], use_cache=False).logits.float()
        return logits

    def _values(self) -> int:
        return surgery.cache_bytes(self.model) // next(self.model.parameters()).element_size()

    def _row(self, conversion: Conversion, role: str, **found: Any) -> TrainedRow:
        named = {"name": conversion.name, "says": conversion.guarantees, **found}
        return TrainedRow(host=self.host, kind=conversion.kind, role=role, **named)
