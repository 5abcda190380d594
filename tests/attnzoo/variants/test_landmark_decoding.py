"""A decoding step over all blocks, read where they lie, against loops over the definition of gates."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from attnzoo.variants.landmark.config import LandmarkConfig
from attnzoo.variants.landmark.decoding import Reads, attend_row
from tests.strategies import Numbers

SIZE = 4
CONFIG = LandmarkConfig(dim=12, num_heads=4, num_kv_heads=2, head_dim=3, block_size=SIZE, rotary=None)


def defined(q: Tensor, k: Tensor, v: Tensor, scale: float, mix: float) -> Tensor:
    """One head's row ``[D]`` over ``[held, D]``, slot by slot; the last slot of a block is its landmark."""
    held = k.shape[0]
    own = (held - 1) // SIZE
    terms = []
    for block in range(own + 1):
        slots = [s for s in range(block * SIZE, min(held, block * SIZE + SIZE)) if s % SIZE != SIZE - 1]
        scores = torch.stack([scale * torch.dot(q, k[s]) for s in slots])
        if block < own:
            within = torch.logsumexp(scores, 0)
            landmark = scale * torch.dot(q, k[block * SIZE + SIZE - 1])
            scores = scores - within + mix * landmark + (1 - mix) * within
        terms += zip(scores, slots, strict=True)
    weights = torch.softmax(torch.stack([score for score, _ in terms]), 0)
    return sum((weight * v[s] for weight, (_, s) in zip(weights, terms, strict=True)), torch.zeros(v.shape[1]).to(v))


@given(st.integers(SIZE + 1, 23), st.sampled_from([0.0, 0.3, 1.0, 1.5]), st.integers(0, 99), st.booleans())
@example(2 * SIZE, 1.0, 0, True)
def test_all_blocks_are_read_through_their_landmarks_whose_values_nobody_reads(
    held: int, mix: float, seed: int, spoiled: bool
) -> None:
    n = Numbers.of(seed)
    q, k, v = n.normal(2, 4, 1, 3), n.normal(2, 2, 30, 3), n.normal(2, 2, 30, 5)
    if spoiled:
        # Landmarks' values, and what lies behind the row.
        v[:, :, SIZE - 1 :: SIZE] = math.nan
        k[:, :, held:] = math.nan
        v[:, :, held:] = math.inf
    out = attend_row(CONFIG, (q, k, v), held, Reads(scale=0.7, mix=mix, soft=True))
    for item in range(2):
        for head in range(4):
            group = head // 2
            wanted = defined(q[item, head, 0], k[item, group, :held], v[item, group, :held], 0.7, mix)
            torch.testing.assert_close(out[item, head, 0], wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("mix", [0.0, 1.0])
def test_large_scores_do_not_overflow(mix: float) -> None:
    n = Numbers.of(1)
    q, k, v = 100 * n.normal(1, 4, 1, 3), 100 * n.normal(1, 2, 20, 3), n.normal(1, 2, 20, 5)
    out = attend_row(CONFIG, (q, k, v), 18, Reads(scale=1.0, mix=mix, soft=True))
    wanted = defined(q[0, 3, 0], k[0, 1, :18], v[0, 1, :18], 1.0, mix)
    torch.testing.assert_close(out[0, 3, 0], wanted, rtol=1e-9, atol=1e-9)
