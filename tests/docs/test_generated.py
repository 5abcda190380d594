"""What pages say of options and commands is read from the packages, all of it is there, and each has a meaning."""

from __future__ import annotations

import ast
import doctest
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

import attnzoo
from attnzoo.cache.policies.protocol import policies
from attnzoo_docs import built, check, commands, mathml
from attnzoo_docs import options as tables
from attnzoo_kernels.errors import ConfigError

DOCS = Path(__file__).resolve().parents[2] / "docs"
SHIPPED = [
    name for name in attnzoo.list_variants() if attnzoo.get_config(name).__module__.startswith("attnzoo.variants")
]
POLICIES = [name for name, made in policies.items() if made.__module__.startswith("attnzoo.cache.policies")]
SUBJECTS = [
    "shared",
    "class attnzoo.RotaryConfig",
    "class attnzoo.RotaryScaling",
    *(f"{kind} {name}" for name in SHIPPED for kind in ("variant", "conversion")),
]


def subjects(page: str) -> list[str]:
    text = (DOCS / "reference" / page).read_text(encoding="utf-8")
    return re.findall(r"^\.\. (?:options|command)-table:: (.+)$", text, re.MULTILINE)


def test_every_subject_has_its_table() -> None:
    assert sorted(subjects("options.md")) == sorted(SUBJECTS)
    assert sorted(subjects("policy-options.md")) == sorted(f"policy {name}" for name in POLICIES)
    assert sorted(subjects("command-line.md")) == sorted(commands.commands())


@pytest.mark.parametrize("subject", [*SUBJECTS, *(f"policy {name}" for name in POLICIES)])
def test_every_option_has_a_meaning(subject: str) -> None:
    found = tables.options(subject)
    assert found
    assert [option.name for option in found if not option.meaning.strip()] == []


@pytest.mark.parametrize("name", sorted(commands.commands()))
def test_every_argument_and_flag_has_a_meaning(name: str) -> None:
    assert commands.commands()[name].help
    assert [spelt for spelt, _, meaning in commands.parameters(name) if not meaning.strip()] == []


def test_options_are_those_that_are_taken_with_their_defaults() -> None:
    found = {option.name: option for option in tables.options("variant s2")}
    assert found["vert_stride"].default == "8"
    assert "dim" not in found and "dim" in {option.name for option in tables.options("shared")}
    # What a variant says otherwise stands with the variant too.
    assert {option.name for option in tables.options("variant lowrank_gqa")} == {"num_kv_heads", "latent_dim"}
    # A conversion begins as the same function.
    assert {option.name: option.default for option in tables.options("conversion s2")}["sink_blocks"] == "1"
    assert tables.options("policy duo")[0].default == "required"
    assert {option.default for option in tables.options("shared") if option.name == "rotary"} == {"RotaryConfig()"}
    with pytest.raises(ConfigError, match="subject: expected"):
        tables.options("colour s2")


def test_a_meaning_that_is_missing_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass
    class Settings:
        """Settings.

        Attributes:
            told: What it is.
        """

        told: int = 1
        untold: int = 2

    monkeypatch.setattr(attnzoo, "Settings", Settings, raising=False)
    found = tables.options("class attnzoo.Settings")
    assert [(option.name, option.meaning) for option in found] == [("told", "What it is."), ("untold", "")]


def test_a_command_is_told_as_it_is_called() -> None:
    assert commands.usage("convert") == "attnzoo convert MODEL --to VARIANT:OPTION=VALUE,... --out FOLDER [OPTIONS]"
    found = {spelt: default for spelt, default, _ in commands.parameters("bench")}
    assert found["--tokens N"] == "2048"
    assert found["--out OUT"] == ""
    assert {spelt: default for spelt, default, _ in commands.parameters("doctor")}["--test/--no-test"] == "--test"


