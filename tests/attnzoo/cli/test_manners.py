"""What every command owes its caller: warnings in a line on stderr, a word after Ctrl-C, clean JSON on stdout.

Each command is here by existing: one that is added has to say how to call it.
"""

from __future__ import annotations

import json
import signal
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from attnzoo.cli.app import app
from attnzoo.cli.calls import comparing
from attnzoo.evaluation import compare_picture, cost_setting, layer_costs
from attnzoo.reporting import outputs
from attnzoo_kernels.errors import ConfigError
from tests.attnzoo.cli.cli_support import call, write_model, write_text

COMMANDS = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
LONG_NAME = "A warning of\nmany lines   and blanks"


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    path = tmp_path_factory.mktemp("cli")
    return {
        "model": str(write_model(path / "tiny")),
        "text": write_text(path / "0.txt", 0),
        "other": write_text(path / "1.txt", 1),
    }


CALLS: dict[str, tuple[str, str]] = {
    "list": ("list", "attnzoo.cli.show_view.summaries"),
    "show": ("show mha", "attnzoo.cli.show_view.about"),
    "inspect": ("inspect {model}", "attnzoo.cli.app.load_model"),
    "heads": ("heads {model} --length 4 --picture {out}/made.png", "attnzoo.cli.app.load_model"),
    "convert": ("convert {model} --to mha:window=4,sink=1 --out {out}/made", "attnzoo.surgery.convert"),
    "compare": (
        "compare {model} --variants mha:window=9,sink=2 --text {text} --length 32 --offset 0 --out {out}/made",
        "attnzoo.cli.calls.comparing.load_model",
    ),
    "bench": (
        "bench --variants mha --tokens 8 --dim 8 --heads 2 --seconds 0 --out {out}/made",
        "attnzoo.evaluation.layer_costs.check",
    ),
    "doctor": ("doctor --no-test", "attnzoo.doctor.devices"),
}
"""How each command is called, and something that it calls on its way."""


def test_every_command_is_here() -> None:
    assert set(CALLS) == COMMANDS


def arguments(name: str, places: dict[str, str], out: Path) -> list[str]:
    return CALLS[name][0].format(**places, out=out).split()


