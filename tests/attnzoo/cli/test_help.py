"""The pages of help: whole at any width, with calls that run, and with every option explained.

Each command is under this by existing.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from typing import Any

import pytest
import torch
import typer.main

from attnzoo.cli.app import app
from attnzoo.cli.manual.help_page import LAST, ORDER, examples
from attnzoo.cli.manual.options import WORDS, using_threads
from attnzoo.evaluation.compare import VariantSpec
from attnzoo.evaluation.two_phase.specs import PolicySpec
from attnzoo.factory import read_spec
from attnzoo.surgery.options import options_of
from attnzoo_kernels.errors import ConfigError
from tests.attnzoo.cli.cli_support import call

WIDTHS = (40, 60, 80, 120, 200)
GROUP: Any = typer.main.get_command(app)
COMMANDS: dict[str, Any] = GROUP.commands
PAGES = ("", *COMMANDS)
COMPUTING = ("compare", "convert", "heads", "bench")

Page = Callable[[str, int], list[str]]


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Page:
    """The lines of a page at a width."""

    def read(name: str, width: int) -> list[str]:
        monkeypatch.setenv("COLUMNS", str(width))
        code, out, err = call(monkeypatch, capsys, *name.split(), "--help")
        assert (code, err) == (0, "")
        return out.splitlines()

    return read


def run_on(lines: list[str]) -> str:
    """A page in one line, as a reader takes it."""
    return " ".join(" ".join(line.removesuffix(" \\") for line in lines).split())


def options(command: Any) -> list[Any]:
    return [one for one in command.params if one.param_type_name == "option"]


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_whole_at_every_width(name: str, page: Page) -> None:
    command = COMMANDS.get(name, GROUP)
    wanted = [" ".join((command.help or "").split())]
    wanted += [part for example in examples(command) for part in example]
    wanted += [" ".join(one.help.split()) for one in command.params]
    wanted += [option for one in command.params if one.param_type_name == "option" for option in one.opts]
    if not name:
        wanted += [*WORDS.values(), *COMMANDS]
    for width in WIDTHS:
        lines = page(name, width)
        read = run_on(lines)
        # A long word of an option's name may go on in the next line.
        packed = read.replace(" ", "")
        for text in wanted:
            assert text.replace(" ", "").replace("\n", "") in packed or text in read, (width, text)
        for line in lines:
            assert len(line) <= width or " " not in line.strip().removesuffix(" \\"), (width, line)
        # Folded or not, a call is what a shell reads.
        unfolded = re.sub(r" \\\n\s*", " ", "\n".join(lines))
        assert all(line in unfolded for line, _ in examples(command)), width
        assert not re.search(r"…|│|╭|\[/?\w+\]|`|<\w+>", read.replace("[OPTIONS]", "").replace("[PATTERN]", ""))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_examples_that_parse(name: str) -> None:
    found = examples(COMMANDS[name])
    assert found
    for line, what in found:
        assert what
        program, spelt, *words = shlex.split(line)
        assert (program, spelt) == ("attnzoo", name)
        given = COMMANDS[name].make_context(name, words).params
        for spec in [*(given.get("variants") or []), *([given["to"]] if "to" in given else [])]:
            for conversion in VariantSpec.parse(spec).conversions if name != "bench" else ():
                assert set(conversion.options) <= set(options_of(conversion.variant))
            if name == "bench":
                read_spec(spec)
        for spec in given.get("policy") or []:
            PolicySpec.parse(spec)


def test_the_first_page_says_where_to_begin() -> None:
    first = [shlex.split(line) for line, _ in examples(GROUP)]
    assert {"list", "show", "inspect", "compare", "convert", "doctor"} == {words[1] for words in first}
    for _, name, *words in first:
        COMMANDS[name].make_context(name, words)
    assert set(ORDER) == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained_and_has_its_group(name: str) -> None:
    for one in COMMANDS[name].params:
        assert one.help, one.name
        if one.param_type_name == "argument":
            assert one.metavar == one.metavar.upper()
        elif not one.is_flag:
            assert one.metavar, one.name
            assert one.rich_help_panel, one.name


@pytest.mark.parametrize("name", COMPUTING)
def test_what_computes_takes_a_device_a_dtype_and_threads(name: str) -> None:
    shared = {option: one for one in options(COMMANDS[name]) for option in one.opts}
    for option in ("--device", "--dtype", "--threads"):
        assert shared[option].rich_help_panel == LAST[0]


def test_threads_are_set_for_a_call_alone() -> None:
    before = torch.get_num_threads()
    with using_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with pytest.raises(ConfigError, match="threads: expected at least 1, got 0"), using_threads(0):
        pass
