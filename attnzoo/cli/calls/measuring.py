"""``attnzoo bench``: what layers cost on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer

from attnzoo.cli import screen
from attnzoo.cli.progress import Bar
from attnzoo.doctor import IMPLEMENTATIONS
from attnzoo.evaluation import costs_report, layer_costs
from attnzoo.evaluation.cost_setting import CostSetting
from attnzoo.reporting.choices import check_choice
from attnzoo.reporting.outputs import check_writable


def measure_layers(setting: CostSetting, variants: Sequence[str] | None, *, out: Path | None, as_json: bool) -> None:
    """Measures layers, and prints or writes what was found.

    Raises:
        ConfigError: Before anything is measured, if something of the call does not fit.
        Exit: With code 1, if a layer computes wrong or cannot be measured.
    """
    if out is not None:
        check_writable(out)
    check_choice("impl", setting.impl, ("auto", *IMPLEMENTATIONS))
    where = costs_report.about(setting)
    with Bar() as progress:
        found = layer_costs.measure(setting, list(variants or layer_costs.SPECS), progress)
    if out is not None:
        costs_report.write(found, where, out)
    if as_json:
        typer.echo(costs_report.to_json(found, where), nl=False)
    else:
        screen.table(costs_report.grid(found, where))
        for cost in found:
            if cost.problem is not None:
                screen.text(f"{cost.name}: {cost.problem}")
        screen.written(out)
    if any(cost.problem is not None for cost in found):
        raise typer.Exit(1)
