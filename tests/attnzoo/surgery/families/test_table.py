"""The table of hosts and conversions in the documentation says what the hosts of the laws say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import transformers

from attnzoo.reporting.versions import TRANSFORMERS
from bench.pages import replaced
from tests.attnzoo.surgery.families.hosts import HOSTS
from tests.attnzoo.surgery.families.table import NAME, PAGE, table


@pytest.mark.skipif(transformers.__version__ != TRANSFORMERS[-1], reason="the table is that of the newest version")
def test_the_table_in_the_documentation_is_not_stale() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == replaced(page, NAME, table()), "python -m tests.attnzoo.surgery.families.table writes it anew"


def test_a_refusal_more_changes_the_table() -> None:
    first, host = next(iter(HOSTS.items()))
    other = {**HOSTS, first: replace(host, refused={"s2": "some reason"})}
    assert table(other) != table()
    assert "some reason" in table(other)[-1] or any("some reason" in line for line in table(other))
