"""The table of hosts and conversions in docs/families.md: ``python -m tests.attnzoo.surgery.families.table`` writes it.

It says what ``test_conformance.py`` holds every host to.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bench.pages import replaced
from tests.attnzoo.surgery.families.hosts import CELLS, HOSTS, Host

PAGE = Path(__file__).resolve().parents[4] / "docs" / "families.md"
NAME = "hosts"


def table(hosts: Mapping[str, Host] = HOSTS) -> list[str]:
    """A row for each class of hosts, a column for each conversion, and why what is refused is."""
    refused = {name: {**host.refused, **_said_by_calls(host)} for name, host in hosts.items()}
    reasons = list(dict.fromkeys(why for cells in refused.values() for why in cells.values()))
    lines = [f"| family | {' | '.join(CELLS)} |", f"|---|{'---|' * len(CELLS)}"]
    for name, why in refused.items():
        marks = [str(reasons.index(why[cell]) + 1) if cell in why else "yes" for cell in CELLS]
        lines.append(f"| {name} | {' | '.join(marks)} |")
    return [*lines, "", "Refused, by number:", "", *(f"{n}. {why}" for n, why in enumerate(reasons, 1))]


def _said_by_calls(host: Host) -> dict[str, str]:
    return {cell: f"{why} (the first call says so)" for cell, why in host.at_call.items()}


def main() -> None:
    """Writes the table anew."""
    PAGE.write_text(replaced(PAGE.read_text(encoding="utf-8"), NAME, table()), encoding="utf-8")


if __name__ == "__main__":
    main()
