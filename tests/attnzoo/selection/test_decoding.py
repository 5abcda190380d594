"""Choosing without a sort, and reading what is chosen where it lies or gathered."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attnzoo
from attnzoo.selection.decoding import clear_best, gathered_tokens, rotated, rotations_back, tokens_of
from attnzoo.topk import top_blocks
from attnzoo.variants.longheads import decoding as longheads
from tests.strategies import Numbers

VALUES = (0.0, 1.0, 2.0, 3.0, math.inf, -math.inf, math.nan)


@given(scores=st.lists(st.sampled_from(VALUES), min_size=2, max_size=9), data=st.data())
def test_a_clear_choice_is_the_choice(scores: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(scores) - 1))
    given_ = torch.tensor(scores).view(1, 1, -1)
    found = clear_best(given_, count)
    if found is not None:
        assert torch.equal(found, top_blocks(given_, count))
    ordered = sorted((x for x in scores), reverse=True)
    if all(math.isfinite(x) for x in scores) and ordered[count - 1] > ordered[count]:
        assert found is not None


def test_scores_that_slack_could_make_equal_are_not_clear() -> None:
    scores = torch.tensor([[[1.0, 3.0, 2.0]]])
    assert clear_best(scores, 1, torch.tensor([[0.5]])) is not None
    assert clear_best(scores, 1, torch.tensor([[1.0]])) is None
    # One head that is not clear spoils the choice of all.
    both = torch.tensor([[[1.0, 3.0, 2.0], [2.0, 2.0, 1.0]]])
    assert clear_best(both, 1) is None


def test_tokens_are_gathered_from_the_group_of_their_head() -> None:
    x = Numbers.of(1).normal(2, 2, 12, 3)
    blocks = torch.tensor([[[0, 2], [1, 2], [0, 1], [2, 0]]]).expand(2, -1, -1)
    found = gathered_tokens(x, tokens_of(blocks, 4, 3)).view(2, 4, 6, 3)
    for item, head, k in ((i, h, k) for i in range(2) for h in range(4) for k in range(2)):
        first = int(blocks[item, head, k]) * 4
        assert torch.equal(found[item, head, 3 * k : 3 * k + 3], x[item, head // 2, first : first + 3])


def test_rotations_back_undo_as_many_blocks() -> None:
    rotary = attnzoo.RotaryConfig(dim=4)
    table = rotations_back(rotary, 6, 3, 5, torch.float64, torch.device("cpu"))
    x = Numbers.of(2).normal(1, 2, 5, 6).double()
    cos, sin = attnzoo.base.rope.rotary_tables(rotary, 6, torch.arange(5) * 3, torch.float64)
    there = attnzoo.base.rope.apply_rotary(rotated(x, table, 4), cos, sin)
    torch.testing.assert_close(there, x)


def test_most_chunks_are_read_where_they_lie_and_what_is_not_read_may_be_no_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(longheads, "LEAST_READ", 1)
    layer = attnzoo.create(
        "longheads", dim=32, num_heads=4, num_kv_heads=2, chunk_size=8, attention_length=32, dtype=torch.float64
    ).eval()
    x = Numbers.of(4).normal(2, 63, 32).double()
    with torch.no_grad():
        wanted = layer(x)[:, 48:]
        for poisoned in (False, True):
            cache = layer.new_cache(2, 63)
            layer(x[:, :48], cache=cache)
            if poisoned:
                cache._buffers["v"][:, :, 48:] = torch.nan
            steps = [layer.decode_row(x[:, t : t + 1], cache) for t in range(48, 63)]
            torch.testing.assert_close(torch.cat([step for step in steps if step is not None], 1), wanted)


def test_a_chunk_that_nobody_reads_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(longheads, "LEAST_READ", 1)
    layer = attnzoo.create("longheads", dim=8, num_heads=1, chunk_size=8, attention_length=32).eval()
    x = Numbers.of(5).normal(1, 50, 8).float()
    with torch.no_grad():
        caches = [layer.new_cache(1, 50) for _ in range(2)]
        for cache in caches:
            layer(x[:, :49], cache=cache)
        wanted = layer.attend(x[:, 49:], cache=caches[0])
        left_out = set(range(7)) - set(wanted.plan.info["chunks"][0, 0, 0].tolist())
        assert left_out
        for chunk in left_out:
            for buffer in ("k", "v"):
                caches[1]._buffers[buffer][:, :, 8 * chunk : 8 * chunk + 8] = torch.nan
        found = layer.decode_row(x[:, 49:], caches[1])
    assert found is not None
    torch.testing.assert_close(found, wanted.out)
