"""What the page of symptoms quotes is said: each message is in the packages, or in what a command prints."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
# What is quoted stands first in its row; other first cells are told in words.
QUOTED = re.findall(r"^\| `([^`]+)`(?: \(a warning\))? \|", PAGE, re.MULTILINE)


def said() -> str:
    """All strings of the packages, those with values in them too, one a line."""
    lines = []
    for path in [*(ROOT / "attnzoo").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [p.value if isinstance(p, ast.Constant) and isinstance(p.value, str) else "\0" for p in parts]
            lines.append("".join(texts))
    return "\n".join(lines)


@pytest.fixture(scope="module")
def messages() -> str:
    return said()


@pytest.mark.parametrize("quoted", QUOTED)
def test_a_message_that_the_page_quotes_is_said(quoted: str, messages: str) -> None:
    assert quoted in messages


def test_the_page_quotes_messages_of_every_part() -> None:
    sections = [part for part in PAGE.split("\n## ") if "| it says |" in part]
    assert len(QUOTED) >= 20
    assert all(any(quoted in section for quoted in QUOTED) for section in sections)
