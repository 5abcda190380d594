"""Everything that commands print, at the widths of terminals: no word is lost, no line is too long, no markup leaks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

import attnzoo
from attnzoo import surgery
from attnzoo.cli import doctor_view, prose, show_view
from attnzoo.doctor import Device, Finding, Report
from attnzoo.evaluation import compare_report, cost_setting, costs_report, layer_costs
from attnzoo.evaluation.compare import Comparison, LongDecoding
from attnzoo.evaluation.two_phase.specs import PolicyPart, offered
from attnzoo.reporting.tables import Grid, lines
from attnzoo.surgery.options import options_of
from attnzoo_kernels.errors import UnsupportedError
from attnzoo_kernels.selftest import Check
from tests.attnzoo.cli.cli_support import call, write_model

WIDTHS = (40, 60, 80, 120)
RESULTS = Path(__file__).resolve().parents[3] / "bench" / "results"
SAYING = "A text of several words that is wider than any terminal here, so that it has to be folded, " * 2
LONG = "longheads:attention_length=512,chunk_size=64,select=block"


def comparison() -> Comparison:
    found = compare_report.read((RESULTS / "smollm2-demo.json").read_text(encoding="utf-8"))
    row = replace(found.rows[0], name=LONG, longer=[LongDecoding(4096, 123.4, 0.567, 12345)])
    return Comparison(found.about, [*found.rows, row])


def measured() -> Grid:
    kinds = dict.fromkeys(cost_setting.KINDS, 123.456)
    found = [cost_setting.Cost(name, 0.5, 1e-6, 8, None, kinds, kinds) for name in (*layer_costs.SPECS, LONG)]
    return costs_report.grid(
        [*found, cost_setting.Cost("broken", problem="wrong")], costs_report.about(cost_setting.CostSetting())
    )


def report() -> Grid:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=7, num_hidden_layers=2, **sizes))
    return surgery.convert(model, "mha", window=4, sink=1).grid()


def checks() -> Grid:
    found = [Check("cpu", impl, "float32", "gate and window", "dq", 1e-6, 1e-5, None) for impl in ("blocked", "triton")]
    return doctor_view._checks([*found, Check("cpu", "reference", "bfloat16", "plain", "", 0.0, 0.0, "died")])


GRIDS: dict[str, Callable[[], Grid]] = {
    "compare": lambda: compare_report.grid(comparison()),
    "compare, longer prompts": lambda: compare_report.long_grids(comparison())[0],
    "bench": measured,
    "convert": report,
    "doctor": checks,
    "prose": lambda: Grid(
        ("name", "n", "text"),
        [("a", "1 234 567 890 123 456 789", SAYING), ("b c", "12", SAYING)],
        numbers=frozenset({1}),
    ),
    "empty cells": lambda: Grid(("a", "b", "c"), [("", "", ""), ("x", "", "1")], numbers=frozenset({2})),
    "no rows": lambda: Grid(("a", "b"), []),
    "one column": lambda: Grid(("name",), [("word " * 30,), ("w" * 130,)]),
    "one long word": lambda: Grid(("name", "n", "text"), [("w" * 130, "1", "x" * 70)], "t" * 150, "c " * 90),
}


def words(texts: list[str]) -> Counter[str]:
    return Counter(word for text in texts for word in text.split())


def assert_all_there(wanted: list[str], printed: list[str], width: int) -> None:
    """Every word is there as often as it should be; one that is longer than a line may go on in the next."""
    assert max(map(len, printed), default=0) <= width
    found, run_on = words(printed), "".join("".join(printed).split())
    for word, count in words(wanted).items():
        if len(word) <= width - 4:
            assert found[word] >= count, word
        else:
            assert word in run_on, word


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", GRIDS)
def test_a_table_loses_nothing(name: str, width: int) -> None:
    grid = GRIDS[name]()
    # Below each other, two columns of one name could not be told apart.
    assert len(set(grid.heads)) == len(grid.heads)
    printed = [line for line, _ in lines(grid, width)]
    cells = [cell for row in grid.rows for cell in row]
    in_columns = any(set(line) == {"─"} for line in printed)
    if not in_columns:
        # Listed, a head stands before each cell that says something.
        named = [
            f"{head}: {cell}" for row in grid.rows for head, cell in list(zip(grid.heads, row, strict=True))[1:] if cell
        ]
        cells = [*named, *(row[0] for row in grid.rows)]
    assert_all_there([*cells, *(grid.heads if in_columns else ()), grid.title, grid.caption], printed, width)
    if in_columns:
        # Numbers are never folded, whatever blanks they have.
        numbers = [row[i] for row in grid.rows for i in grid.numbers]
        assert all(any(number in line for line in printed) for number in numbers)


@pytest.mark.parametrize(("name", "width"), [("compare", 120), ("bench", 140), ("convert", 80), ("doctor", 120)])
def test_wide_tables_are_columns_and_narrow_ones_are_lists(name: str, width: int) -> None:
    grid = GRIDS[name]()
    assert any(set(line) == {"─"} for line, _ in lines(grid, width))
    assert not any(set(line) == {"─"} for line, _ in lines(grid, 24))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


MARKUP = ("`", "\\", ":math:", ":class:", ":mod:", "::", "[/", "**kwargs")


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """What a command prints at a width."""

    def run(width: int, *arguments: object) -> list[str]:
        monkeypatch.setenv("COLUMNS", str(width))
        code, out, err = call(monkeypatch, capsys, *arguments)
        assert code == 0, err
        return out.splitlines()

    return run


@pytest.mark.parametrize("width", WIDTHS)
def test_list_and_inspect_fit(width: int, at: Callable[..., list[str]], folder: Path) -> None:
    about = show_view.summaries("*")
    printed = at(width, "list")
    assert_all_there([*about, *about.values(), "variant"], printed, width)
    assert not any(mark in line for mark in MARKUP for line in printed)
    printed = at(width, "inspect", folder)
    wanted = ["model.layers.0.self_attn", "model.layers.1.self_attn", "llama", "256", "KV"]
    assert_all_there(wanted, printed, width)


@pytest.mark.parametrize("name", attnzoo.list_variants())
def test_show_says_everything_without_markup(name: str, at: Callable[..., list[str]]) -> None:
    found = show_view.about(name)
    try:
        assert found["conversion"] == options_of(name)
    except UnsupportedError:
        assert found["conversion"] is None
    for width in WIDTHS:
        printed = at(width, "show", name)
        wanted = [found["about"], *found["options"], *(found["conversion"] or {})]
        assert_all_there(wanted, printed, width)
        assert not any(mark in line for mark in MARKUP for line in printed), [
            line for line in printed if any(mark in line for mark in MARKUP)
        ]
    # An option without a word about it would be a riddle.
    assert all(row[2] for grid in show_view.grids(found) for row in grid.rows)


@pytest.mark.parametrize("name", offered())
def test_show_says_what_a_policy_does_without_markup(name: str, at: Callable[..., list[str]]) -> None:
    found = show_view.about(name)
    for width in WIDTHS:
        printed = at(width, "show", name)
        assert_all_there([found["about"], *found["options"], found["page"]], printed, width)
        read = "\n".join(printed)
        assert not re.search(r"[`\\&]|::|frac\b|mathrm|[lr]Vert|[Bb]igg?[lr]?\(", read), read
    assert all(row[2] for grid in show_view.grids(found) for row in grid.rows)
    given = {key: value for key, value in found["options"].items() if value is not None}
    if {"budget", "share"} <= found["options"].keys() - given.keys():
        given["share"] = 0.4
    PolicyPart(name, given).check()


def test_a_page_is_where_show_says() -> None:
    for name in (*attnzoo.list_variants(), *offered()):
        assert (RESULTS.parents[1] / show_view.about(name)["page"]).is_file(), name


def test_list_knows_policies(at: Callable[..., list[str]]) -> None:
    for width in WIDTHS:
        about = show_view.policy_summaries("*")
        assert set(about) == set(offered())
        assert_all_there([*about, *about.values()], at(width, "list", "--policies"), width)


def test_fractions_stand_in_one_line() -> None:
    text = r":math:`\frac{1}{n} \sum_j \frac{\sum_{i \in J(c)} m_i}{|\{i\}|}, \hat k \mathrm{kmin}`"
    assert prose.words(text) == "(1 / n) Σ_j ((Σ_(i ∈ J(c)) m_i) / (|{i}|)), k\u0302 kmin"


def test_show_tells_what_a_conversion_takes(at: Callable[..., list[str]]) -> None:
    printed = at(80, "show", "lowrank_gqa")
    place = next(i for i, line in enumerate(printed) if line.startswith("In a pretrained model"))
    for option in ("method", "num_kv_heads", "latent_dim", "refit", "gradients"):
        assert any(line.startswith(f"{option} ") for line in printed[place:]), option
    assert any("required" in line for line in printed[place:])


def test_prose_has_no_markup_left() -> None:
    text = r"Uses ``a_b``, :class:`~x.Y`, :mod:`x.y`, *a title*, :math:`\bar q_c \le S_{max}`; 2 * 3 * 4, **options."
    assert prose.words(text) == "Uses a_b, Y, x.y, a title, q̄_c ≤ S_(max); 2 * 3 * 4, **options."


def reports() -> Iterator[Report]:
    facts: dict[str, Any] = {"model": "A processor of many words", "features": ["avx2", "avx512"], "threads": 2}
    device = Device("cpu", facts, "blocked", {"triton": ("no GPU is here", "and no interpreter")})
    finding = Finding("note", "something [worth] knowing, at some length", "none needed")
    yield Report({"torch": "2.13", "triton": None}, [device], [finding], [], {"looking": 0.1})


@pytest.mark.parametrize("width", WIDTHS)
def test_the_doctor_fits(width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    for found in reports():
        doctor_view.show(found)
        printed = capsys.readouterr().out.splitlines()
        wanted = ["A processor of many words", "avx2, avx512", "no GPU is here; and no interpreter", "missing"]
        assert_all_there([*wanted, found.findings[0].what, "none needed)"], printed, width)
