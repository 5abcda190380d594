"""What people type by mistake, on every command: one line that says what to write, and nothing lost or leaked."""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import typer.main

from attnzoo.cli import show_view
from attnzoo.cli.app import app
from attnzoo.cli.entry import main
from attnzoo.cli.manual.options import common_name
from attnzoo.cli.progress import Bar
from attnzoo.factory import read_options
from attnzoo.reporting import outputs
from attnzoo_kernels.errors import ConfigError
from tests.attnzoo.cli.cli_support import call, write_model

GROUP: Any = typer.main.get_command(app)
COMMANDS: dict[str, Any] = GROUP.commands
LENGTHS = ("--length", "32", "--offset", "0")

Run = Callable[..., tuple[int, str, str]]

REQUIRED = {
    "inspect": "MODEL",
    "heads": "MODEL",
    "convert": "MODEL --to mha:window=4,sink=1 --out OUT",
    "compare": "MODEL --variants mha:window=4,sink=1",
    "show": "NAME",
}
"""What commands that must be given something are given."""

OF_MODELS = [name for name in REQUIRED if "MODEL" in REQUIRED[name]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return partial(call, monkeypatch, capsys)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("models") / "tiny"))


def one_line(err: str) -> str:
    (line,) = err.splitlines()
    assert line.startswith("attnzoo: ")
    return line


def test_commands_that_must_be_given_something_are_here() -> None:
    needy = {name for name, command in COMMANDS.items() if any(one.required for one in command.params)}
    assert needy == set(REQUIRED)


@pytest.mark.parametrize("name", COMMANDS)
def test_an_error_is_one_json_value_where_json_is_asked_for(name: str, run: Run) -> None:
    code, out, err = run(name, "--jsno", "--json")
    assert code == 2
    assert json.loads(out) == {"error": one_line(err).removeprefix("attnzoo: "), "exit_code": 2}
    assert "did you mean '--json'" in err
    assert err.strip().endswith(f"see attnzoo {name} --help")


@pytest.mark.parametrize("name", REQUIRED)
def test_what_is_missing_is_named_and_explained(name: str, run: Run) -> None:
    code, out, err = run(name)
    assert (code, out) == (2, "")
    first = REQUIRED[name].split()[0]
    explained = next(one.help for one in COMMANDS[name].params if one.metavar == first)
    assert f"{first}: missing, and must be given: {explained.rstrip('.')}; see" in one_line(err)


NUMBERS = [
    (name, one.opts[0], kind)
    for name, command in COMMANDS.items()
    for one in command.params
    for kind in ("int", "float")
    if one.param_type_name == "option" and kind in str(get_type_hints(command.callback)[one.name]) and not one.is_flag
]


@pytest.mark.parametrize(("name", "option", "kind"), NUMBERS)
def test_a_number_that_is_none_is_named_with_what_was_typed(name: str, option: str, kind: str, run: Run) -> None:
    given = REQUIRED.get(name, "").split()
    for spelt in ((option, "[b]many[/b]"), (f"{option}=[b]many[/b]",)):
        code, out, err = run(name, *given, *spelt)
        assert (code, out) == (2, "")
        expected = "a whole number" if kind == "int" else "a number"
        assert f"{option}: expected {expected}, got '[b]many[/b]'; see" in one_line(err)
    code, _, err = run(name, *given, option)
    assert code == 2
    assert f"{option}: expected a value behind it, got none; see attnzoo {name} --help" in one_line(err)


@pytest.mark.parametrize("name", OF_MODELS)
def test_what_is_no_model_is_named_as_it_was_typed(name: str, run: Run, tmp_path: Path) -> None:
    empty = tmp_path / "[red]empty"
    empty.mkdir()
    file = tmp_path / "notes.txt"
    file.write_text("", encoding="utf-8")
    gguf = tmp_path / "[b].gguf"
    gguf.write_bytes(b"")
    odd = empty / "odd"
    odd.mkdir()
    (odd / "config.json").write_text("{", encoding="utf-8")
    for path in (empty, file, gguf, odd, tmp_path / "[not]here"):
        line = REQUIRED[name].replace("MODEL", str(path)).replace("OUT", str(tmp_path / "out"))
        code, out, err = run(name, *line.split())
        assert code in (1, 2)
        assert out == ""
        assert str(path) in one_line(err)
    assert not (tmp_path / "out").exists()


