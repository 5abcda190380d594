"""Every policy of the registry at small sizes, beside what the oracle calls it. A policy without an entry fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo.cache.policies.compose import Compose
from attnzoo.cache.policies.ems import EMS
from attnzoo.cache.policies.known import Duo, Policy, Streaming, policies
from attnzoo.cache.policies.locret import Locret, RetainingHead
from attnzoo.cache.policies.razor import Razor
from attnzoo.cache.policies.reading import Pages
from attnzoo.cache.policies.scored import H2O, TOVA, KNorm, SnapKV
from attnzoo.oracles.evictions import Choice, retaining_scores
from attnzoo.oracles.policies import Near, PageChoice, Remembers

ALL = 1000
"""Rows for everything that a test ever sees."""

Given = Callable[[Tensor, Tensor, Tensor], Tensor | None]


def _nothing(q: Tensor, k: Tensor, v: Tensor) -> None:
    return None


@dataclass(frozen=True, eq=False)
class Setting:
    """A policy of one layer with two KV heads.

    Attributes:
        make: Makes it.
        heads: What each KV head does, as the oracle says it.
        by_place: Whether what is held follows from place alone, so that calls are cut at will.
        given: Scores ``[G, T]`` that rows come with, from queries ``[T, H, D]``, keys and values before rotation.
    """

    make: Callable[[], Policy]
    heads: tuple[Remembers, Remembers]
    by_place: bool = False
    given: Given = _nothing


@dataclass(frozen=True, eq=False)
class Entry:
    """What is tried of one policy.

    Attributes:
        settings: Sizes at which it leaves something out.
        dense: It at a size at which it leaves out nothing of 40 tokens.
        refused: Settings that it refuses, each with the word that the error begins with.
        slack: It with tokens that may be taken back, where it can.
        forgets: Whether anything is lost for good.
    """

    settings: tuple[Setting, ...]
    dense: Callable[[], Policy]
    refused: tuple[tuple[Mapping[str, Any], str], ...]
    slack: Callable[[int], Policy] | None = None
    forgets: bool = True


def by_place(*, sink: int, local: int, fold: bool = False) -> Remembers:
    """A head that forgets by place, in blocks of four."""
    return Remembers(near=Near(block=4, sink=sink, local=local, fold=fold))


FULL = torch.tensor([False, True])

TABLE: dict[str, Entry] = {
    "streaming": Entry(
        settings=(
            Setting(lambda: Streaming(sink=4, window=4, block=4), (by_place(sink=1, local=2),) * 2, by_place=True),
            Setting(lambda: Streaming(sink=0, window=8, block=4), (by_place(sink=0, local=3),) * 2, by_place=True),
        ),
        dense=lambda: Streaming(sink=8, window=40, block=4),
        refused=(({"window": 3, "block": 4}, "window"), ({"sink": -4, "block": 4}, "sink"), ({"block": 0}, "block")),
        slack=lambda n: Streaming(sink=4, window=4, block=4, slack=n),
    ),
    "duo": Entry(
        settings=(
            Setting(
                lambda: Duo(FULL, sink=4, window=4, block=4),
                (by_place(sink=1, local=2), Remembers()),
                by_place=True,
            ),
        ),
        dense=lambda: Duo(torch.tensor([True, True]), sink=4, window=4, block=4),
        refused=(
            ({"full": torch.zeros(2)}, "full"),
            ({"full": torch.zeros(2, 2, 2, dtype=torch.bool)}, "full"),
            ({"full": FULL, "window": 3, "block": 4}, "window"),
        ),
        slack=lambda n: Duo(FULL, sink=4, window=4, block=4, slack=n),
    ),
}


def scored(policy: Callable[[], Policy], **choice: Any) -> Setting:
    """A policy under which both KV heads choose by score."""
    return Setting(policy, (Remembers(choice=Choice(**choice)),) * 2)


TABLE["snapkv"] = Entry(
    settings=(
        scored(
            lambda: SnapKV(budget=9, sink=1, window=4, pool=3, page=4),
            score="window",
            budget=9,
            sink=1,
            recent=4,
            window=4,
            pool=3,
        ),
        scored(
            lambda: SnapKV(share=0.4, sink=2, window=3, pool=1, page=3, every=2, group="mean"),
            score="window",
            share=0.4,
            sink=2,
            recent=3,
            window=3,
            every=2,
            group="mean",
        ),
    ),
    dense=lambda: SnapKV(budget=ALL, page=4),
    slack=lambda n: SnapKV(budget=9, sink=1, window=4, pool=3, page=4, slack=n, every=2),
    refused=(
        ({"budget": 10, "sink": 4, "window": 8}, "budget"),
        ({}, "budget"),
        ({"budget": 99, "share": 0.5}, "budget"),
        ({"share": 1.5}, "share"),
        ({"budget": 99, "pool": 4}, "pool"),
        ({"budget": 99, "window": 0}, "window"),
        ({"budget": 99, "group": "sum"}, "group"),
        ({"budget": 99, "every": 0}, "every"),
    ),
)
TABLE["h2o"] = Entry(
    settings=(
        scored(
            lambda: H2O(budget=8, sink=1, every=3, page=4),
            score="mass",
            budget=8,
            sink=1,
            recent=3,
            every=3,
        ),
        scored(
            lambda: H2O(budget=7, window=2, local=0.0, every=None, page=4, group="mean"),
            score="mass",
            budget=7,
            recent=2,
            group="mean",
        ),
    ),
    dense=lambda: H2O(budget=ALL, page=4),
    refused=(({"budget": 0}, "budget"), ({"budget": 9, "local": 2}, "local")),
)
TABLE["tova"] = Entry(
    settings=(
        scored(
            lambda: TOVA(budget=7, every=1, page=4),
            score="window",
            budget=7,
            recent=1,
            every=1,
            group="mean",
        ),
    ),
    dense=lambda: TOVA(budget=ALL, page=4),
    slack=lambda n: TOVA(budget=7, every=1, page=4, slack=n),
    refused=(({"budget": 0}, "budget"), ({"budget": 9, "window": 0}, "window")),
)
TABLE["knorm"] = Entry(
    settings=(
        scored(
            lambda: KNorm(budget=9, sink=2, window=3, page=4, every=4),
            score="norm",
            budget=9,
            sink=2,
            recent=3,
            every=4,
        ),
    ),
    dense=lambda: KNorm(budget=ALL, page=4),
    slack=lambda n: KNorm(budget=9, sink=2, window=3, page=4, every=4, slack=n),
    refused=(({"budget": 4, "sink": 2, "window": 3}, "budget"), ({"budget": 99, "page": 0}, "page")),
)
TABLE["ems"] = Entry(
    settings=(
        scored(
            lambda: EMS(budget=8, sink=1, window=3, pool=3, similarity=0.1, page=4, every=3),
            score="ems", budget=8, sink=1, recent=3, window=3, pool=3, similarity=0.1, every=3,
        ),
        scored(
            lambda: EMS(budget=8, sink=1, window=3, pool=1, similarity=-1.0, weighs=False, page=4),
            score="ems", budget=8, sink=1, recent=3, window=3, similarity=-1.0, weighs=False,
        ),
    ),
    dense=lambda: EMS(budget=ALL, page=4),
    refused=(({"budget": 10, "sink": 4, "window": 8}, "budget"), ({"budget": 99, "pool": 2}, "pool")),
)  # fmt: skip


MOMENTS = torch.eye(6, dtype=torch.float64) + torch.full((6, 6), 0.5, dtype=torch.float64)

TABLE["razor"] = Entry(
    settings=(
        Setting(
            lambda: Razor(FULL, sink=4, window=4, block=4),
            (by_place(sink=1, local=2, fold=True), Remembers()),
            by_place=True,
        ),
        Setting(
            lambda: Razor(~FULL & False, sink=0, window=0, block=4, bias="moment", moments=MOMENTS.expand(2, 6, 6)),
            (Remembers(near=Near(block=4, local=1, fold=True, second=MOMENTS)),) * 2,
            by_place=True,
        ),
    ),
    dense=lambda: Razor(FULL, sink=4, window=40, block=4),
    slack=lambda n: Razor(FULL, sink=4, window=4, block=4, slack=n),
    refused=(
        ({"full": FULL, "fold": "unrotated"}, "fold"),
        ({"full": FULL, "bias": "moment"}, "moments"),
        ({"full": FULL, "bias": "mean"}, "bias"),
        ({"full": FULL, "window": 3, "block": 4}, "window"),
    ),
)
READS = PageChoice(page=2, pages=4)
TABLE["pages"] = Entry(
    settings=(
        Setting(lambda: Pages(page=2, budget=9), (Remembers(pages=READS),) * 2),
        Setting(
            lambda: Pages(page=2, budget=8, full=FULL, reuse=3),
            (Remembers(pages=PageChoice(page=2, pages=4, reuse=3)), Remembers()),
        ),
    ),
    dense=lambda: Pages(page=2, budget=80),
    refused=(
        ({"page": 16, "budget": 47}, "budget"),
        ({"page": 0}, "page"),
        ({"reuse": 0}, "reuse"),
        ({"full": torch.zeros(2)}, "full"),
    ),
    slack=lambda n: Pages(page=2, budget=9, slack=n),
    forgets=False,
)
SNAPKV = {"score": "window", "budget": 9, "sink": 1, "recent": 4, "window": 4, "pool": 3}
TABLE["compose"] = Entry(
    settings=(
        # LServe.
        Setting(
            lambda: Compose(static=Duo(FULL, sink=4, window=4, block=4), read=Pages(page=4, budget=16)),
            (by_place(sink=1, local=2), Remembers(pages=PageChoice(page=4, pages=4))),
        ),
        Setting(
            lambda: Compose(
                static=Razor(FULL, sink=4, window=4, block=4), score=SnapKV(budget=9, sink=1, window=4, pool=3, every=4)
            ),
            (Remembers(choice=Choice(**SNAPKV, every=4, fold=True)), Remembers()),
        ),
        Setting(
            lambda: Compose(score=SnapKV(budget=12, sink=1, window=4, pool=3), read=Pages(page=2, budget=8)),
            (Remembers(choice=Choice(**SNAPKV | {"budget": 12}), pages=READS),) * 2,
        ),
    ),
    dense=lambda: Compose(static=Duo(FULL, sink=4, window=40, block=4), read=Pages(page=4, budget=80)),
    slack=lambda n: Compose(static=Duo(FULL, sink=4, window=4, block=4, slack=n), read=Pages(page=4, budget=16)),
    refused=(
        ({}, "static"),
        ({"static": SnapKV(budget=99)}, "static"),
        ({"score": Pages()}, "score"),
        ({"read": 3}, "read"),
        ({"static": Streaming(block=64), "read": Pages(page=48)}, "page"),
    ),
)


FIRST = torch.randn(5, 8 * 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
SECOND = torch.randn(2, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def retained(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores of a retaining head with these weights."""
    return retaining_scores(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), FIRST, SECOND)


