"""What the README and the pages say can be pasted: each Python block runs alone, each documented command exists."""

from __future__ import annotations

import re
import shlex
import warnings
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import typer.main

import attnzoo
from attnzoo.base import registry
from attnzoo.cli.app import app
from attnzoo.evaluation.compare import VariantSpec
from attnzoo.surgery.options import options_of

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "kernels" / "README.md", *(ROOT / "docs").rglob("*.md")])
PAGES = [page for page in PAGES if "_build" not in page.parts]
BLOCK = re.compile(r"^```python\n(.*?)^```$(?:\n*^```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def variants_as_they_were() -> Iterator[None]:
    before = dict(registry.variants)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    registry.variants.clear()
    registry.variants.update(before)


def blocks(page: Path) -> list[tuple[int, str, str]]:
    text = page.read_text(encoding="utf-8")
    return [(text[: m.start(1)].count("\n"), m.group(1), m.group(2) or "") for m in BLOCK.finditer(text)]


BLOCKS = [
    pytest.param(page, *block, id=f"{page.relative_to(ROOT)}:{block[0]}") for page in PAGES for block in blocks(page)
]


@pytest.mark.parametrize(("page", "line", "code", "expected"), BLOCKS)
def test_a_block_runs_alone_and_prints_what_the_page_says(
    page: Path, line: int, code: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile("\n" * line + code, str(page), "exec", dont_inherit=True), {"__name__": "page"})
    if expected:
        printed = [row.rstrip() for row in capsys.readouterr().out.splitlines()]
        assert printed == [row.rstrip() for row in expected.splitlines()]


SHELL = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:attnzoo|make|python -m)\s[^`]+)`")
COMMAND_LINES = sorted(
    {
        " ".join(line.partition("#")[0].split())
        for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "AGENTS.md"]
        for text in [page.read_text(encoding="utf-8")]
        for line in [*(row for block in SHELL.findall(text) for row in block.splitlines()), *INLINE.findall(text)]
        if line.partition("#")[0].strip()
    }
)


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_a_documented_command_exists(line: str) -> None:
    program, *words = shlex.split(line)
    # NAME=value before or behind a program is for its environment.
    words = [word for word in words if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    if program == "attnzoo":
        parse(words)
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert set(words) <= set(targets)
    elif program == "python":
        assert words[0] == "-m"
        path = ROOT / words[1].replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").is_file()
    else:
        raise AssertionError(f"nobody knows whether {program} exists")


def parse(words: list[str]) -> None:
    """Parses a call of the command line without running it; variants and their options must exist too."""
    command = typer.main.get_command(app).commands[words[0]]
    given = command.make_context(words[0], words[1:]).params
    for spec in [*(given.get("variants_") or []), *([given["to"]] if "to" in given else [])]:
        if "..." in spec:
            continue
        found = VariantSpec.parse(spec)
        for conversion in found.conversions:
            known = (
                [field.name for field in fields(attnzoo.get_config(conversion.variant))]
                if words[0] == "bench"
                else options_of(conversion.variant)
            )
            assert set(conversion.options) <= set(known)


def test_documented_flags_exist() -> None:
    known = {
        option
        for command in typer.main.get_command(app).commands.values()
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    known |= {"--help", "--version", "--debug"}
    # Scripts of the benchmarks name their parameters as their options.
    source = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "bench").rglob("*.py")))
    for page in PAGES:
        # What is typed into a terminal and begins with a prompt is another program's.
        text = re.sub(r"^```console\n.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", text):
            assert flag in known or flag[2:].replace("-", "_") in source, f"{page.relative_to(ROOT)}: {flag}"


def test_relative_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"
