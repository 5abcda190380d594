"""The density of a plan where rows stand behind earlier calls, with padding anywhere: counted pair by pair."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.attnzoo.cases import CASES, Case, tokens

BATCH, ROOM = 3, 60


def paddings(first: int) -> dict[str, Tensor | None]:
    behind = torch.zeros(BATCH, ROOM, dtype=torch.bool)
    behind[1, first - 3 : first] = True
    behind[1, 41:] = True
    behind[2, first + 2 :] = True
    before = torch.zeros(BATCH, ROOM, dtype=torch.bool)
    before[0, :4] = True
    before[2, : first - 1] = True
    between = torch.zeros(BATCH, ROOM, dtype=torch.bool)
    between[:, 2::5] = True
    return {"none": None, "behind": behind, "before": before, "between": between}


def overheard_chunk(layer: Any, x: Tensor, padding: Tensor | None, first: int) -> tuple[Any, Any]:
    """The memory and the plan of the call with the tokens from ``first`` on."""
    before, behind = (None, None) if padding is None else (padding[:, :first], padding[:, first:])
    cache = layer.new_cache(BATCH, ROOM)
    layer(x[:, :first], key_padding=before, cache=cache)
    seen, operate = [], layer.operate

    def listening(memory: Any, plan: Any) -> Tensor:
        seen.append((memory, plan))
        out: Tensor = operate(memory, plan)
        return out

    layer.operate = listening
    layer(x[:, first:], key_padding=behind, cache=cache)
    del layer.operate
    return seen[0]


@pytest.mark.parametrize("padding", ["none", "behind", "before", "between"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_density_of_a_chunk_is_that_of_its_tokens(case: Case, padding: str) -> None:
    first = 21
    layer, hidden = case.layer(dtype=torch.float64), paddings(first)[padding]
    with torch.no_grad():
        memory, plan = overheard_chunk(layer, tokens(layer, BATCH, ROOM), hidden, first)
        slots, groups = memory.v.shape[2], memory.v.shape[1]
        one_hot = torch.eye(slots, dtype=torch.float64).expand(BATCH, groups, slots, slots)
        read = layer.operate(replace(memory, v=one_hot), plan) > 0
    real = torch.ones(BATCH, ROOM, dtype=torch.bool) if hidden is None else ~hidden
    # Each real token of the chunk could see the real ones up to itself.
    dense = int((real.cumsum(1) * real)[:, first:].sum()) * layer.config.num_heads
    assert plan.density == pytest.approx(int(read.sum()) / dense, abs=1e-12)
