"""``attnzoo compare --policy``: KV-cache policies of one model, in two phases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import typer
from torch import Tensor

from attnzoo.cli import screen
from attnzoo.cli.models import load_model, text_tokens
from attnzoo.cli.progress import Bar
from attnzoo.evaluation.two_phase import report
from attnzoo.evaluation.two_phase.presets import POLICY_PRESETS, preset
from attnzoo.evaluation.two_phase.rows import PolicyComparer, PolicyComparison
from attnzoo.evaluation.two_phase.specs import PolicySpec, fit
from attnzoo.evaluation.two_phase.tasks import standard_cases
from attnzoo.reporting.choices import check_choice
from attnzoo.reporting.outputs import check_writable
from attnzoo_kernels.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PolicyCall:
    """What a command asks for.

    Attributes:
        model: As the command line names it.
        policies: Rows.
        preset: A named set of rows before them.
        text: What is read.
        offset: Tokens of it before the first context.
        context: Tokens of a context.
        windows: Contexts of the text.
        passkeys: How many are asked for.
        dtype: Of the weights, by name.
        device: Where the model lies.
    """

    model: str
    policies: Sequence[str]
    preset: str | None
    text: str
    offset: int
    context: int
    windows: int
    passkeys: int
    dtype: str = "float32"
    device: str = "cpu"

    def specs(self) -> list[PolicySpec]:
        """The rows.

        Raises:
            ConfigError: If one is none.
        """
        if self.preset is not None:
            check_choice("preset", self.preset, POLICY_PRESETS)
        rows = list(preset(self.preset)) if self.preset is not None else []
        return rows + [PolicySpec.parse(text) for text in self.policies]


def compare_policies(call: PolicyCall, *, out: Path | None, as_json: bool) -> None:
    """Runs a comparison of policies, and prints or writes it.

    Raises:
        ConfigError: Before anything is read, if something of the call does not fit.
    """
    specs = call.specs()
    for name, value, least in (
        ("windows", call.windows, 1),
        ("offset", call.offset, 0),
        ("passkeys", call.passkeys, 0),
    ):
        if value < least:
            raise ConfigError(f"{name}: expected an int from {least}, got {value}")
    if out is not None:
        check_writable(out)
    model, tokenizer = load_model(call.model, dtype=call.dtype, device=call.device)
    tokens = text_tokens(tokenizer, call.text)[call.offset :]

    def encode(text: str) -> Tensor:
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return torch.tensor(ids, dtype=torch.int64, device="cpu")

    cases = standard_cases(
        call.text, tokens, encode=encode, context=call.context, windows=call.windows, passkeys=call.passkeys
    )
    about = {"model": call.model, "text": call.text, "offset": call.offset}
    about |= {"dtype": str(model.dtype).removeprefix("torch."), "device": str(model.device)}
    with Bar() as progress:
        contestants = fit(model, specs, progress)
        comparison = PolicyComparer(model, cases, progress=progress).run(contestants, about)
    if out is not None:
        report.write(comparison, out)
    if as_json:
        typer.echo(report.to_json(comparison), nl=False)
        return
    show(comparison)
    screen.written(out)


def show(comparison: PolicyComparison) -> None:
    """Prints a comparison."""
    screen.table(report.grid(comparison))