WRONG: tuple[tuple[str, str], ...] = (
    ("list no*", "pattern: expected one that matches some of landmark,"),
    ("list low", "did you mean '*low*'?"),
    ("list snapvk --policies", "did you mean 'snapkv'?"),
    ("show SnapKV", "did you mean 'snapkv'?"),
    ("show [b]x[/b]", "got '[b]x[/b]'"),
    ("help", "did you mean '--help'?"),
    ("version", "did you mean '--version'?"),
    ("show s2 --debug", "--debug: stands before the command: attnzoo --debug show"),
    ("show s2 moh", "moh: one word too many"),
    ("compare x --variants mha,s2", "variants: expected one name and its options, got 'mha,s2'"),
    ("bench --variants mha,s2", "variants: expected one name and its options, got 'mha,s2'"),
    ("compare x --variants s2:", "variants: expected s2:name=value,..., got 's2:'"),
    ("compare x --variants :block_size=3", "variants: expected name:option=value,..."),
    ("compare x --variants mha:window=4,window=5", "variants: expected 'window' once"),
    ("compare x --variants policy", "'policy' is no variant: --policy of attnzoo compare"),
    ("compare x --variants mha --passkeys 4", "passkeys: expected nothing but beside policies"),
    ("compare x --policy duo --calibrate devil", "calibrate: expected nothing beside policies"),
    ("compare x --variants mha --threads 0", "threads: expected at least 1, got 0"),
    ("compare x --variants mha:window=4,sink=1 --device gpu", "device: expected cpu, cuda or cuda:<number>, got 'gpu'"),
    (
        "compare x --variants mha:window=4,sink=1 --device cuda:99",
        "device: expected one that torch finds, got 'cuda:99'",
    ),
    ("compare x --variants mha:window=4,sink=1 --dtype bflot16", "did you mean 'bfloat16'"),
    ("convert x --to heads --out y", "to: 'heads' is no variant"),
    ("convert x --to duo --out y", "use --policy duo of attnzoo compare"),
    ("convert x --to dnse --out y", "expected one of variants landmark,"),
    ("convert x --to mha:window=4,sink=1 --out y --where 3-1", "where: expected spans"),
)


@pytest.mark.parametrize(("line", "said"), WRONG, ids=[line for line, _ in WRONG])
def test_a_mistake_is_answered_with_what_to_write(line: str, said: str, run: Run) -> None:
    code, out, err = run(*line.split())
    assert (code, out) == (2, "")
    assert said in one_line(err)


def test_an_option_that_changes_nothing_is_warned_of(run: Run, model: str, tmp_path: Path) -> None:
    given = ("--to", "mha:window=4,sink=1", "--out", tmp_path / "out", "--windows", 4)
    code, _, err = run("convert", model, *given)
    assert code == 0
    said = "attnzoo: warning: windows: not used: mha:window=4,sink=1 reads no calibration text"
    assert said in err.splitlines()
    code, _, err = run("convert", model, *given[:-2], "--overwrite")
    assert (code, err) == (0, "")


def test_spaces_round_options_mean_nothing() -> None:
    assert read_options("mha: window = 4, sink=1", "to") == {"window": 4, "sink": 1}
    with pytest.raises(ConfigError, match="to: expected mha:name=value"):
        read_options("mha:window=4,", "to")


@pytest.mark.parametrize("line", ["list", "list --json", "show mha", "--help", "--version"])
def test_a_reader_that_has_gone_ends_a_command_without_a_word(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    end, start = os.pipe()
    os.close(end)
    monkeypatch.setattr(sys, "argv", ["attnzoo", *line.split()])
    with os.fdopen(start, "w", encoding="utf-8", buffering=1) as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 141
    assert capsys.readouterr().err == ""


def test_a_terminal_of_few_signs_is_shown_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "argv", ["attnzoo", "list"])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert raw.getvalue().decode("ascii").splitlines()[1].strip("?") == ""
    assert b"lowrank_gqa" in raw.getvalue()


def test_an_error_of_ours_is_one_line_that_says_how_to_see_more(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("[b]x")

    monkeypatch.setattr(show_view, "summaries", fail)
    code, out, err = run("list")
    assert (code, out) == (1, "")
    assert one_line(err) == "attnzoo: KeyError: '[b]x'; attnzoo --debug list shows where"
    monkeypatch.setattr(sys, "argv", ["attnzoo", "--debug", "list"])
    with pytest.raises(KeyError):
        main()


def test_results_are_named_by_what_their_files_share() -> None:
    for ending in (".json", ".md", ".png"):
        assert common_name(Path(f"a/b.c{ending}")) == Path("a/b.c")
    assert common_name(Path("a/b.c")) == Path("a/b.c")
    assert common_name(None) is None


def test_a_disk_that_takes_no_files_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", refuse)
    with pytest.raises(ConfigError, match="out: expected a place in a folder"):
        outputs.check_writable(tmp_path / "x")
    with pytest.raises(OSError, match="takes no files: Read-only file system"):
        outputs.check_place(tmp_path / "x")


@pytest.mark.parametrize("width", [40, 60, 120])
def test_progress_says_what_is_done_in_one_line(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with Bar() as progress:
        progress("[red]reading[/red] x", 0, 0)
    out, err = capsys.readouterr()
    assert out == ""
    assert "[red]reading[/red] x" in err
    assert "0/" not in err


def test_reading_a_model_is_shown(
    run: Run, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[tuple[str, int, int]] = []
    monkeypatch.setattr(Bar, "__call__", lambda _, *what: said.append(what))
    code, _, err = run("inspect", model)
    assert (code, err) == (0, "")
    assert said == [(f"reading {model}", 0, 0)]
