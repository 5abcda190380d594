"""Converted models as programs: exported at one length, an open one or a refusal; compiled with padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

import attnzoo
from tests.attnzoo.surgery.tiny import READING, assert_close, convert, ids, logits, tiny

TOKENS = 24


class Logits(nn.Module):
    """A model's logits alone: a cache that it makes and drops is no output."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        said: Tensor = self.model(tokens).logits
        return said


def converted(kind: str) -> Any:
    model = tiny(layers=1, dtype=torch.float32)
    if kind in READING:
        variant, options = READING[kind]
        convert(model, variant, **options)
    elif kind == "moh":
        convert(model, "moh")
    else:
        convert(model, "lowrank_gqa", method="mean", num_kv_heads=1)
    return model


def program(model: Any, *, open_length: bool = False) -> Any:
    shapes = {"tokens": {1: Dim("T", min=2, max=256)}} if open_length else None
    return export(Logits(model), (ids(2, TOKENS),), dynamic_shapes=shapes, strict=False).module()


@pytest.mark.parametrize("kind", ["window", "s2", "moh"])
@torch.no_grad()
def test_a_converted_model_is_exported_at_one_length(kind: str) -> None:
    model = converted(kind)
    served = program(model)
    # Other tokens than those that it was exported with.
    tokens = ids(2, TOKENS + 1)[:, 1:]
    assert_close(served(tokens), logits(model, tokens), 1e-5)


@torch.no_grad()
def test_fewer_kv_heads_leave_an_ordinary_model_whose_length_may_be_open() -> None:
    model = converted("mean")
    served = program(model, open_length=True)
    for length in (9, TOKENS, 70):
        tokens = ids(2, length)
        assert_close(served(tokens), logits(model, tokens), 1e-5)


@pytest.mark.parametrize("kind", ["window", "s2"])
@torch.no_grad()
def test_an_open_length_of_what_is_read_is_refused_by_name(kind: str) -> None:
    with pytest.raises(attnzoo.UnsupportedError, match=r"^input_ids: expected a length that is known.*leaves open"):
        program(converted(kind), open_length=True)


@torch.no_grad()
def test_without_a_cache_the_host_adds_a_rule_to_programs_which_is_refused_by_name() -> None:
    with pytest.raises(attnzoo.UnsupportedError, match=r"^attention_mask: .*got a further rule of the host's"):
        export(converted("window"), (ids(1, TOKENS),), {"use_cache": False}, strict=False)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["window", "moh"])
@torch.no_grad()
def test_a_compiled_model_takes_padding(kind: str) -> None:
    model = converted(kind)
    tokens = ids(2, TOKENS)
    mask = torch.ones_like(tokens)
    mask[1, :7] = 0
    # What is read depends on the items' lengths, which are read in each block; a router's layer reads none.
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=kind == "moh", backend="eager")
    real = mask.bool()
    said = logits(compiled, tokens, attention_mask=mask)[real]
    assert_close(said, logits(model, tokens, attention_mask=mask)[real], 1e-5)