@pytest.mark.parametrize(
    ("latex", "parts"),
    [
        (r"a = b, \qquad c = d", ["a = b,", "c = d"]),
        (r"a \quad \text{if } b", ["a", r"\text{if } b"]),
        # Within braces, brackets that grow and environments a formula stays whole.
        (r"\frac{a \quad b}{c}", [r"\frac{a \quad b}{c}"]),
        (r"\left[ a \quad b \right] \leftarrow c", [r"\left[ a \quad b \right] \leftarrow c"]),
        (r"\{ a \quad b", [r"\{ a", "b"]),
        (
            r"\begin{cases} a \quad b \\ c & d \end{cases} \qquad e",
            [r"\begin{cases} a \quad b \\ c & d \end{cases}", "e"],
        ),
        (r"a & = b \\ & = c", [r"\begin{aligned}a & = b \\ & = c\end{aligned}"]),
    ],
)
def test_a_formula_is_parted_at_its_wide_spaces_alone(latex: str, parts: list[str]) -> None:
    assert mathml.lines(latex) == parts


def hand_written(page: Path) -> list[tuple[str, str]]:
    """Options and defaults of a page's own table, which says them in the letters of its formulas."""
    found: list[tuple[str, str]] = []
    for names, cell in re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| .* \| (.+) \|$", page.read_text("utf-8"), re.MULTILINE):
        options = re.findall(r"`(\w+)`", names)
        cells = cell.split(", ") if len(options) > 1 and cell.count(", ") == len(options) - 1 else [cell] * len(options)
        found += zip(options, (one.strip("`") for one in cells), strict=True)
    return found


@pytest.mark.parametrize(
    ("subject", "page"),
    [
        *((f"variant {name}", DOCS / "variants" / f"{name}.md") for name in SHIPPED),
        *((f"policy {name}", DOCS / "policies" / f"{name}.md") for name in POLICIES if name != "compose"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_table_in_a_pages_own_letters_names_the_same_options_and_defaults(subject: str, page: Path) -> None:
    given = {option.name: option.default for option in tables.options(subject)}
    told = hand_written(page)
    for name, cell in told:
        try:
            value = ast.literal_eval(cell.partition(":")[0].strip("`"))
        except (SyntaxError, ValueError):
            # Words stand for what a layer works out where nothing is said.
            assert given[name] in ("None", "required"), f"{page.name}: {name}"
        else:
            assert value == ast.literal_eval(given[name]), f"{page.name}: {name}"
    if told and subject.startswith("variant"):
        assert sorted(name for name, _ in told) == sorted(given)
    text = page.read_text(encoding="utf-8")
    assert told or f".. options-table:: {subject}" in text
    assert f"options.md#{subject.partition(' ')[2]})" in text


@pytest.mark.parametrize(
    ("latex", "drawn"),
    [
        # Functions stand apart from what they are of, unless that is in brackets.
        (r"a \sin i", r"a \, \sin \, i"),
        (r"\log_2 l", r"\log_2 \, l"),
        (r"\log (e)", r"\log (e)"),
        ("a \\vee\\\n(b)", r"a \vee \ (b)"),
        (r"\{ s : s < t \}", r"\{ s \,:\, s < t \}"),
    ],
)
def test_spaces_stand_where_the_converter_leaves_them_out(latex: str, drawn: str) -> None:
    assert mathml.drawn(latex, block=False) == mathml.convert(drawn)


def test_what_the_converter_leaves_out_is_put_in() -> None:
    # A differential is upright, a bar as wide as what is below it.
    assert "<mtext>d</mtext>" in mathml.drawn(r"\mathrm{d}x", block=False)
    assert mathml.WIDE_BAR in mathml.drawn(r"\overline{ab}", block=True)
    assert 'display="block"' in mathml.drawn("x", block=True)


@pytest.mark.parametrize("module", [built, check, commands, mathml, tables], ids=lambda module: module.__name__)
def test_examples_in_docstrings_are_true(module: ModuleType) -> None:
    assert doctest.testmod(module).failed == 0
