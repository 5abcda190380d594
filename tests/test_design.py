"""The reader's walk of docs/design.md is the way that calls take: its functions exist, and are called in its order."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Any

import pytest
import torch

import attnzoo
from attnzoo import surgery
from attnzoo_kernels import clear_memory
from tests.attnzoo.surgery.tiny import calibration, tiny

PAGE = Path(__file__).resolve().parent.parent / "docs" / "design.md"
STEP = re.compile(r"^(\d+)\. `([\w.]+)` \w+", re.MULTILINE)
SHIPPED = [
    name for name in attnzoo.list_variants() if attnzoo.get_config(name).__module__.startswith("attnzoo.variants")
]
TOKENS = {name: {"moh": 512, "longheads": 256, "lowrank_gqa": 16, "rcmha": 32}.get(name, 100) for name in SHIPPED}
"""Enough for each variant's smallest configuration to leave something out, and for rows not to be few."""


def walks() -> dict[str, list[str]]:
    """The functions of each walk, by its heading."""
    _, _, text = PAGE.read_text(encoding="utf-8").partition("## A reader's walk")
    found = {}
    for section in text.split("\n### ")[1:]:
        heading, _, body = section.partition("\n")
        steps = STEP.findall(body)
        assert [int(number) for number, _ in steps] == list(range(1, len(steps) + 1)), heading
        found[heading] = [name for _, name in steps]
    return found


WALKS = walks()
CONVERSION = "a conversion: lowrank_gqa in a Llama"


def resolve(name: str) -> tuple[ModuleType, CodeType]:
    """The module that a dotted name begins with, and the code of the function that it ends in."""
    words = name.split(".")
    for end in range(len(words) - 1, 0, -1):
        try:
            module = importlib.import_module(".".join(words[:end]))
        except ModuleNotFoundError:
            continue
        found: Any = module
        for word in words[end:]:
            found = getattr(found, word)
        function = inspect.unwrap(getattr(found, "__func__", found))
        return module, function.__code__
    raise AssertionError(f"no module in {name}")


def called(run: Callable[[], object]) -> list[CodeType]:
    """What is called while something runs, in order."""
    codes: list[CodeType] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            codes.append(frame.f_code)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(before)
    return codes


def missing(steps: list[str], codes: list[CodeType]) -> list[str]:
    """The first step that is not called behind those before it, and all behind it."""
    rest = iter(codes)
    for number, step in enumerate(steps):
        wanted = resolve(step)[1]
        if not any(code is wanted for code in rest):
            return steps[number:]
    return []


def test_each_variant_and_a_conversion_have_a_walk() -> None:
    assert set(WALKS) == {*SHIPPED, CONVERSION}


@pytest.mark.parametrize("name", WALKS)
def test_a_walk_is_short_and_each_step_is_in_the_file_that_it_names(name: str) -> None:
    assert 5 <= len(WALKS[name]) <= 10
    for step in WALKS[name]:
        module, code = resolve(step)
        assert code.co_filename == module.__file__, step


@pytest.mark.parametrize("name", TOKENS)
def test_a_forward_takes_the_walk(name: str) -> None:
    config = attnzoo.get_config(name).small()
    layer = attnzoo.create(name, **vars(config)).eval()
    x = torch.randn(1, TOKENS[name], config.dim, generator=torch.Generator().manual_seed(0))
    # What is remembered is not made again.
    clear_memory()
    with torch.no_grad():
        codes = called(lambda: layer(x))
    assert not missing(WALKS[name], codes)


def test_a_conversion_takes_the_walk() -> None:
    model = tiny()
    text = calibration()
    codes = called(lambda: surgery.convert(model, "lowrank_gqa", method="commuting", num_kv_heads=1, calibration=text))
    assert not missing(WALKS[CONVERSION], codes)


def test_a_walk_in_another_order_is_noticed() -> None:
    layer = attnzoo.create("mha", dim=32, num_heads=4).eval()
    codes = called(lambda: layer(torch.zeros(1, 4, 32)))
    steps = [f"attnzoo.base.layer.AttentionLayer.{name}" for name in ("begin", "project", "operate")]
    assert not missing(steps, codes)
    assert missing([steps[0], steps[2], steps[1]], codes) == [steps[1]]
    assert missing(["attnzoo.variants.s2.layer.S2Attention.plan"], codes)
