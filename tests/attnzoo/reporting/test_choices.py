"""A slip in a name is answered with the name that was meant: variants, options, conversions, words, commands.

What comes later is under this by existing: names are read off the registry, configurations, surgery and the commands.
"""

from __future__ import annotations

import sys
import types
import typing
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

import attnzoo
from attnzoo import data, surgery
from attnzoo.base import rope
from attnzoo.base.config import AttentionConfig
from attnzoo.base.registry import variants
from attnzoo.cli import main
from attnzoo.cli.app import app
from attnzoo.evaluation.compare import PRESETS, VariantSpec
from attnzoo.factory import read_spec
from attnzoo.surgery.lowrank import factor
from attnzoo.surgery.options import options_of
from attnzoo_kernels.errors import ConfigError, UnsupportedError

VARIANTS = attnzoo.list_variants()
SIZES = {"dim": 32, "num_heads": 4}


def slips(name: str) -> list[str]:
    """Other cases, and each way to leave out one letter."""
    shorter = [name[:i] + name[i + 1 :] for i in range(len(name))] if len(name) > 1 else []
    return [slip for slip in dict.fromkeys([name.upper(), name.title(), *shorter]) if slip not in ("", name)]


def expect(call: Callable[[], Any], meant: str, slip: str) -> None:
    with pytest.raises(ConfigError) as raised:
        call()
    _, asked, near = str(raised.value).partition("; did you mean ")
    assert asked, f"{slip}: {raised.value}"
    assert repr(meant) in near, f"{slip}: {raised.value}"


@pytest.mark.parametrize("name", VARIANTS)
def test_a_slip_in_a_variant_is_understood(name: str) -> None:
    classes = (variants[name].__name__, attnzoo.get_config(name).__name__)
    for slip in (*slips(name), name.replace("_", "-") + "x", *classes):
        if slip in VARIANTS:
            continue
        for call in (attnzoo.get_config, read_spec, VariantSpec.parse, lambda slip: attnzoo.create(slip, **SIZES)):
            expect(lambda call=call, slip=slip: call(slip), name, slip)
        if slip not in classes:
            expect(lambda slip=slip: AttentionConfig.from_dict({"kind": slip, **SIZES}), name, slip)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_slip_in_an_option_of_a_layer_is_understood(name: str) -> None:
    config = attnzoo.get_config(name)
    known = {field.name for field in fields(config)}
    for option in known:
        for slip in slips(option):
            if slip in known:
                continue
            expect(lambda slip=slip: attnzoo.create(name, **SIZES, **{slip: 1}), option, slip)
            expect(lambda slip=slip: config.from_dict({"kind": name, **SIZES, slip: 1}), option, slip)
            expect(lambda slip=slip: attnzoo.create(config(**SIZES), **{slip: 1}), option, slip)


def words(hint: Any) -> list[str]:
    """The words that an annotation allows."""
    if typing.get_origin(hint) is typing.Literal:
        return [word for word in typing.get_args(hint) if isinstance(word, str)]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [word for part in typing.get_args(hint) for word in words(part)]
    return []


@pytest.mark.parametrize("name", VARIANTS)
def test_a_slip_in_a_word_is_understood(name: str) -> None:
    config = attnzoo.get_config(name)
    for option, hint in typing.get_type_hints(config).items():
        for word in words(hint):
            for slip in slips(word):
                expect(lambda option=option, slip=slip: config(**SIZES, **{option: slip}), word, slip)


@pytest.fixture(scope="module")
def model() -> Any:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 8}
    return LlamaForCausalLM(LlamaConfig(vocab_size=7, num_hidden_layers=1, **sizes))


def convertible() -> list[str]:
    found = []
    for name in VARIANTS:
        try:
            options_of(name)
        except UnsupportedError:
            continue
        found.append(name)
    return found


@pytest.mark.parametrize("name", convertible())
def test_a_slip_in_an_option_of_a_conversion_is_understood(name: str, model: Any) -> None:
    known = options_of(name)
    assert known
    for option in known:
        for slip in slips(option):
            if slip not in known:
                expect(lambda slip=slip: surgery.convert(model, name, **{slip: 1}), option, slip)


@pytest.mark.parametrize(
    ("call", "known"),
    [
        (lambda word: factor.Request(method=word), factor.METHODS),
        (data.text, data.TEXTS),
        (lambda word: rope.RotaryScaling(kind=word), rope._NEEDS),
        (lambda word: rope.RotaryConfig.from_parameters({"rope_type": word}), rope._NEEDS),
    ],
    ids=["method", "text", "rotary scaling", "rope_type"],
)
def test_a_slip_in_another_word_is_understood(call: Callable[[str], Any], known: tuple[str, ...]) -> None:
    for word in known:
        for slip in slips(word):
            expect(lambda slip=slip: call(slip), word, slip)


def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["attnzoo", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, err
    return err


COMMANDS = {str(command.name or command.callback.__name__): command for command in app.registered_commands}


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_slip_on_the_command_line_is_understood(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import typer.main

    command = typer.main.get_command(app).commands[name]
    for slip in slips(name):
        assert f"'{name}'" in said(monkeypatch, capsys, slip), slip
    options = [text for parameter in command.params for text in parameter.opts if text.startswith("--")]
    assert "--json" in options
    for option in options:
        for slip in (f"--{option[2:-1]}", option.upper()):
            if slip not in options:
                assert f"'{option}'" in said(monkeypatch, capsys, name, slip, "1"), slip


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (("compare", "x", "--preset", "Demo"), next(iter(PRESETS))),
        (("compare", "x", "--variants", "Dense"), "dense"),
        (("bench", "--dtype", "bflot16"), "bfloat16"),
        (("bench", "--impl", "bloked"), "blocked"),
        (("bench", "--variants", "MHA"), "mha"),
        (("show", "MoHAttention"), "moh"),
        (("inspect", "Smolm2"), "smollm2"),
    ],
    ids=" ".join,
)
def test_a_slip_in_a_value_is_understood(
    arguments: tuple[str, ...], meant: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"did you mean '{meant}'" in said(monkeypatch, capsys, *arguments)
