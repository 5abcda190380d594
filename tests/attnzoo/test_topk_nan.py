"""A score that is no number is the lowest of all that may be chosen, and chosen only where nothing else is left."""

from __future__ import annotations

import math

import pytest
import torch

from attnzoo.topk import top_blocks


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", range(4))
def test_nan_wins_against_nothing_but_what_is_not_allowed(place: int, dtype: torch.dtype) -> None:
    scores = torch.tensor([-5.0, -7.0, 3.0, 3.0], dtype=dtype)
    scores[place] = math.nan
    others = [block for block in range(4) if block != place]
    assert top_blocks(scores, 3).tolist() == others
    assert place not in top_blocks(scores, 2).tolist()
    allowed = torch.ones(4, dtype=torch.bool)
    allowed[(place + 1) % 4] = False
    found = top_blocks(scores, 3, allowed=allowed).tolist()
    assert found == [block for block in range(4) if block != (place + 1) % 4]
    forced = torch.arange(4) == place
    assert place in top_blocks(scores, 1, forced=forced).tolist()
