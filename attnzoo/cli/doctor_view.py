"""What the doctor found, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from attnzoo.cli import screen
from attnzoo.doctor import IMPLEMENTATIONS, Report
from attnzoo.reporting.tables import Grid
from attnzoo_kernels.selftest import Check


def show(report: Report) -> None:
    """Prints a report."""
    screen.text("  ".join(f"{name} {have or 'missing'}" for name, have in report.versions.items()))
    for device in report.devices:
        rows = [
            (name, ", ".join(value) if isinstance(value, list) else str(value)) for name, value in device.facts.items()
        ]
        rows += [(impl, "; ".join(device.refused.get(impl, ("can run",)))) for impl in IMPLEMENTATIONS]
        rows += [(f"blocked, {what}", _path_line(reasons)) for what, reasons in device.paths.items()]
        screen.table(Grid(("device", device.name), rows, f"{device.name}: {device.runs} runs"))
    for finding in report.findings:
        style = "bold red" if finding.level == "problem" else "yellow"
        screen.text(f"{finding.level}: {finding.what} (remedy: {finding.remedy})", style)
    if not report.findings:
        screen.text("no combination that is known to be bad")
    if report.checks:
        screen.table(_checks(report.checks))
    for check in report.checks:
        if not check.holds:
            screen.text(f"wrong: {explain(check)}", "bold red")
    spent = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in report.seconds.items())
    screen.text(f"{report.verdict}; {spent}")


def _checks(checks: list[Check]) -> Grid:
    rows = []
    bad = set()
    for i, group in enumerate(_groups(checks)):
        worst = max(group, key=lambda check: check.error / check.limit if check.limit else float("inf"))
        good = sum(check.holds for check in group)
        if good < len(group):
            bad.add(i)
        first = (worst.device, worst.impl, worst.dtype, f"{good} of {len(group)} right")
        figures = (f"{worst.error:.1e}", f"{worst.limit:.1e}") if worst.problem is None else ("", "")
        rows.append((*first, f"{worst.case}: {worst.quantity or 'nothing'}", *figures))
    return Grid(
        ("device", "implementation", "dtype", "cases", "worst", "error", "bound"),
        rows,
        title="self-test against the reference in fp64, forward and gradients",
        numbers=frozenset({5, 6}),
        bad=frozenset(bad),
    )


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


def _path_line(paths: dict[str, tuple[str, ...]]) -> str:
    """The path that takes a call, and why those before it do not."""
    lines: list[str] = []
    for name, reasons in paths.items():
        if not reasons:
            return "; ".join([f"{name} runs", *lines])
        lines.append(f"not {'; '.join(reasons)}")
    return "; ".join(lines)
