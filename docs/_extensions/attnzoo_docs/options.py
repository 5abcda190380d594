"""Tables of options, read from the classes that have them when the pages are built.

``.. options-table:: SUBJECT`` makes one. Subjects are ``shared`` (what every variant has), ``variant NAME`` (a
variant's own), ``conversion NAME`` (what a conversion to it takes), ``policy NAME`` and ``class a.dotted.Name``. What
an option is comes from the docstring that ``attnzoo show`` prints too.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields, is_dataclass
from importlib import import_module
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import attnzoo
from attnzoo.cache.policies.protocol import Policy, policies
from attnzoo.cli.prose import documented
from attnzoo.surgery.hosts.attention_function import ReadPattern
from attnzoo.surgery.kinds.kind import REQUIRED, default_of
from attnzoo.surgery.lowrank.factor import Request
from attnzoo.surgery.options import options_of
from attnzoo_kernels.errors import ConfigError


@dataclass(frozen=True)
class Option:
    """A row of a table.

    Attributes:
        name: What is written before "=".
        default: What it is if nothing is said, as Python writes it.
        meaning: What its docstring says, in reStructuredText; empty where it says nothing.
    """

    name: str
    default: str
    meaning: str


def setup(app: Sphinx) -> dict[str, Any]:
    """Adds the directive."""
    app.add_directive("options-table", OptionsTable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


class OptionsTable(SphinxDirective):
    """The options of a subject, with defaults and meanings."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """Makes the table."""
        rows = [(f"``{one.name}``", shown(one.default), one.meaning) for one in options(self.arguments[0])]
        return list_table(self, ("option", "default", "what it is"), rows, (24, 20, 56))


def shown(default: str) -> str:
    """A default as it stands in a cell; that something must be given is no value."""
    return default if default in ("", REQUIRED) else f"``{default}``"


def list_table(
    directive: SphinxDirective, head: tuple[str, ...], rows: list[tuple[str, ...]], widths: tuple[int, ...]
) -> list[nodes.Node]:
    """A table whose cells are reStructuredText."""
    lines = [".. list-table::", "   :header-rows: 1", f"   :widths: {' '.join(map(str, widths))}", ""]
    for row in (head, *rows):
        for index, cell in enumerate(row):
            first, *more = cell.splitlines() or [""]
            lines.append(f"   {'*' if index == 0 else ' '} - {first}".rstrip())
            lines += [f"       {line}".rstrip() for line in more]
    made = nodes.Element()
    directive.state.nested_parse(StringList(lines, directive.get_location()), directive.content_offset, made)
    return made.children


def options(subject: str) -> list[Option]:
    """The options of a subject, in the order of their class.

    Raises:
        ConfigError: If there is no such subject.
    """
    what, _, name = subject.partition(" ")
    if what == "shared":
        return _of_class(attnzoo.AttentionConfig)
    if what == "variant":
        return _of_variant(attnzoo.get_config(name))
    if what == "conversion":
        return _of_conversion(name)
    if what == "policy":
        return _of_policy(policies[name])
    if what == "class":
        module, _, attribute = name.rpartition(".")
        return _of_class(getattr(import_module(module), attribute))
    raise ConfigError(f"subject: expected shared, variant, conversion, policy or class, got {what!r}")


def _of_class(record: type) -> list[Option]:
    """What is given when one is made."""
    notes = documented(record)
    settings = {field.name: default_of(field) for field in fields(record)} if is_dataclass(record) else {}
    found = []
    for given in inspect.signature(record).parameters.values():
        default = settings.get(given.name, REQUIRED if given.default is given.empty else given.default)
        found.append(Option(given.name, _told(default), notes.get(given.name, "")))
    return found


def _of_variant(config: type[attnzoo.AttentionConfig]) -> list[Option]:
    """What a variant has beside the shared options, and shared ones of which it says something else."""
    shared = {option.name: option for option in _of_class(attnzoo.AttentionConfig)}
    return [option for option in _of_class(config) if shared.get(option.name) != option]


def _of_conversion(variant: str) -> list[Option]:
    """What a conversion takes; merged and latent heads are solved for, and have a record of their own."""
    record = Request if variant == "lowrank_gqa" else attnzoo.get_config(variant)
    notes = {**documented(ReadPattern), **documented(record)}
    return [Option(name, _told(default), notes.get(name, "")) for name, default in options_of(variant).items()]


def _of_policy(policy: type[Any]) -> list[Option]:
    """A policy's own options first, and then those that all policies have."""
    found = _of_class(policy)
    notes = documented(policy)
    if any(option.name == "read" for option in found):
        # A part is kept under another name where the name is that of a method.
        found = [Option(one.name, one.default, one.meaning or notes.get("reader", "")) for one in found]
    shared = {field.name for field in fields(Policy)}
    return sorted(found, key=lambda option: option.name in shared)


def _told(default: Any) -> str:
    if default == REQUIRED:
        return REQUIRED
    # What is made of defaults alone needs no list of them.
    plain = is_dataclass(default) and default == type(default)()
    return f"{type(default).__name__}()" if plain else repr(default)
