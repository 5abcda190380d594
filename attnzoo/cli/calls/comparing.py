"""``attnzoo compare --variants``: conversions of one model, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import typer

from attnzoo.cli import screen
from attnzoo.cli.models import load_model, text_tokens
from attnzoo.cli.progress import Bar
from attnzoo.evaluation import compare_report
from attnzoo.evaluation.compare import PRESETS, Comparer, Comparison, VariantSpec
from attnzoo.evaluation.decoding import STEPS
from attnzoo.evaluation.model_scores import cut_windows
from attnzoo.evaluation.two_phase.presets import POLICY_PRESETS
from attnzoo.reporting.choices import check_choice
from attnzoo.reporting.outputs import check_writable
from attnzoo_kernels.errors import ConfigError

CALIBRATION_LENGTH = 512
"""Tokens of a calibration window."""


@dataclass(frozen=True, kw_only=True)
class CompareCall:
    """What a command asks for.

    Attributes:
        model: As the command line names it.
        variants: Rows.
        preset: A named set of rows before them.
        text: What is scored.
        windows: How many, the tokens of each, and the tokens before the first.
        calibration: Another text, and how many windows of it.
        decode_at: Tokens behind which decoding is timed too.
        dtype: Of the weights, by name.
        device: Where the model lies.
    """

    model: str
    variants: Sequence[str]
    preset: str | None
    text: str
    windows: tuple[int, int, int]
    calibration: tuple[str, int]
    decode_at: Sequence[int]
    dtype: str
    device: str

    def specs(self) -> list[VariantSpec]:
        """The rows.

        Raises:
            ConfigError: If one is none, or there are none.
        """
        if self.preset is not None:
            check_choice("preset", self.preset, [*PRESETS, *POLICY_PRESETS])
        chosen = list(PRESETS[self.preset]) if self.preset is not None else []
        chosen += [VariantSpec.parse(text) for text in self.variants]
        if not chosen:
            raise ConfigError(
                "variants: expected --variants, --policy or --preset, got none of them; for instance --variants "
                "mha:window=256,sink=4"
            )
        return chosen

    def longer(self) -> list[int]:
        """The lengths of prompts behind which decoding is timed too, ascending.

        Raises:
            ConfigError: If one leaves no room for the steps behind a window.
        """
        found = sorted(set(self.decode_at))
        for shorter, more in pairwise([self.windows[1], *found]):
            if more < shorter + STEPS:
                raise ConfigError(f"decode_at: expected at least {STEPS} tokens more than {shorter}, got {more}")
        return found


def compare_variants(call: CompareCall, specs: Sequence[VariantSpec], *, out: Path | None, as_json: bool) -> None:
    """Runs a comparison of conversions, and prints or writes it.

    Raises:
        ConfigError: Before anything is read, if something of the call does not fit.
        Exit: With code 1, if a certificate fails.
    """
    if out is not None:
        check_writable(out)
    calibrate, calibration_windows = call.calibration
    needed = any(spec.needs_calibration for spec in specs)
    if needed and call.text == calibrate:
        raise ConfigError(f"calibrate: expected another text than the one scored, got {calibrate!r} for both")
    count, length, offset = call.windows
    lengths = call.longer()
    found, tokenizer = load_model(call.model, dtype=call.dtype, device=call.device)
    tokens = text_tokens(tokenizer, call.text).to(found.device)
    scored = cut_windows(tokens, length=length, offset=offset, count=count)
    longer = [cut_windows(tokens, length=more, offset=offset, count=1)[0] for more in lengths]
    about: dict[str, Any] = {"model": call.model, "text": call.text, "offset": offset}
    about |= {"dtype": str(found.dtype).removeprefix("torch."), "device": str(found.device)}
    calibration = None
    if needed:
        text = text_tokens(tokenizer, calibrate).to(found.device)
        calibration = cut_windows(text, length=CALIBRATION_LENGTH, offset=0, count=calibration_windows)
        about |= {"calibration": calibrate, "calibration_tokens": calibration.numel()}
    with Bar() as progress:
        comparison = Comparer(found, scored, calibration, progress=progress, longer=longer).run(specs, about)
    _tell(comparison, out, as_json=as_json)
    if any("CERTIFICATE FAILS" in row.flags for row in comparison.rows):
        raise typer.Exit(1)


def _tell(comparison: Comparison, out: Path | None, *, as_json: bool) -> None:
    """Writes and prints a comparison."""
    if out is not None:
        compare_report.write(comparison, out)
    if as_json:
        typer.echo(compare_report.to_json(comparison), nl=False)
        return
    screen.table(compare_report.grid(comparison))
    for grid in compare_report.long_grids(comparison):
        screen.text("")
        screen.table(grid)
    screen.written(out)
