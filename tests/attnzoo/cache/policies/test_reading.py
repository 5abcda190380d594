"""Pages that a decoding row reads: bounds that hold, choices beside a plain one, forced pages, heads that read all."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnzoo.cache.policies.protocol import PageBounds, policy_from
from attnzoo.cache.policies.reading import Pages, page_bounds
from attnzoo_kernels.errors import ConfigError

few = settings(max_examples=20, deadline=None)
rows_of = st.lists(st.lists(st.integers(1, 23), min_size=2, max_size=2), min_size=1, max_size=3)


def keys_of(rows: list[list[int]], seed: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(n, 6, generator=generator) for n in of_item] for of_item in rows]


def bounds_of(keys: list[list[Tensor]], page: int, width: int | None = None) -> PageBounds:
    """The least and the most of each page, NaN where there is none."""
    pages = [[list(k.split(page)) for k in of_item] for of_item in keys]
    count = torch.tensor([[len(head) for head in of_item] for of_item in pages])
    width = int(count.max()) if width is None else width
    least = torch.full((*count.shape, width, 6), torch.nan)
    most = least.clone()
    for b, of_item in enumerate(pages):
        for g, head in enumerate(of_item):
            for p, own in enumerate(head):
                least[b, g, p] = own.amin(0)
                most[b, g, p] = own.amax(0)
    return PageBounds(least, most, count, page)


def queries(batch: int, seed: int) -> Tensor:
    return torch.randn(batch, 4, 1, 6, generator=torch.Generator().manual_seed(seed + 1000))


def listed(pages: Tensor) -> list[list[list[int]]]:
    return [[[p for p in head.tolist() if p >= 0] for head in of_item] for of_item in pages]


@few
@given(rows=rows_of, seed=st.integers(0, 99))
def test_no_product_is_above_a_pages_bound_and_finer_pages_are_tighter(rows: list[list[int]], seed: int) -> None:
    keys = keys_of(rows, seed)
    q = queries(len(rows), seed)
    coarse = page_bounds(q, bounds_of(keys, 4))
    fine = page_bounds(q, bounds_of(keys, 2))
    for b, of_item in enumerate(keys):
        for g, k in enumerate(of_item):
            for h in range(2):
                product = k @ q[b, 2 * g + h, 0]
                for p, own in enumerate(product.split(4)):
                    assert coarse[b, g, h, p] >= own.max() - 1e-5
                for p, own in enumerate(product.split(2)):
                    assert fine[b, g, h, p] >= own.max() - 1e-5
                    assert fine[b, g, h, p] <= coarse[b, g, h, p // 2] + 1e-5


@few
@given(rows=rows_of, seed=st.integers(0, 99), most=st.integers(3, 6))
def test_pages_are_those_of_the_largest_bounds_and_the_forced_ones(rows: list[list[int]], seed: int, most: int) -> None:
    keys = keys_of(rows, seed)
    q = queries(len(rows), seed)
    bounds = bounds_of(keys, 2)
    found = Pages(page=2, budget=2 * most + 1).read(q, bounds)
    if found is None:
        assert int(bounds.count.max()) <= most
        return
    for b, of_item in enumerate(listed(found)):
        for g, pages in enumerate(of_item):
            count = int(bounds.count[b, g])
            value = [
                max(
                    sum(max(float(x * low), float(x * high)) for x, low, high in zip(query, *channels, strict=True))
                    for query in q[b, 2 * g : 2 * g + 2, 0]
                )
                for channels in zip(bounds.least[b, g, :count], bounds.most[b, g, :count], strict=True)
            ]
            forced = {p for p in (0, count - 2, count - 1) if p >= 0}
            rest = sorted((p for p in range(count) if p not in forced), key=lambda p: (-value[p], p))
            assert pages == sorted([*forced, *rest[: most - len(forced)]])


@few
@given(rows=rows_of, seed=st.integers(0, 99))
def test_more_pages_hold_fewer_and_batch_mates_change_nothing(rows: list[list[int]], seed: int) -> None:
    keys = keys_of(rows, seed)
    q = queries(len(rows), seed)
    wide = bounds_of(keys, 2, width=14)
    before: list[list[list[int]]] | None = None
    for most in range(3, 8):
        policy = Pages(page=2, budget=2 * most)
        found = policy.read(q, wide)
        assert found is not None
        pages = listed(found)
        for b in range(len(rows)):
            alone = policy.read(q[b : b + 1], bounds_of(keys[b : b + 1], 2))
            every = [[list(range(int(n))) for n in wide.count[b]]]
            assert pages[b : b + 1] == (every if alone is None else listed(alone))
        if before is not None:
            for fewer, more in zip(before, pages, strict=True):
                assert all(set(a) <= set(b) for a, b in zip(fewer, more, strict=True))
        before = pages


def test_equal_bounds_go_to_the_first_pages() -> None:
    least = torch.ones(1, 1, 8, 6)
    pages = PageBounds(least, least, torch.tensor([[8]]), 2)
    found = Pages(page=2, budget=10).read(torch.ones(1, 2, 1, 6), pages)
    assert found is not None
    assert found.tolist() == [[[0, 1, 2, 6, 7]]]


def test_some_heads_read_everything() -> None:
    keys = keys_of([[23, 23], [9, 14]], 3)
    q = queries(2, 3)
    policy = Pages(page=2, budget=6, full=torch.tensor([[False, False], [True, False]]))
    plain = Pages(page=2, budget=6).read(q, bounds_of(keys, 2))
    assert plain is not None
    assert torch.equal(policy.of_layer(0).read(q, bounds_of(keys, 2))[..., :3], plain)  # type: ignore[index]
    found = policy.of_layer(1).read(q, bounds_of(keys, 2))
    assert found is not None
    assert [of_item[0] for of_item in listed(found)] == [list(range(12)), list(range(5))]
    assert [of_item[1] for of_item in listed(found)] == [of_item[1] for of_item in listed(plain)]


def test_settings_make_it_again_and_those_that_do_not_fit_are_named() -> None:
    policy = Pages(page=8, budget=64, reuse=4, full=torch.tensor([[True, False]]))
    written = json.loads(json.dumps(policy.settings()))
    assert policy_from(written).settings() == policy.settings() == written
    assert policy.reads_pages
    assert not policy.compacts
    policy.check(1, 2)
    assert repr(policy) == "Pages(page=8, reuse=4, budget=64, full=bool[1, 2])"
    for message, bad in {
        "budget: expected 48 rows or more, three pages of 16, got 47": {"budget": 47},
        "page: expected 1 row or more, got 0": {"page": 0},
        "reuse: expected 1 step or more, got 0": {"reuse": 0},
        "full: expected bool": {"full": [0.5]},
    }.items():
        with pytest.raises(ConfigError) as found:
            Pages(**bad)  # type: ignore[arg-type]
        assert str(found.value).startswith(message)
    with pytest.raises(ConfigError, match=r"full: expected \[3, 2\]"):
        policy.check(3, 2)
    with pytest.raises(ConfigError, match="full: expected a row for layer 1"):
        policy.of_layer(1)
