"""Where evicting caches hold tokens: each row reads what the rule says, in place; rows and tokens are inverse maps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from attnzoo.cache.evicting.regions import FullRegion, StreamingRegion, regions_of
from attnzoo.cache.retention import Retention

TOKENS = 50


@st.composite
def retentions(draw: Any) -> Retention:
    heads = draw(st.integers(1, 4))
    stride = draw(st.none() | st.integers(1, 6))
    return Retention(
        block=draw(st.integers(1, 5)),
        local=draw(st.integers(1, 5)),
        full=tuple(draw(st.lists(st.booleans(), min_size=heads, max_size=heads))),
        sink=draw(st.integers(0, 4)),
        stride=stride,
        phases=() if stride is None else tuple(draw(st.integers(0, stride - 1)) for _ in range(heads)),
    )


def reads(retention: Retention, head: int, row: int) -> list[int]:
    """The tokens that a row reads, by the rule alone."""
    rule = retention

    def is_read(block: int) -> bool:
        far = block < rule.sink or (rule.stride is not None and block % rule.stride == rule.phases[head])
        return rule.full[head] or row // rule.block - block < rule.local or far

    return [token for token in range(row + 1) if is_read(token // rule.block)]


def filled(region: Any, tokens: int) -> torch.Tensor:
    """A buffer ``[1, h, R, 1]`` in which each row holds the number of its token, after decoding so many."""
    buffer = torch.full((1, len(region.heads), region.rows(TOKENS), 1), torch.nan)
    for token in range(tokens):
        for run in region.runs(token):
            buffer[:, run.heads[0] : run.heads[1], run.own] = token
        region.retire([buffer], token + 1)
    return buffer


@settings(max_examples=60, deadline=None)
@given(retentions(), st.integers(0, 9))
@example(Retention(block=1, local=3, full=(False,), sink=1), 2)
def test_a_row_reads_in_one_piece_what_the_rule_says(retention: Retention, spare: int) -> None:
    for region in regions_of(retention, spare):
        buffer = filled(region, 0)
        for token in range(TOKENS):
            for run in region.runs(token):
                buffer[:, run.heads[0] : run.heads[1], run.own] = token
                for head in range(*run.heads):
                    seen = buffer[0, head, run.rows[0] : run.rows[1], 0].tolist()
                    assert sorted(seen) == reads(retention, region.heads[head], token)
            region.retire([buffer], token + 1)


@settings(max_examples=60, deadline=None)
@given(retentions(), st.integers(0, 4), st.integers(1, TOKENS))
def test_rows_and_tokens_are_found_from_each_other(retention: Retention, spare: int, held: int) -> None:
    for region in regions_of(retention, spare):
        if isinstance(region, FullRegion):
            continue
        buffer = filled(region, held)[..., 0]
        rows = torch.arange(buffer.shape[2]).expand_as(buffer)
        token = region.token_at(buffer.shape[2], held, buffer.device).expand_as(buffer)
        # What heads keep is in the margin too where a chunk writes it, and is not where single tokens do.
        known = (token >= 0) & ((rows >= region.margin) | ~buffer.isnan())
        behind = known & (rows >= region.margin)
        assert torch.equal(buffer[behind].long(), token[behind])
        assert torch.equal(region.row_of(token.clamp(min=0), held).expand_as(rows)[behind], rows[behind])
        every = torch.arange(held).view(1, 1, -1).expand(1, len(region.heads), -1)
        row = region.row_of(every, held).expand_as(every)
        found = buffer.gather(2, row.clamp(min=0)).long()
        assert torch.equal(found[row >= 0], every[row >= 0])
        for head, index in enumerate(region.heads):
            assert {*reads(retention, index, held)[:-1]} <= {*every[0, head][row[0, head] >= 0].tolist()}
        # Items that hold different numbers are told apart.
        each = torch.tensor([held, max(held - 3, 0)]).view(2, 1, 1)
        both = region.token_at(buffer.shape[2], each, buffer.device).expand(2, *buffer.shape[1:])
        assert torch.equal(both[:1], token)
        other = region.token_at(buffer.shape[2], max(held - 3, 0), buffer.device).expand_as(buffer)
        assert torch.equal(both[1:], other)


def test_more_room_moves_nothing_and_a_window_needs_none() -> None:
    window = Retention(block=1, local=8, full=(False, False), sink=2)
    (region,) = regions_of(window)
    assert [region.rows(n) for n in (3, 8, 10, 100, 10**9)] == [3, 9, 10, 10, 10]
    shards = Retention(block=4, local=2, full=(False, True), stride=3, phases=(1, 0))
    near, full = regions_of(shards)
    assert (near.heads, full.heads) == ((0,), (1,))
    assert [full.rows(n) for n in (3, 100)] == [3, 100]
    assert [near.rows(n) for n in (3, 8, 40)] == [3, 8, 20]


def test_heads_that_keep_as_many_blocks_are_one_run() -> None:
    (region,) = regions_of(Retention(block=2, local=1, full=(False,) * 4, stride=4, phases=(0, 3, 2, 1)))
    assert isinstance(region, StreamingRegion)
    assert [len(region.runs(token)) for token in (0, 2, 4, 6, 8, 10)] == [1, 2, 3, 3, 1, 2]
    assert [run.heads for run in region.runs(6)] == [(0, 1), (1, 2), (2, 4)]


@pytest.mark.parametrize("count", [500])
def test_what_is_remembered_of_runs_is_bounded(count: int) -> None:
    (region,) = regions_of(Retention(block=1, local=1, full=(False,), stride=3, phases=(1,)))
    assert isinstance(region, StreamingRegion)
    for token in range(count):
        region.runs(token)
    assert len(region._known_runs) <= 64
