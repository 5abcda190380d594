"""What is said in two places is the same in both: commit hooks and ``make check``, versions, citations."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import attnzoo

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
HOOKS: list[dict[str, Any]] = [
    hook
    for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    for hook in repo["hooks"]
]
PATTERNS = {hook["id"]: hook["entry"] for hook in HOOKS if hook["language"] == "pygrep"}


def recipe(target: str) -> list[str]:
    """The commands of a target of the Makefile, its variables filled in."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    variables = dict(re.findall(r"^([A-Z]+) \??:?= (.*)$", text, re.MULTILINE))
    found = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", text, re.MULTILINE)
    assert found, target
    return [re.sub(r"\$\((\w+)\)", lambda hit: variables[hit[1]], line.strip()) for line in found[1].splitlines()]


def test_hooks_run_what_make_check_runs() -> None:
    commands = [hook["entry"].removeprefix("env ") for hook in HOOKS if hook["language"] == "system"]
    assert commands == recipe("check")
    assert not any(hook["pass_filenames"] for hook in HOOKS if hook["language"] == "system")


def test_no_hook_is_fetched_from_elsewhere() -> None:
    assert {hook["language"] for hook in HOOKS} == {"system", "pygrep"}


@pytest.mark.parametrize(
    ("name", "line", "caught"),
    [
        ("no-block-pointers", "p = tl.make_block_ptr(base, shape)", True),
        ("no-block-pointers", "p = tl.make_tensor_descriptor(base, shape)", False),
        ("no-import-of-kernels", "import kernels", True),
        ("no-import-of-kernels", "    from kernels.layers import x", True),
        ("no-import-of-kernels", "import attnzoo_kernels", False),
        ("no-import-of-kernels", "from attnzoo_kernels import op", False),
        ("no-import-of-kernels", "import kernels_of_ours", False),
    ],
)
def test_a_pattern_catches_what_it_is_for(name: str, line: str, caught: bool) -> None:
    assert bool(re.search(PATTERNS[name], line)) is caught


@pytest.mark.parametrize("name", PATTERNS)
def test_the_tree_is_clean_of_patterns(name: str) -> None:
    for folder in ("attnzoo", "kernels", "bench", "examples", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            # The lines above are strings.
            if path != Path(__file__):
                hit = re.search(PATTERNS[name], path.read_text(encoding="utf-8"), re.MULTILINE)
                assert hit is None, f"{path.relative_to(ROOT)}: {hit}"


def test_the_citation_has_the_projects_version_and_licence() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "attnzoo/__init__.py"
    assert citation["version"] == attnzoo.__version__
    assert citation["license"] == PROJECT["project"]["license"]
    assert citation["keywords"] == PROJECT["project"]["keywords"]
    # What the format asks for.
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert citation["message"] and citation["title"] and citation["authors"]


def test_tools_are_pinned() -> None:
    pinned = dict(
        re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    )
    assert {"ruff", "mypy", "import-linter"} <= pinned.keys()
