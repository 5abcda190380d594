"""Folders are layers, files are short, names are the field's: figures of the tree, and each check seen to bite."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from tests import structure
from tests.structure import Private

ROOT = Path(__file__).resolve().parent.parent
TREES = {
    "attnzoo": structure.modules(ROOT / "attnzoo"),
    "attnzoo_kernels": structure.modules(ROOT / "kernels" / "attnzoo_kernels"),
    "bench": structure.modules(ROOT / "bench"),
    "examples": structure.modules(ROOT / "examples"),
}
# What a kernel calls is inlined, and in the interpreter every call is paid for.
KERNELS = {"attnzoo_kernels._triton.forward", "attnzoo_kernels._triton.backward"}
# Pointers and constants of a compiler.
POINTERS = KERNELS | {"attnzoo_kernels._triton.primitives"}
# These build a layout from what a pattern is called after, each an option of its own.
OPTIONS = {"attnzoo_kernels.layouts.layout.sink_window", "attnzoo_kernels.layouts.layout.strided"}
# A constructor of torch's, argument by argument: callers give them by place.
OPTIONS |= {"attnzoo.torch_mha.module.__init__"}

LAYERS = ("attnzoo.base", "attnzoo.cache", "attnzoo.selection", "attnzoo.variants")
LANGUAGE = (
    # A replacement; attention inputs; a read pattern.
    Private("attnzoo.", words=frozenset({"seat", "seats", "seated"}), names=frozenset({"Memory", "Rule"})),
    # Finish, finalise; rotation and index. A host is a family of models: memory is offloaded.
    *(Private(folder, names=frozenset({"conclude", "settle", "turns", "BlockTurns"})) for folder in LAYERS),
    # A public attribute of WithLandmarks is called so.
    *(Private(folder, names=frozenset({"place"}), but="attnzoo.variants.landmark.tokens") for folder in LAYERS),
    *(Private(folder, words=frozenset({"settle", "host"})) for folder in LAYERS),
    # Pack GQA; zero what is not finite.
    Private("attnzoo_kernels", words=frozenset({"fold", "folds", "folded", "silence", "tame"})),
    Private("attnzoo_kernels", names=frozenset({"PACK", "pack", "Rule", "place", "turns", "Turns"})),
    # A row tile, a key range, a head group.
    Private("attnzoo_kernels", words=frozenset({"strip", "strips", "seat", "seats"})),
    *(
        Private(f"attnzoo_kernels.cpu.{name}", names=frozenset({"Part", "part", "parts"}))
        for name in ("flash", "row_tiles")
    ),
    # m_i, l_i, alpha, state.
    *(Private(name, names=frozenset({"peak", "total", "fade", "run", "more"})) for name in sorted(POINTERS)),
)
"""Words of before; above each the word of the field that stands in its place."""


@dataclass(frozen=True)
class Figures:
    """How many findings there are of each check; a bound on them, which only goes down."""

    circles_of_files: float = 0
    circles_of_folders: float = 0
    full_folders: float = 0
    long_files: float = 0
    long_functions: float = 0
    many_parameters: float = 0
    packed_percent: float = 1
    repeated_classes: float = 0
    private_names: float = 0
    private_prose: float = 0


BOUNDS = {
    "attnzoo": Figures(),
    "attnzoo_kernels": Figures(),
    "bench": Figures(),
    "examples": Figures(),
}
"""A field that is not named has the bound of the house."""


def but(tree: structure.Tree, names: set[str]) -> structure.Tree:
    return {name: module for name, module in tree.items() if name not in names}


def findings(check: str, tree: structure.Tree) -> list[str]:
    """What a check finds in a tree."""
    if check == "full_folders":
        return structure.full_folders(tree, most=12)
    if check == "long_files":
        return structure.long_files(tree, most=400)
    if check == "long_functions":
        return structure.long_functions(but(tree, KERNELS), end=50)
    if check == "many_parameters":
        found = structure.many_parameters(but(tree, POINTERS), most=8)
        return [line for line in found if line.partition(":")[0] not in OPTIONS]
    if check == "packed_percent":
        return structure.packed_assignments(tree)[0]
    if check.startswith("private"):
        return getattr(structure, check)(tree, LANGUAGE)
    return getattr(structure, check)(tree)


def figure(check: str, tree: structure.Tree) -> float:
    """The figure that a bound is on."""
    return structure.packed_assignments(tree)[1] if check == "packed_percent" else len(findings(check, tree))


CHECKS = [field.name for field in fields(Figures)]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("package", TREES)
def test_a_package_keeps_its_figures(package: str, check: str) -> None:
    found = "\n".join(findings(check, TREES[package]))
    assert figure(check, TREES[package]) <= getattr(BOUNDS[package], check), f"{check}:\n{found}"


OFFENCES = {
    "circles_of_files": {"a/x.py": "from toy.b.y import Y", "b/y.py": "def later():\n    import toy.a.x\n"},
    "circles_of_folders": {
        "a/x.py": "from toy.b import y",
        "b/y.py": "",
        "b/z.py": "from toy.c.z import Z",
        "c/z.py": "from toy.a import other",
        "a/other.py": "",
    },
    "full_folders": {f"a/x{number}.py": "" for number in range(13)},
    "long_files": {"a/x.py": "x = 1\n" * 401},
    "long_functions": {"a/x.py": "def long():\n    '''Does it.'''\n" + "    print()\n" * 50},
    "many_parameters": {"a/x.py": "def f(a, b, c, d, e, *, f, g, h, i): ..."},
    "packed_percent": {"a/x.py": "a, b = 1, 2\nc = 3\n"},
    "repeated_classes": {"a/x.py": "class Twice: ...", "b/y.py": "class Twice: ..."},
}


def planted(folder: Path, files: dict[str, str]) -> structure.Tree:
    for name, text in {"__init__.py": "", **files}.items():
        path = folder / "toy" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(text, encoding="utf-8")
    return structure.modules(folder / "toy")


@pytest.mark.parametrize("check", OFFENCES)
def test_a_check_finds_a_planted_offence_and_no_other(tmp_path: Path, check: str) -> None:
    tree = planted(tmp_path, OFFENCES[check])
    # A circle of files in two folders is one of these folders too.
    allowed = {check, "circles_of_folders"} if check == "circles_of_files" else {check}
    assert {name for name in OFFENCES if figure(name, tree) > getattr(Figures(), name)} == allowed


@pytest.mark.parametrize(
    "files",
    [
        {
            "a/x.py": "from toy.a.y import Y",
            "a/y.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import toy.a.x",
        },
        {"a/x.py": "import toy.a.y", "a/y.py": "x, y = pair()\n"},
        {"a/x.py": "def f(self, a, b, c, d, e, f, g, h): ..."},
        {"a/x.py": "def just():\n    '''" + "Line.\n" * 50 + "'''\n" + "    print()\n" * 49},
    ],
)
def test_what_is_allowed_is_not_found(tmp_path: Path, files: dict[str, str]) -> None:
    tree = planted(tmp_path, files)
    assert not [name for name in OFFENCES if figure(name, tree) > getattr(Figures(), name)]


TOY = (
    Private("toy", words=frozenset({"seat"}), names=frozenset({"part"})),
    Private("toy.a", names=frozenset({"more"})),
)


@pytest.mark.parametrize(
    "text",
    ["class HeadSeat: ...", "def new_seat(): ...", "def f(seat): ...", "seat_of = 1", "self.part = 1", "more = 1"],
)
def test_private_names_are_found(tmp_path: Path, text: str) -> None:
    assert structure.private_names(planted(tmp_path, {"a/x.py": text}), TOY)


@pytest.mark.parametrize(
    "text", ["a.strip()", "part_of = 1", "seating = 1", "print('part of it')", "from a import seat"]
)
def test_plain_english_is_no_private_name(tmp_path: Path, text: str) -> None:
    assert not structure.private_names(planted(tmp_path, {"a/x.py": text}), TOY)


def test_a_word_is_private_only_where_it_says_so(tmp_path: Path) -> None:
    assert not structure.private_names(planted(tmp_path, {"b/x.py": "more = 1"}), TOY)


@pytest.mark.parametrize(
    "text", ['"""Takes a seat."""', "x = 1  # a seat", 'raise E("no seat here")', 'f"no {x} seat"']
)
def test_private_prose_is_found(tmp_path: Path, text: str) -> None:
    assert structure.private_prose(planted(tmp_path, {"a/x.py": text}), TOY)


@pytest.mark.parametrize("text", ['"""A part of it."""', "x = seat()", 'x["seat"]', '"""Seating."""'])
def test_plain_english_is_no_private_prose(tmp_path: Path, text: str) -> None:
    assert not structure.private_prose(planted(tmp_path, {"a/x.py": text}), TOY)
