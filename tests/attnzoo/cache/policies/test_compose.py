"""Policies put together: each part acts on its own heads, and does there what it does alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from attnzoo.cache.policies.compose import Compose
from attnzoo.cache.policies.duo import Duo
from attnzoo.cache.policies.ems import EMS
from attnzoo.cache.policies.protocol import MERGED, PageBounds, Policy, policy_from
from attnzoo.cache.policies.razor import Razor
from attnzoo.cache.policies.reading import Pages
from attnzoo.cache.policies.scored import H2O, SnapKV
from attnzoo.cache.policies.streaming import Streaming
from attnzoo_kernels.errors import ConfigError
from tests.attnzoo.cache.policies.seen import chosen, seen_of

FULL = torch.tensor([[False, True, False], [False, False, False]])
SNAP = SnapKV(budget=6, sink=2, window=3, pool=1)


@pytest.mark.parametrize("score", [SNAP, EMS(budget=6, sink=2, window=3, pool=1, similarity=0.2), H2O(budget=4)])
def test_full_heads_keep_everything_and_the_others_what_the_part_keeps_alone(score: Any) -> None:
    policy = Compose(static=Duo(FULL), score=score)
    assert policy.needs == score.needs
    assert (policy.window, policy.group, policy.every) == (score.window, score.group, score.every)
    assert policy.compacts
    assert not policy.reads_pages
    seen = seen_of(score, [[16, 16, 12], [3, 9, 0]])
    alone = chosen(score.keep(seen), seen)
    kept = policy.of_layer(0).keep(seen)
    assert kept is not None
    expected = [[of_item[0], list(range((16, 9)[b])), of_item[2]] for b, of_item in enumerate(alone)]
    assert chosen(kept, seen) == expected
    assert chosen(policy.of_layer(1).keep(seen), seen) == alone
    # By score: no place is free of it before a choice.
    assert policy.of_layer(0).retention(3) is None
    if isinstance(score, EMS):
        into = score.keep(seen).into  # type: ignore[union-attr]
        assert torch.equal(kept.into[:, 0], into[:, 0])  # type: ignore[index]


def test_what_is_lost_joins_a_compensation_row() -> None:
    policy = Compose(static=Razor(FULL), score=SNAP).of_layer(0)
    seen = seen_of(SNAP, [[16, 16, 16]])
    kept = policy.keep(seen)
    assert kept is not None
    assert kept.into is not None
    assert bool((kept.into == MERGED).all())
    assert policy.folds
    assert policy.fold_bias(torch.zeros(1, 3, 6), torch.ones(1, 3)).tolist() == [[0, 0, 0]]
    merging = EMS(budget=6, sink=2, window=3, pool=1, similarity=0.2)
    seen = seen_of(merging, [[16, 16, 16]])
    into = merging.keep(seen).into  # type: ignore[union-attr]
    found = Compose(static=Razor(FULL), score=merging).of_layer(0).keep(seen).into  # type: ignore[union-attr]
    assert torch.equal(found, into.masked_fill(into == -1, MERGED))  # type: ignore[union-attr,arg-type]


def test_everything_that_fits_stays() -> None:
    seen = seen_of(SNAP, [[6, 5, 4]])
    assert Compose(static=Duo(FULL), score=SNAP).of_layer(0).keep(seen) is None


def test_pages_are_read_by_full_heads_alone() -> None:
    policy = Compose(static=Duo(FULL, sink=64, window=128, block=16), read=Pages(page=16, budget=64, reuse=3))
    assert (policy.page, policy.reuse, policy.every) == (16, 3, None)
    assert policy.needs == {"page_bounds"}
    own = policy.of_layer(0)
    assert own.retention(3) == Duo(FULL, sink=64, window=128, block=16).of_layer(0).retention(3)
    generator = torch.Generator().manual_seed(0)
    least = torch.randn(2, 3, 9, 4, generator=generator)
    pages = PageBounds(least, least + 1, torch.tensor([[9, 9, 2], [4, 7, 9]]), 16)
    q = torch.randn(2, 6, 1, 4, generator=generator)
    found = own.read(q, pages)
    alone = Pages(page=16, budget=64).read(q, pages)
    assert found is not None
    assert alone is not None
    assert torch.equal(found[:, 1, :4], alone[:, 1])
    assert bool((found[:, 1, 4:] == -1).all())
    for g in (0, 2):
        for b in range(2):
            count = int(pages.count[b, g])
            assert found[b, g].tolist() == [*range(count), *[-1] * (9 - count)]
    # All heads where nothing is said of heads.
    assert torch.equal(Compose(score=SNAP, read=Pages(page=16, budget=64)).read(q, pages), alone)  # type: ignore[arg-type]


COMPOSED = {
    "lserve": Compose(static=Duo(FULL, block=16), read=Pages(page=16, budget=64, reuse=2)),
    "scored": Compose(static=Duo(FULL), score=SnapKV(share=0.2, every=8), read=Pages(page=64, budget=192)),
    "moments": Compose(static=Razor(FULL, bias="moment", moments=torch.rand(2, 3, 4, 4)), score=SNAP),
    "streaming": Compose(static=Streaming(sink=64, window=64)),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_settings_and_weights_make_it_again(name: str) -> None:
    policy = COMPOSED[name]
    written = json.loads(json.dumps(policy.settings()))
    again = policy_from(written, policy.weights())
    assert isinstance(again, Compose)
    assert again.settings() == policy.settings() == written
    assert policy.weights().keys() == again.weights().keys()
    assert all(torch.equal(again.weights()[key], x) for key, x in policy.weights().items())
    assert repr(again) == repr(policy)
    policy.check(2, 3)
    if name != "streaming":
        with pytest.raises(ConfigError, match="full: expected"):
            policy.check(2, 4)


@pytest.mark.parametrize(
    ("message", "parts"),
    [
        ("static: expected one of static, score, read at least, got none", {}),
        ("static: expected a policy that holds rows by place alone, got 'snapkv'", {"static": SNAP}),
        ("static: expected a policy that holds rows by place alone, got 'pages'", {"static": Pages()}),
        ("score: expected a policy that chooses rows to keep, got 'streaming'", {"score": Streaming()}),
        ("read: expected a policy that chooses pages to read, got 'snapkv'", {"read": SNAP}),
        ("score: expected a policy, got str", {"score": "snapkv"}),
        (
            "page: expected 64, the tokens in a block, got 16",
            {"static": Streaming(), "read": Pages(page=16)},
        ),
    ],
)
def test_parts_that_do_not_fit_are_named(message: str, parts: dict[str, Policy]) -> None:
    with pytest.raises(ConfigError) as found:
        Compose(**parts)
    assert str(found.value) == message


def test_parts_that_files_name_are_checked() -> None:
    with pytest.raises(ConfigError, match="policy: expected one of"):
        policy_from({"policy": "compose", "score": {"policy": "nothing"}})
    with pytest.raises(ConfigError, match="window: expected one of read, score, static"):
        policy_from({"policy": "compose", "window": 3})
