"""Keys and values of pages in CPU memory: the answers of a cache that lies on the device, and what calls fetch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from attnzoo.base.paged import inputs as paged_inputs
from attnzoo.cache.kv_cache import Stream
from attnzoo.cache.pages.cache import PagedCache
from attnzoo.cache.policies.ems import EMS
from attnzoo.cache.policies.reading import Pages
from attnzoo.cache.policies.scored import H2O, SnapKV
from tests.attnzoo.base.paged.paged_calls import GROUPS, VALUES, WIDTH, Everything, Placed, call, sequences
from tests.attnzoo.cache.pages.pretended import DEVICE, Pretended, near, plain

POLICIES = [
    Placed(slack=6),
    Placed(full=(False, False), fold=True, slack=5),
    SnapKV(budget=9, sink=1, window=2, pool=1, page=4, every=6, slack=5),
    H2O(budget=8, sink=1, page=4, every=4),
    EMS(budget=7, sink=1, window=2, pool=1, page=4, similarity=0.1),
    Pages(page=2, budget=8, reuse=2),
]
CALLS = [[17, 9], [1, 1], [1, 1], [3, 2], [1, 1], [0, 1], [1, 1], [1, 1], [2, 5], [1, 1]]
ROW = (WIDTH + VALUES) * 8


def offloaded(policy: Any, device: torch.device | str, batch: int = 2) -> PagedCache:
    streams = {"k": Stream(GROUPS, WIDTH, offloaded=True), "v": Stream(GROUPS, VALUES, offloaded=True)}
    return PagedCache(streams, policy=policy, batch=batch, max_length=999, device=device, dtype=torch.float64)


def resident(policy: Any, batch: int = 2) -> PagedCache:
    streams = {"k": Stream(GROUPS, WIDTH), "v": Stream(GROUPS, VALUES)}
    return PagedCache(streams, policy=policy, batch=batch, max_length=999, dtype=torch.float64)


def padded(tensors: Sequence[Tensor], calls: Sequence[Sequence[int]]) -> list[list[Tensor]]:
    """The queries, keys and values of each call, left-aligned."""
    done = [0] * len(calls[0])
    made = []
    for lengths in calls:
        parts = [torch.stack([x[i, :, n : n + max(lengths)] for i, n in enumerate(done)]) for x in tensors]
        made.append(parts)
        done = [n + count for n, count in zip(done, lengths, strict=True)]
    return made


def lengths_of(lengths: Sequence[int]) -> int | Tensor:
    return lengths[0] if len(set(lengths)) == 1 else torch.tensor(lengths)


@pytest.mark.parametrize(
    ("policy", "in_place"),
    [
        pytest.param(policy, number % 2 == 0, id=f"{type(policy).__name__}-{number}")
        for number, policy in enumerate(POLICIES)
    ],
)
def test_offloaded_is_resident(policy: Any, in_place: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = sequences(2, 50, 1)
    if in_place:
        # The device is pretended by a class of tensors, which one row in place does not take by itself.
        monkeypatch.setattr(paged_inputs, "is_plain", lambda x: True)
    one = resident(policy)
    expected = []
    with torch.no_grad():
        for number, (lengths, parts) in enumerate(zip(CALLS, padded(tensors, CALLS), strict=True)):
            expected.append(call(one, parts, lengths_of(lengths)))
            if number == 7:
                changed(one, torch.tensor([1, 0]), 1 if one.last_queries is None or policy.slack else 0)
    with torch.no_grad(), Pretended():
        far = offloaded(policy, DEVICE)
        for number, (lengths, parts) in enumerate(zip(CALLS, padded(tensors, CALLS), strict=True)):
            given = lengths_of(lengths)
            given = given if isinstance(given, int) else near(given)
            out = plain(call(far, [near(x) for x in parts], given))
            torch.testing.assert_close(out, expected[number], rtol=0, atol=1e-12)
            if number == 7:
                changed(far, near(torch.tensor([1, 0])), 1 if far.last_queries is None or policy.slack else 0)
        places = {name: x.device.type for name, x in far.pool.tensors.items()}
        assert places == {name: "cpu" if name in ("k", "v") else "xpu" for name in places}
        assert far.device == DEVICE
        assert far.offloaded_nbytes == sum(far.pool.tensors[name].nbytes for name in ("k", "v"))
        loaded = offloaded(policy, DEVICE)
        loaded.load_state_dict(far.fork().state_dict())
        assert loaded.held_rows == one.held_rows
        assert {name: x.device.type for name, x in loaded.pool.tensors.items()} == places


def changed(cache: PagedCache, index: Tensor, back: int) -> None:
    """Beams change places, and where a token may be taken back it is."""
    if back and "mass" not in cache.policy.needs:
        cache.crop(cache.lengths - back)
    cache.reorder(index)


@pytest.mark.parametrize(
    ("policy", "rows"), [(Pages(page=4, budget=24), 24), (Everything(), None)], ids=["pages", "all"]
)
def test_a_row_fetches_the_pages_that_it_reads(policy: Any, rows: int | None) -> None:
    tensors = sequences(1, 220, 2)
    fetched = []
    with torch.no_grad(), Pretended() as device:
        cache = offloaded(policy, DEVICE, batch=1)
        for first, count in ((0, 203), *((n, 1) for n in range(203, 213))):
            device.fetched = 0
            call(cache, [near(x[:, :, first : first + count]) for x in tensors], count)
            fetched.append(device.fetched)
        on_device = cache.nbytes - cache.offloaded_nbytes
        assert on_device < cache.offloaded_nbytes / (2 if rows else 8)
    for number, count in enumerate(fetched[1:]):
        if rows is None:
            assert count == GROUPS * (203 + number) * ROW
        else:
            # Among the pages is the one that is being filled; beside them the own key, for its page's bounds.
            assert GROUPS * rows * ROW <= count <= GROUPS * (rows * ROW + WIDTH * 8) + 999


def test_gradients_reach_a_call_s_own_tokens() -> None:
    tensors = sequences(1, 30, 3)
    found = []
    for cache in (offloaded(Pages(page=2, budget=8), "cpu", 1), resident(Pages(page=2, budget=8), 1)):
        own = [x[:, :, 20:25].clone().requires_grad_() for x in tensors]
        with torch.no_grad():
            call(cache, [x[:, :, :20] for x in tensors], 20)
        call(cache, own, 5).square().sum().backward()
        found.append([x.grad for x in own])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
