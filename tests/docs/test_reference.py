"""Every public name has its place in the reference, and what has a place there is public."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

REFERENCE = Path(__file__).resolve().parents[2] / "docs" / "reference"
PACKAGES = (
    "attnzoo",
    "attnzoo.heads",
    "attnzoo.heads.act",
    "attnzoo.heads.lofit",
    "attnzoo.heads.scores",
    "attnzoo.models",
    "attnzoo.ops",
    "attnzoo.policies",
    "attnzoo.surgery",
    "attnzoo.torch_mha",
    "attnzoo_kernels",
)
ENTRY = re.compile(r"^\.\. auto(?:function|class|exception):: (\S+)$", re.MULTILINE)
INTERNAL = {"no_autocast"}
"""What a package hands to another package of the house."""


def found(name: str) -> Any:
    """What a dotted name stands for."""
    parts = name.split(".")
    made: Any = import_module(parts[0])
    for index, part in enumerate(parts[1:], 2):
        made = getattr(made, part) if hasattr(made, part) else import_module(".".join(parts[:index]))
    return made


def public(module: ModuleType) -> list[str]:
    """The names that a package offers: those that it lists, or what is its own and has no underscore before it."""
    listed = getattr(module, "__all__", None)
    if listed is not None:
        return list(listed)
    # A package hands on what its modules make; a module has what it defines.
    inside = "attnzoo" if hasattr(module, "__path__") else module.__name__
    return [
        name
        for name, made in vars(module).items()
        if not name.startswith("_") and callable(made) and getattr(made, "__module__", "").startswith(inside)
    ]


DOCUMENTED = [name for page in sorted(REFERENCE.glob("*.md")) for name in ENTRY.findall(page.read_text("utf-8"))]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_in_the_reference(package: str) -> None:
    there = [found(name) for name in DOCUMENTED]
    module = found(package)
    missing = [
        name
        for name in public(module)
        if name not in INTERNAL and not any(getattr(module, name) is made for made in there)
    ]
    assert missing == []


def test_no_name_is_there_twice_and_each_says_what_it_is() -> None:
    assert sorted(DOCUMENTED) == sorted(set(DOCUMENTED))
    assert [name for name in DOCUMENTED if not (found(name).__doc__ or "").strip()] == []


def test_a_name_without_a_place_is_seen() -> None:
    module = ModuleType("attnzoo.toy")
    exec("def told(): ...\ndef _own(): ...", vars(module))
    assert public(module) == ["told"]
    module.__all__ = ["listed"]
    assert public(module) == ["listed"]
