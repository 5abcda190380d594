"""The pages of ``--help``: what a command does, what it takes, and calls of it that run; at any width."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from typer.core import TyperCommand, TyperGroup

from attnzoo.cli import screen
from attnzoo.cli.manual.options import WORDS
from attnzoo.reporting.choices import check_known

PLAIN = "Options"
"""Options that stand in no group."""

LAST = ("How it is computed", "What is printed and written", PLAIN)
"""Groups behind those that are a command's own."""

ORDER = ("list", "show", "inspect", "compare", "convert", "heads", "bench", "doctor")
"""Of the commands; any other comes last."""

FLAGS = {"help": "--help", "version": "--version"}
"""What people take for commands."""


class Command(TyperCommand):
    """A command, with a page of help that has examples."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Prints the page."""
        show_command(self, ctx)


class Commands(TyperGroup):
    """The commands, with a page of help that says where to begin; an unknown one is answered with near ones."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Prints the page."""
        show_commands(self, ctx)

    def list_commands(self, ctx: Any) -> list[str]:
        """Their names, in the order in which a newcomer needs them."""
        return sorted(self.commands, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that the first word names."""
        if args and not args[0].startswith("-"):
            check_known(args[0], self.list_commands(ctx), "commands", FLAGS)
        return super().resolve_command(ctx, args)


def usage_line(command: Any, path: str) -> str:
    """How a command is called, in one line: arguments, and options that must be given."""
    said = [path]
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            name = shown(parameter)
            said.append(name if parameter.required else f"[{name}]")
        elif parameter.required:
            said += [parameter.opts[0], shown(parameter)]
    return " ".join([*said, "[OPTIONS]"])


def shown(parameter: Any) -> str:
    """The word that stands for a value."""
    return str(parameter.metavar or parameter.name.upper())


def examples(command: Any) -> list[tuple[str, str]]:
    """Calls of a command that run, and what each does: the lines of its epilog, "what it does: the call"."""
    found = []
    for line in (command.epilog or "").splitlines():
        what, _, call = line.strip().partition(": ")
        if call:
            found.append((call, what))
    return found


def show_command(command: Any, ctx: Any) -> None:
    """Prints the page of one command."""
    screen.text(usage_line(command, ctx.command_path), "bold")
    _paragraphs(command.help)
    _calls("Examples", examples(command))
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    _section("What it is given", [(shown(one), _meaning(one)) for one in arguments])
    groups = _groups(command, ctx)
    for title in sorted(groups, key=lambda title: LAST.index(title) if title in LAST else -1):
        _section(title, groups[title])
    words = [word for word in WORDS if _speaks_of(word, command)]
    _section("Words", [(word, WORDS[word]) for word in words])


def show_commands(group: Any, ctx: Any) -> None:
    """Prints the page of all commands."""
    screen.text(f"{ctx.command_path} COMMAND [OPTIONS]", "bold")
    _paragraphs(group.help)
    _calls("Where to begin", examples(group))
    sections: dict[str, list[tuple[str, str]]] = {}
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        first = (command.help or "").partition("\n\n")[0]
        sections.setdefault(command.rich_help_panel or "Commands", []).append((name, " ".join(first.split())))
    for title, entries in sections.items():
        _section(title, entries)
    _section("Words", list(WORDS.items()))
    for title, entries in _groups(group, ctx).items():
        _section(title, entries)
    screen.text("")
    screen.text(
        f"{ctx.command_path} COMMAND --help tells more and has examples. Exit codes: 0 done; 1 a failure, or a finding "
        "that something is wrong; 2 a wrong call; 130 after Ctrl-C."
    )


def _paragraphs(text: str | None) -> None:
    for paragraph in (text or "").split("\n\n"):
        screen.text("")
        screen.text(" ".join(paragraph.split()))


def _section(title: str, entries: Iterable[tuple[str, str]]) -> None:
    entries = list(entries)
    if entries:
        screen.text("")
        screen.text(title, "bold")
        screen.definitions(entries)


def _calls(title: str, entries: list[tuple[str, str]]) -> None:
    if entries:
        screen.text("")
        screen.text(title, "bold")
        screen.calls(entries)


def _groups(command: Any, ctx: Any) -> dict[str, list[tuple[str, str]]]:
    """The options by their groups, as they are written and what they mean."""
    found: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.get_params(ctx):
        if parameter.param_type_name == "option" and not parameter.hidden:
            title = getattr(parameter, "rich_help_panel", None) or PLAIN
            found.setdefault(title, []).append((_written(parameter), _meaning(parameter)))
    return found


def _written(parameter: Any) -> str:
    names = ", ".join(sorted(parameter.opts, key=len))
    if parameter.secondary_opts:
        names = "/".join([names, *parameter.secondary_opts])
    return names if parameter.is_flag else f"{names} {shown(parameter)}"


def _meaning(parameter: Any) -> str:
    """What a value is, whether it must be given, and what it is if not."""
    return " ".join([" ".join((parameter.help or "").split()), *_remarks(parameter)])


def _remarks(parameter: Any) -> Iterator[str]:
    if getattr(parameter, "multiple", False):
        yield "May be given several times."
    if parameter.param_type_name == "option" and parameter.required:
        yield "Must be given."
    elif parameter.default not in (None, False, True, "", ()) and not callable(parameter.default):
        yield f"If not given: {parameter.default}."


def _speaks_of(word: str, command: Any) -> bool:
    """Whether a command's options take what a word stands for; arguments are explained where they stand."""
    options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    return any(shown(one).partition(":")[0] == word for one in options if not one.is_flag)
