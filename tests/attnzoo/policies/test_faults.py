"""A call that fails leaves a policy's cache as it was, wherever it fails: between any two writes to what is held."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from attnzoo.cache.evicting.cache import EvictingCache
from tests.attnzoo.policies.lives import ITEMS, asked, calls_of, layer_of, script, sequences, tokens_in_rows
from tests.attnzoo.policies.settings import entry_of, names

MAKERS: dict[str, Callable[[], Any]] = {}
for name in names():
    entry = entry_of(name)
    MAKERS |= {f"{name}-{number}": setting.make for number, setting in enumerate(entry.settings)}
    if entry.slack is not None:
        MAKERS[f"{name}-slack"] = lambda make=entry.slack: make(5)

# A row that begins a block and takes the place of the ring's oldest, one that chooses, a longer call.
WIDTHS = (21, 1, 1, 1, 1, 5, 1, 1)
FAULTY = {"border": 4, "longer": 5, "choice": 6}
CASES = [
    pytest.param(name, kind, at, id=f"{name}-{kind}-{at}", marks=() if plain else pytest.mark.slow)
    for number, name in enumerate(MAKERS)
    for place, (kind, at) in enumerate((kind, at) for kind in ("none", "left") for at in FAULTY)
    # Every policy at a border; what else there is takes turns.
    for plain in [place == 0 or (number % 5 == 0 and place == 1 + number % 4)]
]


class FaultError(RuntimeError):
    """What is raised between two writes."""


class Fault(TorchFunctionMode):
    """Raises once, before the n-th write to a cache's tensors."""

    def __init__(self, cache: Any, number: int) -> None:
        super().__init__()
        self.cache = cache
        self.left: int | None = number

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        writes = name == "__setitem__" or (name.endswith("_") and not name.startswith("__"))
        if writes and args[0].untyped_storage()._cdata in self._storages():
            self.step()
        return func(*args, **(kwargs or {}))

    def _storages(self) -> set[int]:
        held = [*self.cache._buffers.values()]
        queries = getattr(self.cache, "last_queries", None)
        return {x.untyped_storage()._cdata for x in held + ([] if queries is None else [queries.values])}

    def step(self) -> None:
        """Counts one write."""
        if self.left == 0:
            self.left = None
            raise FaultError
        if self.left is not None:
            self.left -= 1


def known(cache: Any) -> dict[str, Any]:
    """All that a cache knows: of every row that it holds, read or not, and what it has counted."""
    if isinstance(cache, EvictingCache):
        found: dict[str, Any] = {"lengths": cache.lengths.tolist(), "oldest": cache._oldest}
        for region in cache.regions:
            there = tokens_in_rows(cache, region)
            found[region.name] = there
            found |= {name: cache._buffers[name][there >= 0] for name in cache._names(region)}
        return found
    found = cache.state_dict()
    pool = cache.pool
    for extent in pool.extents:
        # Who reads in place tells rows from nothing by their bias.
        bias, position = (pool.view(of, extent)[:, :, : extent.live * pool.page] for of in ("bias", "position"))
        assert bool((bias[position < 0] == -torch.inf).all())
    if "least" in pool.tensors:
        table = pool.table()
        there = torch.arange(table.shape[2]) < pool.page_counts().unsqueeze(-1)
        found |= {name: pool.tensors[name][table][there] for name in ("least", "most")}
    if cache.choice is not None:
        found |= {f"choice.{name}": value for name, value in vars(cache.choice).items()}
    if cache.last_queries is not None:
        ring = cache.last_queries
        token = torch.arange(int(cache.lengths.max()))
        found["all queries"] = [ring.values[:, :, t % ring.rows] for t in token.tolist()[-ring.rows :]]
        found["oldest query"] = ring.oldest
    found["blocks"] = [pool.blocks(extent) for extent in pool.extents if extent.ring is not None]
    return found


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """Whether two things of :func:`known` are the same, to the bit."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key, value in one.items():
            assert_same(value, other[key], f"{where}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for number, value in enumerate(one):
            assert_same(value, other[number], f"{where}[{number}]")
    elif isinstance(one, Tensor):
        assert isinstance(other, Tensor), where
        assert torch.equal(one, other), where
    else:
        assert one == other, where


@pytest.mark.parametrize(("name", "kind", "at"), CASES)
def test_a_call_may_fail_between_any_two_writes(name: str, kind: str, at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of()
    told = script(WIDTHS, kind, seed=1)
    items = sequences(layer, told)
    plain, tried = (layer.new_cache(ITEMS, 64, policy=MAKERS[name]()) for _ in range(2))
    faults: list[Fault] = []
    combine = type(layer).combine

    def fails_behind(*args: Any) -> Any:
        out = combine(*args)
        for fault in faults:
            fault.step()
        return out

    def fails(cache: Any, number: int, x: Tensor, padding: Tensor) -> bool:
        with Fault(cache, number) as fault:
            faults[:] = [fault]
            try:
                # Other tokens than those that come: nothing of them may stay.
                asked(layer, cache, 3 - x, padding)
            except FaultError:
                return True
            finally:
                faults.clear()
        return False

    monkeypatch.setattr(type(layer), "combine", fails_behind)
    with torch.no_grad():
        for number, (x, padding) in enumerate(calls_of(told, items)):
            if number == FAULTY[at]:
                writes = next(nth for nth in count() if not fails(tried.fork(), nth, x, padding))
                assert writes >= 1
                before = known(tried)
                for nth in range(writes):
                    assert fails(tried, nth, x, padding)
                    assert_same(known(tried), before, f"write {nth}")
            expected = asked(layer, plain, x, padding)
            found = asked(layer, tried, x, padding)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert_same(known(tried), known(plain))
