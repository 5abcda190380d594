"""Commands, read from the command line's own parser when the pages are built.

``.. command-table:: NAME`` says how a command is called, what it does, and what each argument and option is.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import typer.main
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from attnzoo.cli.app import app
from attnzoo_docs.options import list_table


def setup(app: Sphinx) -> dict[str, Any]:
    """Adds the directive."""
    app.add_directive("command-table", CommandTable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


class CommandTable(SphinxDirective):
    """One command."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Writes the call, the command's help, and a table of what it takes."""
        name = self.arguments[0]
        command = commands()[name]
        call = nodes.literal_block(text=usage(name), language="text")
        told = nodes.Element()
        paragraphs = StringList(words(command.help or "").splitlines(), self.get_location())
        self.state.nested_parse(paragraphs, self.content_offset, told)
        rows = [(f"``{one[0]}``", f"``{one[1]}``" if one[1] else "", one[2]) for one in parameters(name)]
        table = list_table(self, ("what is given", "default", "what it is"), rows, (30, 14, 56))
        return [*told.children, call, *table]


def commands() -> dict[str, Any]:
    """Every command by its name."""
    return dict(typer.main.get_command(app).commands)


def usage(name: str) -> str:
    """How a command is called, in one line: arguments, and options that must be given.

    Example:
        >>> usage("show")
        'attnzoo show VARIANT [OPTIONS]'
    """
    told = ["attnzoo", name]
    for spelt, default, _ in parameters(name):
        if default == "required" or not spelt.startswith("-"):
            told.append(spelt if default == "required" else f"[{spelt}]")
    return " ".join([*told, "[OPTIONS]"])


def parameters(name: str) -> list[tuple[str, str, str]]:
    """Arguments and options of a command: what is written, the default, and what it is; empty where nothing says."""
    command = commands()[name]
    kinds = get_type_hints(command.callback)
    found = []
    for one in command.params:
        if one.param_type_name == "argument":
            spelt = one.metavar or one.name.upper()
        else:
            spelt = "/".join(["/".join(one.opts), *one.secondary_opts])
            if not one.is_flag:
                spelt += f" {one.metavar or _kind(kinds[one.name])}"
        if one.default is True and one.secondary_opts:
            default = one.opts[0]
        elif one.default is None or one.default is False:
            default = "required" if one.required else ""
        else:
            default = str(one.default)
        found.append((spelt, default, words(getattr(one, "help", None) or "")))
    return found


def words(text: str) -> str:
    """Help as it is printed, with the markup of terminals taken off."""
    plain = re.sub(r"\[/?(?:bold|dim|italic|cyan|green|yellow|red)\]", "", text.replace("\b", ""))
    return re.sub(r"([*`_|\\])", r"\\\1", plain)


def _kind(annotation: Any) -> str:
    """What a value is, in a word: that of the annotation that is not ``None``, and of a list its entry's."""
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)] or [annotation]
    if get_origin(kinds[0]) is list or get_origin(annotation) is list:
        return _kind((get_args(kinds[0]) or kinds)[0])
    return {int: "INTEGER", float: "NUMBER", Path: "PATH"}.get(kinds[0], "TEXT")
