"""What a tree of Python files looks like in figures: imports, circles, sizes, names. Read, never imported.

A *tree* is a dictionary from module names to their files (``modules``). Each check takes it and returns its findings,
one line each, so that a made-up tree can be run through it as well.
"""

from __future__ import annotations

import ast
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path


@dataclass(frozen=True)
class Module:
    """One file of a tree.

    Attributes:
        name: As it is imported.
        path: Where it lies.
    """

    name: str
    path: Path

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"

    @cached_property
    def source(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def syntax(self) -> ast.Module:
        return ast.parse(self.source)

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(self.syntax))

    @cached_property
    def defined(self) -> set[str]:
        """Names of functions, classes, parameters, variables and attributes."""
        return {name for node in self.nodes if (name := _defined(node))}

    @property
    def folder(self) -> str:
        """The package whose folder the file lies in."""
        return self.name if self.is_package else self.name.rpartition(".")[0]


Tree = dict[str, Module]


def modules(*packages: Path) -> Tree:
    """All modules of some packages, each a folder with files."""
    tree: Tree = {}
    for package in packages:
        for path in sorted(package.rglob("*.py")):
            words = [package.name, *path.relative_to(package).with_suffix("").parts]
            name = ".".join(words[:-1] if words[-1] == "__init__" else words)
            tree[name] = Module(name, path)
    return tree


def imported(module: Module, tree: Tree) -> set[str]:
    """The tree's modules that one imports by name, in functions too; not what is imported for types alone."""
    found = set()
    for node in _without_type_checking(module.syntax):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in tree else node.module)
    return (found & tree.keys()) - {module.name}


def _without_type_checking(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        # Imports are statements, and stand in statements.
        if not isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test).rpartition(".")[2] == "TYPE_CHECKING":
            for other in child.orelse:
                yield other
                yield from _without_type_checking(other)
            continue
        yield child
        yield from _without_type_checking(child)


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Groups of two nodes and more in which each leads to each other."""
    reach = {node: _reached(node, arrows) for node in arrows}
    found: list[list[str]] = []
    for node in sorted(arrows):
        group = sorted({other for other in reach[node] if node in reach.get(other, set())} | {node})
        if len(group) > 1 and group not in found:
            found.append(group)
    return found


def _reached(start: str, arrows: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    ahead = set(arrows[start])
    while ahead:
        node = ahead.pop()
        seen.add(node)
        ahead |= arrows.get(node, set()) - seen
    return seen


def circles_of_files(tree: Tree) -> list[str]:
    """Files that import each other in a circle."""
    arrows = {name: imported(module, tree) for name, module in tree.items()}
    return [f"files in a circle: {', '.join(group)}" for group in circles(arrows)]


def circles_of_folders(tree: Tree) -> list[str]:
    """Neighbours in one folder, folders or files beside them, that import each other, directly or in a circle."""
    levels: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name, module in tree.items():
        for other in imported(module, tree):
            ours, theirs = name.split("."), other.split(".")
            same = 0
            while same < min(len(ours), len(theirs)) and ours[same] == theirs[same]:
                same += 1
            # A package's own file stands above what lies in its folder.
            if same and same < min(len(ours), len(theirs)):
                level = levels[".".join(ours[:same])]
                level[ours[same]].add(theirs[same])
    return [
        f"circle in {folder}/: {', '.join(group)}"
        for folder, arrows in sorted(levels.items())
        for group in circles(dict(arrows))
    ]


def full_folders(tree: Tree, most: int) -> list[str]:
    """Folders with more files than that; their ``__init__.py`` does not count."""
    files: dict[str, int] = defaultdict(int)
    for module in tree.values():
        files[module.folder] += not module.is_package
    return [f"{folder}: {count} files" for folder, count in sorted(files.items()) if count > most]


def long_files(tree: Tree, most: int) -> list[str]:
    """Files of more lines than that."""
    lines = {name: len(module.source.splitlines()) for name, module in tree.items()}
    return [f"{name}: {count} lines" for name, count in lines.items() if count > most]


def long_functions(tree: Tree, end: int) -> list[str]:
    """Functions of so many lines and more, their docstring and signature not counted."""
    found = []
    for module, node in _functions(tree):
        first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
        lines = (node.end_lineno or 0) - first.lineno + 1
        if lines >= end:
            found.append(f"{module.name}.{node.name}: {lines} lines")
    return found


def many_parameters(tree: Tree, most: int) -> list[str]:
    """Functions that take more parameters than that, beside ``self``; commands of a command line take their options."""
    found = []
    for module, node in _functions(tree):
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        count = sum(argument.arg not in ("self", "cls") for argument in given)
        if count > most and "app.command" not in "".join(ast.unparse(mark) for mark in node.decorator_list):
            found.append(f"{module.name}.{node.name}: {count} parameters")
    return found


def _functions(tree: Tree) -> Iterator[tuple[Module, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for module in tree.values():
        for node in module.nodes:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield module, node


def packed_assignments(tree: Tree) -> tuple[list[str], float]:
    """Assignments of several values to several names at once, and their share of all in percent."""
    found, total = [], 0
    for module in tree.values():
        for node in module.nodes:
            total += isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign)
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
                packed = any(isinstance(target, ast.Tuple) for target in node.targets)
                found += [f"{module.name}:{node.lineno}"] * packed
    return found, 100 * len(found) / max(total, 1)


def repeated_classes(tree: Tree) -> list[str]:
    """Names that stand for more than one class."""
    places: dict[str, list[str]] = defaultdict(list)
    for module in tree.values():
        for node in module.nodes:
            if isinstance(node, ast.ClassDef):
                places[node.name].append(module.name)
    return [f"class {name}: {', '.join(where)}" for name, where in sorted(places.items()) if len(where) > 1]


@dataclass(frozen=True)
class Private:
    """Words of a private language.

    Attributes:
        within: Modules whose names begin so.
        words: Not one of the words that a defined name is made of, nor a word of a docstring, message or comment.
        names: Not the whole of a defined name; plain English otherwise.
        but: Modules whose names begin so are left out.
    """

    within: str
    words: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()
    but: str | None = None

    def concerns(self, module: Module) -> bool:
        """Whether a module is to do without these words."""
        return module.name.startswith(self.within) and not (self.but and module.name.startswith(self.but))


def private_names(tree: Tree, language: Iterable[Private]) -> list[str]:
    """What is defined under private words: functions, classes, parameters, variables, attributes."""
    found = set()
    for module in tree.values():
        here = [private for private in language if private.concerns(module)]
        for name in module.defined:
            if any(name in private.names or private.words & set(_words(name)) for private in here):
                found.add(f"{module.name}: {name}")
    return sorted(found)


def private_prose(tree: Tree, language: Iterable[Private]) -> list[str]:
    """Docstrings, messages and comments that use private words."""
    found = []
    for module in tree.values():
        words = {word for private in language if private.concerns(module) for word in private.words}
        for line, text in _prose(module):
            found += [
                f"{module.name}:{line}: {word}" for word in sorted(words & set(re.findall(r"[a-z]+", text.lower())))
            ]
    return found


def _prose(module: Module) -> Iterator[tuple[int, str]]:
    """What a file says to people: its strings of more than one word, and its comments."""
    with module.path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            string = token.type in (tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1))
            if token.type == tokenize.COMMENT or (string and " " in token.string.strip("\"'")):
                yield token.start[0], token.string


def _defined(node: ast.AST) -> str:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return node.name
    if isinstance(node, ast.arg):
        return node.arg
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return node.id
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        return node.attr
    return ""


def _words(name: str) -> list[str]:
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]