def before(target: str, first: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Does something before each call of a function."""
    module, _, name = target.rpartition(".")
    holder = pytest.importorskip(module)
    own = getattr(holder, name)

    def wrapped(*args: Any, **options: Any) -> Any:
        first()
        return own(*args, **options)

    monkeypatch.setattr(holder, name, wrapped)


@pytest.mark.parametrize("name", CALLS)
def test_a_warning_is_one_line_on_stderr(
    name: str,
    places: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def warn() -> None:
        for kind in (UserWarning, RuntimeWarning, UserWarning):
            warnings.warn(LONG_NAME, kind, stacklevel=1)
        warnings.warn("[bold]another[/bold] `one`", FutureWarning, stacklevel=1)

    before(CALLS[name][1], warn, monkeypatch)
    shown = warnings.showwarning
    code, out, err = call(monkeypatch, capsys, *arguments(name, places, tmp_path), "--json")
    assert code == 0, err
    json.loads(out)
    said = [line for line in err.splitlines() if "sink" not in line]
    assert said == [
        "attnzoo: warning: A warning of many lines and blanks",
        "attnzoo: warning: [bold]another[/bold] `one`",
    ]
    assert warnings.showwarning is shown


@pytest.fixture
def ctrl_c_arrives() -> Iterator[None]:
    """A shell starts what it leaves in the background with Ctrl-C ignored, and Python then leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_arrives")
@pytest.mark.parametrize("name", CALLS)
def test_ctrl_c_is_a_line_and_its_exit_code(
    name: str,
    places: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before(CALLS[name][1], partial(signal.raise_signal, signal.SIGINT), monkeypatch)
    code, out, err = call(monkeypatch, capsys, *arguments(name, places, tmp_path))
    assert code == 130
    assert out == ""
    assert err.splitlines() == ["attnzoo: interrupted; what was not finished is not there"]
    assert list(tmp_path.iterdir()) == []


WRITING = {
    "convert": ("safetensors.torch.save_file", "transformers.configuration_utils.PreTrainedConfig.save_pretrained"),
    "compare": ("attnzoo.evaluation.compare_report.markdown", "attnzoo.evaluation.compare_report.picture"),
    "heads": ("attnzoo.heads.scores.picture.picture", "matplotlib.figure.Figure.savefig"),
    "bench": ("attnzoo.evaluation.costs_report.markdown", "attnzoo.evaluation.costs_report.picture"),
}


@pytest.mark.usefixtures("ctrl_c_arrives")
@pytest.mark.parametrize(("name", "target"), [(name, target) for name in WRITING for target in WRITING[name]])
def test_ctrl_c_while_files_are_written_leaves_none(
    name: str,
    target: str,
    places: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module, _, attribute = target.rpartition(".")
    if module.endswith("PreTrainedConfig"):
        from transformers import PreTrainedConfig

        holder: Any = PreTrainedConfig
    else:
        holder = pytest.importorskip(module)
    monkeypatch.setattr(holder, attribute, lambda *_, **__: signal.raise_signal(signal.SIGINT))
    if name == "bench":
        # What is measured does not matter here.
        monkeypatch.setattr(layer_costs, "measure", lambda *_: [cost_setting.Cost("mha")])
    code, _, err = call(monkeypatch, capsys, *arguments(name, places, tmp_path))
    assert code == 130, err
    assert err.splitlines()[-1] == "attnzoo: interrupted; what was not finished is not there"
    assert list(tmp_path.iterdir()) == []


def test_files_appear_together_or_what_was_there_stays(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_text("half", encoding="utf-8")
        raise OSError("no space left")

    out = tmp_path / "new" / "a.b"
    writers = {"json": lambda path: path.write_text("1", encoding="utf-8")}
    outputs.write_together(out, writers)
    assert [path.name for path in out.parent.iterdir()] == ["a.b.json"]
    with pytest.raises(OSError, match="no space"):
        outputs.write_together(out, {"json": lambda path: path.write_text("2", encoding="utf-8"), "md": fail})
    assert [path.name for path in out.parent.iterdir()] == ["a.b.json"]
    assert (out.parent / "a.b.json").read_text(encoding="utf-8") == "1"


@pytest.mark.parametrize("name", ["compare", "bench"])
def test_a_place_that_cannot_be_written_to_is_said_before_the_work(
    name: str,
    places: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    # A file may be run, as a folder may be entered.
    (tmp_path / "file").chmod(0o755)
    monkeypatch.setattr(comparing, "load_model", None)
    monkeypatch.setattr(layer_costs, "measure", None)
    code, _, err = call(monkeypatch, capsys, *arguments(name, places, tmp_path / "file"))
    assert code == 2
    assert err.startswith("attnzoo: out: expected a place in a folder")
    with pytest.raises(ConfigError, match="out"):
        outputs.check_writable(tmp_path / "file" / "deep" / "er")
    outputs.check_writable(tmp_path / "deep" / "er")


def test_the_picture_is_drawn_by_what_the_tests_interrupt() -> None:
    from attnzoo.evaluation import compare_report

    assert compare_report.picture is compare_picture.picture


def test_wrong_calls_are_one_line_and_no_arguments_are_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong in ("show", "bench --tokens many", "bench --tokens", "compare", "list a b"):
        code, out, err = call(monkeypatch, capsys, *wrong.split())
        assert (code, out, len(err.splitlines())) == (2, "", 1), err
        assert err.startswith("attnzoo: ")
        assert "--help" in err
    code, out, err = call(monkeypatch, capsys)
    assert all(name in out + err for name in COMMANDS)
    code, out, _ = call(monkeypatch, capsys, "compare", "--help")
    assert code == 0
    assert "--variants" in out