TABLE["locret"] = Entry(
    settings=(
        Setting(
            lambda: Locret([RetainingHead.of_weights(FIRST, SECOND)], budget=9, local=3, page=4),
            (Remembers(choice=Choice(score="given", budget=9, recent=3)),) * 2,
            given=retained,
        ),
        Setting(
            lambda: Locret([RetainingHead.of_weights(FIRST, SECOND)], share=0.5, sink=1, local=2, every=2, page=4),
            (Remembers(choice=Choice(score="given", share=0.5, sink=1, recent=2, every=2)),) * 2,
            given=retained,
        ),
    ),
    dense=lambda: Locret([RetainingHead.of_weights(FIRST, SECOND)], budget=ALL),
    slack=lambda n: Locret([RetainingHead.of_weights(FIRST, SECOND)], budget=9, local=3, page=4, slack=n),
    refused=(
        ({"retaining": (), "budget": 200}, "retaining"),
        ({"retaining": [RetainingHead(48, 2)], "budget": 99}, "budget"),
        ({"retaining": [RetainingHead(48, 2)], "budget": 200, "local": -1}, "local"),
    ),
)


def entry_of(name: str) -> Entry:
    """What is tried of a policy of the registry."""
    assert name in TABLE, (
        f"policy {name!r} has no entry in tests/attnzoo/policies/settings.py: add small settings of it"
    )
    return TABLE[name]


def names() -> list[str]:
    """Every policy's name."""
    return sorted(policies)
