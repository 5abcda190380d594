"""The tables of README and docs are those of the results that are committed."""

from __future__ import annotations

from pathlib import Path

import pytest

import attnzoo
from attnzoo.evaluation.layer_costs import SPECS
from bench import pages

BLOCKS = pages.blocks()
SHIPPED = [
    name for name in attnzoo.list_variants() if attnzoo.get_config(name).__module__.startswith("attnzoo.variants")
]


@pytest.mark.parametrize(("page", "name"), BLOCKS, ids=" ".join)
def test_a_table_is_that_of_the_results(page: str, name: str) -> None:
    text = (pages.ROOT / page).read_text(encoding="utf-8")
    assert pages.replaced(text, name, BLOCKS[page, name]) == text, "python -m bench.pages writes it anew"


def test_every_variant_has_its_table_and_every_layer_its_row() -> None:
    assert {page for page, name in BLOCKS if name == "crossover"} == {
        "README.md", "docs/choosing.md", *(f"docs/variants/{variant}.md" for variant in SHIPPED)
    }  # fmt: skip
    rows = BLOCKS["README.md", "crossover"]
    assert [line.split("`")[1] for line in rows if line.startswith("| `")] == list(SPECS)


def test_a_block_is_replaced_and_nothing_else() -> None:
    text = "before\n<!-- x -->\nold\n<!-- /x -->\nafter\n"
    once = pages.replaced(text, "x", ["new", "lines"])
    assert once == "before\n<!-- x -->\n\nnew\nlines\n\n<!-- /x -->\nafter\n"
    assert pages.replaced(once, "x", ["new", "lines"]) == once
    for wrong in ("no block", "<!-- x -->\n", text + text):
        with pytest.raises(ValueError, match="expected one block"):
            pages.replaced(wrong, "x", [])


def test_the_command_writes_where_it_is_told_to(tmp_path: Path) -> None:
    for page, name in BLOCKS:
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        with (tmp_path / page).open("a", encoding="utf-8") as file:
            file.write(f"<!-- {name} -->\n<!-- /{name} -->\n")
    pages.main(out=tmp_path)
    for (page, _), lines in BLOCKS.items():
        assert "\n".join(lines) in (tmp_path / page).read_text(encoding="utf-8")
