"""The walk that adds a variant does what its page says, and what an index shows has no link into the repository."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from tests.wheel import build

ROOT = Path(__file__).resolve().parent.parent


def test_the_walk_of_a_new_variant_holds_the_code_of_its_page() -> None:
    page = (ROOT / "docs" / "adding-a-variant.md").read_text(encoding="utf-8")
    found = re.search(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert found is not None
    walk = (ROOT / "examples" / "walks" / "3_variant.py").read_text(encoding="utf-8")
    missing = [line for line in found[1].splitlines() if line and line not in walk.splitlines()]
    assert not missing


def test_there_are_five_walks() -> None:
    names = sorted(path.stem for path in (ROOT / "examples" / "walks").glob("*.py"))
    assert names == ["1_layer", "2_smollm2", "3_variant", "4_policy", "5_head"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("See [the page](docs/x.md#y).", "See the page."),
        ("See [the site](https://example.org/x).", "See [the site](https://example.org/x)."),
        ("![a picture](docs/a.png)\nText", "Text"),
        ('<img src="a.png">\nText', "Text"),
        ("<!-- demo -->\n\n| a |", "| a |"),
    ],
)
def test_an_index_shows_no_link_into_the_repository(text: str, shown: str) -> None:
    spec = importlib.util.spec_from_file_location("readme_hook", ROOT / "scripts" / "readme.py")
    assert spec is not None and spec.loader is not None
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    assert hook.for_an_index(text) == shown


def test_imports_are_found_within_functions() -> None:
    source = b"import a.b\ndef f():\n    from c.d import e\n    import g\n"
    assert build.imported(source) == {"a", "c", "g"}
