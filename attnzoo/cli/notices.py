"""Warnings and wrong calls, one line each on stderr."""

from __future__ import annotations

import warnings
from typing import Any

from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from attnzoo.reporting.choices import check_known, hint


class Commands(TyperGroup):
    """The commands; an unknown one is answered with those that come near."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that the first word names."""
        if args and not args[0].startswith("-"):
            check_known(args[0], self.commands, "commands")
        return super().resolve_command(ctx, args)


def show_warnings() -> None:
    """From here on a warning is one line, said once: what it says, without the line of code that said it."""
    said: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        text = " ".join(str(message).split())
        if text not in said:
            said.add(text)
            line = Text("attnzoo: warning: ", style="yellow").append(text, style="default")
            Console(stderr=True).print(line, soft_wrap=True, highlight=False)

    warnings.showwarning = show


def usage(error: Exception) -> tuple[str, int] | None:
    """What to say about a call that the parser refuses, and the exit code; ``None`` for any other error."""
    describe: Any = getattr(error, "format_message", None)
    if describe is None:
        return None
    context: Any = getattr(error, "ctx", None)
    code = int(getattr(error, "exit_code", 2))
    if type(error).__name__ == "NoArgsIsHelpError":
        # No arguments at all: the message is the help.
        error.show()  # type: ignore[attr-defined]
        return "", code
    where = context.command_path if context is not None else "attnzoo"
    name = getattr(error, "option_name", None)
    if name is None or context is None:
        return f"{describe()} See {where} --help", code
    known = [option for parameter in context.command.params for option in (*parameter.opts, *parameter.secondary_opts)]
    if name in known:
        return f"{describe()} See {where} --help", code
    return f"{name}: no such option of {where}{hint(name, known)}; see {where} --help", code
