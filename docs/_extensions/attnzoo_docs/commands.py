"""Commands, read from the command line's own parser when the pages are built.

``.. command-table:: NAME`` says how a command is called, what it does, what each argument and option is, and gives
examples; ``.. words-table::`` says what the words in capitals stand for.
"""

from __future__ import annotations

import re
from typing import Any

import typer.main
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from attnzoo.cli.app import app
from attnzoo.cli.manual.help_page import examples, shown, usage_line
from attnzoo.cli.manual.options import WORDS
from attnzoo_docs.options import list_table
from attnzoo_docs.options import shown as shown_default


def setup(app: Sphinx) -> dict[str, Any]:
    """Adds the directive."""
    app.add_directive("command-table", CommandTable)
    app.add_directive("words-table", WordsTable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


class CommandTable(SphinxDirective):
    """One command."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Writes the command's help, the call, a table of what it takes, and examples."""
        name = self.arguments[0]
        command = commands()[name]
        told = nodes.Element()
        paragraphs = StringList(words(command.help or "").splitlines(), self.get_location())
        self.state.nested_parse(paragraphs, self.content_offset, told)
        call = nodes.literal_block(text=usage(name), language="text")
        tried = "\n".join(f"# {what}\n{line}" for line, what in examples(command))
        tried = nodes.literal_block(text=tried, language="sh")
        rows = [(f"``{one[0]}``", shown_default(one[1]), one[2]) for one in parameters(name)]
        table = list_table(self, ("what is given", "default", "what it is"), rows, (30, 14, 56))
        return [*told.children, call, *table, tried]


class WordsTable(SphinxDirective):
    """The words that stand for values in calls."""

    def run(self) -> list[nodes.Node]:
        """Makes the table."""
        rows = [(f"``{word}``", words(meaning)) for word, meaning in WORDS.items()]
        return list_table(self, ("word", "what it stands for"), rows, (20, 80))


def commands() -> dict[str, Any]:
    """Every command by its name."""
    return dict(typer.main.get_command(app).commands)


def usage(name: str) -> str:
    """How a command is called, in one line: arguments, and options that must be given.

    Example:
        >>> usage("show")
        'attnzoo show NAME [OPTIONS]'
    """
    return usage_line(commands()[name], f"attnzoo {name}")


def parameters(name: str) -> list[tuple[str, str, str]]:
    """Arguments and options of a command: what is written, the default, and what it is; empty where nothing says."""
    found = []
    for one in commands()[name].params:
        if one.param_type_name == "argument":
            spelt = shown(one)
        else:
            spelt = "/".join(["/".join(one.opts), *one.secondary_opts])
            if not one.is_flag:
                spelt += f" {shown(one)}"
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
    escaped = re.sub(r"([*`_|\\])", r"\\\1", plain)
    # Two hyphens would become a dash.
    return re.sub(r"(?<![\w-])(--[a-z][a-z-]+)", r"``\1``", escaped)
