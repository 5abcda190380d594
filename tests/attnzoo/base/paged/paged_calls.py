"""Calls over a cache of pages, cut at will, and what the oracle says of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnzoo.base.paged.calls import attend_paged
from attnzoo.base.paged.inputs import PagedInputs
from attnzoo.cache.kv_cache import Stream
from attnzoo.cache.pages.cache import PagedCache
from attnzoo.cache.policies.protocol import Policy
from attnzoo.cache.retention import Retention

HEADS = 4
GROUPS = 2
WIDTH = 8
VALUES = 6


@dataclass(frozen=True, eq=False, kw_only=True)
class Everything(Policy):
    """Holds and reads everything."""

    page: int = 4


@dataclass(frozen=True, eq=False, kw_only=True)
class Placed(Policy):
    """Some heads hold everything, the others first blocks and near ones, and maybe a row for the rest."""

    page: int = 4
    local: int = 2
    sinks: int = 1
    full: tuple[bool, ...] = (True, False)
    fold: bool = False

    def retention(self, kv_heads: int) -> Retention:
        return Retention(self.page, self.local, self.full, self.sinks)

    @property
    def folds(self) -> bool:
        return self.fold


for name, policy in (("everything in a test", Everything), ("placed in a test", Placed)):
    policy.name = name


def empty_cache(policy: Policy, batch: int, **options: object) -> PagedCache:
    streams = {"k": Stream(GROUPS, WIDTH), "v": Stream(GROUPS, VALUES)}
    options = {"max_length": 1000, "dtype": torch.float64, **options}
    return PagedCache(streams, policy=policy, batch=batch, **options)


def call(cache: PagedCache, tensors: Sequence[Tensor], lengths: int | Tensor, impl: str = "auto") -> Tensor:
    q, k, v = tensors
    with cache.all_or_nothing():
        cache.stage({"k": k, "v": v}, lengths)
        return attend_paged(PagedInputs(q, k, v, cache=cache, lengths=lengths), None, impl)


def sequences(batch: int, tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = ((HEADS, WIDTH), (GROUPS, WIDTH), (GROUPS, VALUES))
    q, k, v = (torch.randn(batch, h, tokens, d, generator=generator, dtype=torch.float64) for h, d in sizes)
    return q, k, v


def poison_free_pages(cache: PagedCache) -> None:
    pages = torch.tensor(cache.pool.free, dtype=torch.int64)
    for x in cache.pool.tensors.values():
        if x.dtype.is_floating_point:
            x[pages] = torch.nan


def check_pages(cache: PagedCache) -> None:
    """Free pages and those in tables are all pages but the one that is never given out, each once."""
    used = [page for page in cache.pool.table().flatten().tolist() if page]
    pages = cache.pool.tensors["k"].shape[0]
    assert sorted(used + cache.pool.free) == list(range(1, pages))


@dataclass
class Split:
    """How many tokens each item brings to each call."""

    calls: list[list[int]] = field(default_factory=list)


def run(cache: PagedCache, tensors: Sequence[Tensor], calls: Sequence[Sequence[int]], impl: str = "auto") -> Tensor:
    """The outputs of all tokens ``[B, H, N, Dv]``; padding holds NaN, and so do free pages behind every call."""
    q, k, v = tensors
    out = torch.full((*q.shape[:3], v.shape[3]), torch.nan, dtype=q.dtype)
    done = [0] * q.shape[0]
    for lengths in calls:
        most = max(lengths)
        padded = []
        for x in (q, k, v):
            rows = x.new_full((x.shape[0], x.shape[1], most, x.shape[3]), torch.nan)
            for item, count in enumerate(lengths):
                rows[item, :, :count] = x[item, :, done[item] : done[item] + count]
            padded.append(rows)
        same = all(count == most for count in lengths)
        found = call(cache, padded, most if same else torch.tensor(lengths), impl)
        for item, count in enumerate(lengths):
            out[item, :, done[item] : done[item] + count] = found[item, :, :count]
            assert not bool(found[item, :, count:].any())
            done[item] += count
        check_pages(cache)
        poison_free_pages(cache)
    return out


def by_place(tensors: Sequence[Tensor], policy: Placed | Everything) -> Tensor:
    """The same for one item's tensors ``[H|G, N, D]``, row by row from the rule."""
    q, k, v = tensors
    out = torch.zeros(q.shape[0], q.shape[1], v.shape[2], dtype=q.dtype)
    for head in range(q.shape[0]):
        group = head * k.shape[0] // q.shape[0]
        for t in range(q.shape[1]):
            seen = [s for s in range(t + 1) if _reads(policy, group, s, t)]
            lost = [s for s in range(t + 1) if s not in seen]
            scores = [q[head, t] @ k[group, s] * WIDTH**-0.5 for s in seen]
            values = [v[group, s] for s in seen]
            if lost and policy.folds:
                scores.append(q[head, t] @ k[group, lost].mean(0) * WIDTH**-0.5 + math.log(len(lost)))
                values.append(v[group, lost].mean(0))
            out[head, t] = torch.softmax(torch.stack(scores), 0) @ torch.stack(values)
    return out


def _reads(policy: Policy, group: int, s: int, t: int) -> bool:
    if not isinstance(policy, Placed) or policy.full[group]:
        return True
    return s // policy.page < policy.sinks or t // policy.page - s // policy.page < policy.local
