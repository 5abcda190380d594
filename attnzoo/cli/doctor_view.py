"""What the doctor found, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from attnzoo.doctor import IMPLEMENTATIONS, Report
from attnzoo.selftest import Check


def show(report: Report, console: Console) -> None:
    """Prints a report."""
    console.print("  ".join(f"{name} {have or 'missing'}" for name, have in report.versions.items()), highlight=False)
    for device in report.devices:
        table = Table(title=f"{device.name}: {device.runs} runs", title_justify="left", show_header=False)
        for name, value in device.facts.items():
            table.add_row(name, escape(", ".join(value) if isinstance(value, list) else str(value)))
        for impl in IMPLEMENTATIONS:
            table.add_row(impl, escape("; ".join(device.refused.get(impl, ("can run",)))))
        console.print(table)
    for finding in report.findings:
        style = "bold red" if finding.level == "problem" else "yellow"
        text = f"{finding.what} (remedy: {finding.remedy})"
        console.print(f"[{style}]{finding.level}[/]: {escape(text)}", highlight=False)
    if not report.findings:
        console.print("no combination that is known to be bad")
    if report.checks:
        console.print(_checks(report.checks))
    for check in report.checks:
        if not check.holds:
            console.print(f"[bold red]wrong[/]: {escape(explain(check))}", highlight=False)
    spent = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in report.seconds.items())
    console.print(f"{report.verdict}; {spent}", highlight=False)


def _checks(checks: list[Check]) -> Table:
    table = Table(title="self-test against the reference in fp64, forward and gradients", title_justify="left")
    for name in ("device", "implementation", "dtype", "cases", "worst", "error", "bound"):
        table.add_column(name, justify="right" if name in ("error", "bound") else "left")
    for group in _groups(checks):
        worst = max(group, key=lambda check: check.error / check.limit if check.limit else float("inf"))
        good = sum(check.holds for check in group)
        style = None if good == len(group) else "bold red"
        first = (worst.device, worst.impl, worst.dtype, f"{good} of {len(group)} right")
        figures = (f"{worst.error:.1e}", f"{worst.limit:.1e}") if worst.problem is None else ("", "")
        table.add_row(*first, f"{worst.case}: {worst.quantity or 'nothing'}", *figures, style=style)
    return table


def _groups(checks: list[Check]) -> Iterator[list[Check]]:
    keys = dict.fromkeys((check.device, check.impl, check.dtype) for check in checks)
    for key in keys:
        yield [check for check in checks if (check.device, check.impl, check.dtype) == key]


def explain(check: Check) -> str:
    """One line about a check that failed."""
    named = f"{check.impl} on {check.device}, {check.dtype}, {check.case}"
    if check.problem is not None:
        return f"{named}: {check.problem}"
    return f"{named}: {check.quantity} is off by {check.error:.1e}, {check.limit:.1e} is right"
