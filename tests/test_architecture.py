"""What belongs together is there: a variant's oracle, page and tests; docstrings; and nothing that must not be."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

import attnzoo
from attnzoo.base.registry import variants

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (ROOT / "attnzoo", ROOT / "kernels" / "attnzoo_kernels")
CODE = sorted(path for package in PACKAGES for path in package.rglob("*.py"))
ALL_CODE = sorted([*CODE, *(ROOT / "tests").rglob("*.py")])
SHIPPED = [
    name for name in attnzoo.list_variants() if attnzoo.get_config(name).__module__.startswith("attnzoo.variants")
]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", ALL_CODE, ids=relative)
def test_files_stay_short(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    # The packages' own front doors name what they export, two lines for each variant.
    end = 50 if path.name == "__init__.py" and path in CODE else 500
    assert lines <= end, f"{relative(path)} has {lines} lines, {end} is the end"


def test_kernels_is_a_source_root_and_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("path", CODE, ids=relative)
def test_no_module_is_a_drawer_for_everything(path: Path) -> None:
    assert path.stem not in {"utils", "util", "common", "helpers", "misc"}
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", SHIPPED)
def test_a_variant_has_a_source_departures_an_oracle_a_page_and_tests(name: str) -> None:
    module = importlib.import_module(variants[name].__module__)
    assert "Source:" in (module.__doc__ or "")
    assert "Departures:" in (module.__doc__ or "")
    # A variant of more than one file is a folder.
    stem = module.__name__.removeprefix("attnzoo.variants.").partition(".")[0]
    for needed in (
        f"attnzoo/oracles/{stem}.py",
        f"docs/variants/{stem}.md",
        f"tests/attnzoo/variants/test_{stem}.py",
    ):
        assert (ROOT / needed).is_file(), f"{name} needs {needed}"
    assert f"variants/{stem}" in (ROOT / "docs" / "index.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("package", PACKAGES, ids=relative)
def test_packages_say_that_they_are_typed(package: Path) -> None:
    assert (package / "py.typed").is_file()


def test_public_names_exist_and_have_docstrings() -> None:
    for module_name in ("attnzoo_kernels", "attnzoo.surgery"):
        module = importlib.import_module(module_name)
        for name in module.__all__:
            assert (getattr(module, name).__doc__ or "").strip(), f"{module_name}.{name}"
