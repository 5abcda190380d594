"""What is wrong with a call that the parser refuses, in one line that says what to write instead.

Exceptions are told apart by what they carry: releases of typer take them from different modules.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from attnzoo.cli.manual.help_page import shown
from attnzoo.reporting.choices import hint

KINDS = {"integer": "a whole number", "float": "a number", "number": "a number"}
"""What a value should have been, by a word of what the parser says."""


def usage(error: Exception, words: Sequence[str], group: Any) -> tuple[str, int] | None:
    """What to say about a call that the parser refuses, and the exit code; ``None`` for any other error.

    Args:
        error: What was raised.
        words: Of the command line.
        group: All commands.
    """
    describe: Any = getattr(error, "format_message", None)
    if describe is None:
        return None
    code = int(getattr(error, "exit_code", 2))
    if type(error).__name__ == "NoArgsIsHelpError":
        # No arguments at all: the help is printed by then.
        return "", code
    command, where = _command(error, words, group)
    return f"{_said(error, command, words, group)}; see {where} --help", code


def _command(error: Exception, words: Sequence[str], group: Any) -> tuple[Any, str]:
    """The command that was called, and how it is called; the parser does not always say it."""
    context: Any = getattr(error, "ctx", None)
    if context is not None:
        return context.command, context.command_path
    named = next((word for word in words if word in group.commands), None)
    return (group, "attnzoo") if named is None else (group.commands[named], f"attnzoo {named}")


def _said(error: Any, command: Any, words: Sequence[str], group: Any) -> str:
    option = getattr(error, "option_name", None)
    parameter = getattr(error, "param", None)
    if option is not None:
        return _option(error, option, command, group)
    if type(error).__name__ == "MissingParameter" and parameter is not None:
        help_text = " ".join((parameter.help or "").split())
        return f"{_name(parameter)}: missing, and must be given: {help_text.rstrip('.')}"
    if parameter is not None:
        return _value(error, parameter, words)
    extra = re.search(r"unexpected extra argument.*\((.*)\)", str(error.message))
    if extra is not None:
        return f"{extra[1]}: one word too many; an option that takes several values is given once for each"
    return str(error.format_message()).rstrip(".")


def _value(error: Any, parameter: Any, words: Sequence[str]) -> str:
    """A value that is of another kind."""
    said = str(error.message).rstrip(".")
    kind = next((kind for word, kind in KINDS.items() if word in said), None)
    given = _given(parameter, words)
    if kind is None or given is None:
        return f"{_name(parameter)}: {said}"
    return f"{_name(parameter)}: expected {kind}, got {given!r}"


def _given(parameter: Any, words: Sequence[str]) -> str | None:
    """The first value of an option, as it was typed."""
    for word, behind in pairwise([*words, ""]):
        option, equals, value = word.partition("=")
        if option in parameter.opts:
            return value if equals else behind
    return None


def _option(error: Any, option: str, command: Any, group: Any) -> str:
    own = _options(command)
    if option in own and "requires" in str(error.message):
        return f"{option}: expected a value behind it, got none"
    if option in own:
        return f"{option}: {str(error.message).rstrip('.')}"
    if option in _options(group):
        return f"{option}: stands before the command: attnzoo {option} {command.name} ..."
    return f"{option}: no such option{hint(option, [*own, '--help'])}"


def _options(command: Any) -> list[str]:
    return [option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)]


def _name(parameter: Any) -> str:
    return str(parameter.opts[0]) if parameter.param_type_name == "option" else shown(parameter)
