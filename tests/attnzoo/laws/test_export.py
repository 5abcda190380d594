"""Exported layers: one program for all lengths, on both sides of every block."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim, export

import attnzoo
from tests.attnzoo.cases import Case, assert_same, build, tokens

MOST = 512
LENGTHS = (2, 3, 8, 17, 40, 63, 64, 65, 100, 129, 300, MOST)
QUICK = ("mha",)
"""Of the others, tests take minutes on a busy machine."""


def program(layer: Any, *, padded: bool = False, strict: bool = False) -> Any:
    """The layer as it is exported from 40 tokens for 2 to 512."""
    length = Dim("T", min=2, max=MOST)
    more = {"key_padding": torch.zeros(2, 40, dtype=torch.bool)} if padded else {}
    shapes = {"x": {1: length}, **{name: {1: length} for name in more}}
    return export(layer, (tokens(layer, 2, 40),), more, dynamic_shapes=shapes, strict=strict).module()


def assert_serves_all_lengths(layer: Any, served: Any, *, padded: bool) -> None:
    for length in LENGTHS:
        x = tokens(layer, 2, length)
        more: dict[str, Tensor] = {}
        if padded:
            more["key_padding"] = torch.arange(length) < torch.tensor([[0], [length // 2]])
        assert_same(served(x, **more), layer(x, **more))


def cases() -> list[Any]:
    """Every variant at its defaults and small, with padding or without; one of each is quick enough for every day."""
    found = []
    for name in attnzoo.list_variants():
        for size in ("defaults", "small"):
            for padded in (False, True):
                often = size == "small" and padded == (name == "mha") and name in QUICK
                found.append(pytest.param(Case(name, size), padded, marks=[] if often else [pytest.mark.slow]))
    return found


@pytest.mark.parametrize(("case", "padded"), cases(), ids=str)
@torch.no_grad()
def test_one_program_serves_all_lengths(case: Case, padded: bool) -> None:
    layer = case.layer()
    assert_serves_all_lengths(layer, program(layer, padded=padded), padded=padded)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mha", {"window": 20, "sink": 3}),
        ("mha", {"causal": False}),
        ("mha", {"causal": False, "window": 9}),
        ("s2", {"causal": False}),
        ("moh", {"window": 20, "sink": 3}),
        ("rcmha", {"rel": "learned", "max_distance": 20}),
        ("landmark", {"mode": "soft"}),
        ("landmark", {"landmark_positions": False, "official_quirks": True}),
        ("landmark", {"rotary": None}),
        ("longheads", {"select": "block", "chunk_rep": "mean_key"}),
        ("longheads", {"group_select": True, "num_kv_heads": 2, "begin": 64}),
        ("longheads", {"official_quirks": True}),
    ],
    ids=str,
)
@pytest.mark.slow
@torch.no_grad()
def test_options_are_served_too(name: str, options: dict[str, Any]) -> None:
    layer = build(replace(attnzoo.get_config(name).small(), **options))
    assert_serves_all_lengths(layer, program(layer), padded=False)


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("landmark", "longheads", "mha") else pytest.param(name, marks=pytest.mark.slow)
        for name in attnzoo.list_variants()
    ],
)
@torch.no_grad()
def test_the_reference_is_plain_torch_at_any_length(name: str) -> None:
    layer = Case(name, "small").layer()
    layer.impl = "reference"
    if name in ("landmark", "longheads"):
        with pytest.raises(
            attnzoo.UnsupportedError, match=rf"^x: expected a length that is known, since {name} chooses"
        ):
            program(layer)
        return
    served = program(layer)
    assert not [node for node in served.graph.nodes if "attnzoo" in str(node.target)]
    assert_serves_all_lengths(layer, served, padded=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", attnzoo.list_variants())
@torch.no_grad()
def test_one_length_is_exported_as_it_is(name: str) -> None:
    layer = Case(name, "small").layer()
    x = tokens(layer, 2, 61)
    assert_same(export(layer, (x,)).module()(x), layer(x))


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="no C++ compiler")
@pytest.mark.parametrize("impl", ["auto", "reference"])
@torch.no_grad()
def test_what_is_exported_is_compiled_ahead_of_time(impl: str, tmp_path: Path) -> None:
    layer = Case("mha", "small").layer()
    layer.impl = impl
    x = tokens(layer, 2, 61)
    path = torch._inductor.aoti_compile_and_package(export(layer, (x,)), package_path=str(tmp_path / "layer.pt2"))
    assert_same(torch._inductor.aoti_load_package(path)(x), layer(x))


def test_blocks_too_large_to_fill_are_refused() -> None:
    layer = attnzoo.create("mha", dim=16, num_heads=2, block_size=5000)
    with pytest.raises(attnzoo.UnsupportedError, match=r"^export: expected blocks of at most 4096 tokens .* got 5000"):
        program(layer)


def test_onnx_is_refused_but_for_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    layer = Case("mha", "small").layer()
    x = tokens(layer, 2, 9)
    with pytest.raises(attnzoo.UnsupportedError, match=r"^impl: expected 'reference' in an export to ONNX"):
        export(layer, (x,))
    layer.impl = "reference"
    assert_same(export(layer, (x,)).module()(x), layer(x))
