"""Policies put together by part: which heads keep everything, what the others keep, and what is read of it.

LServe is ``Compose(static=Duo(full, block=16), read=Pages(page=16))``: heads that keep everything read pages, the
others a sink and a window. ``Compose(static=Duo(full), score=SnapKV(budget=192))`` has the others keep what the
prompt's last queries attend to, in place of a sink and a window; with ``static=Razor(full)``, what they lose joins
their compensation row.

Letters: B batch, H query heads, G KV heads, C rows of the head that holds most, P pages of the head that has most.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnzoo.cache.policies.protocol import DROPPED, MERGED, Keep, PageBounds, Policy, Seen, policy_from
from attnzoo.cache.policies.reading import with_every_page
from attnzoo.cache.retention import Retention
from attnzoo_kernels.errors import ConfigError

PARTS = ("static", "score", "read")


class Compose(Policy, name="compose"):
    """Each part does what it does alone, to the heads that are its own.

    Without ``score``, ``static`` says what is held. With it, ``static`` says which heads keep everything, and ``score``
    what the others do; a prompt then reads all that is held. ``read`` is for the heads that keep everything, or for all
    where there is no ``static``; others read all that they hold.

    Attributes:
        static: What is held by place alone.
        score: What is held by score.
        reader: Which pages are read.

    Raises:
        ConfigError: If there is no part, one does not do what it is there for, or pages and blocks do not fit.
    """

    def __init__(
        self, *, static: Policy | None = None, score: Policy | None = None, read: Policy | None = None
    ) -> None:
        self.static = _part("static", static)
        self.score = _part("score", score)
        self.reader = _part("read", read)
        parts = self.parts()
        if not parts:
            raise ConfigError(f"static: expected one of {', '.join(PARTS)} at least, got none")
        super().__init__(
            window=0 if score is None else score.window,
            group="max" if score is None else score.group,
            every=None if score is None else score.every,
            page=_page(static, score, read),
            slack=max(part.slack for part in parts.values()),
            reuse=1 if read is None else read.reuse,
        )
        object.__setattr__(self, "needs", frozenset().union(*(part.needs for part in parts.values())))

    def __repr__(self) -> str:
        return f"Compose({', '.join(f'{name}={part!r}' for name, part in self.parts().items())})"

    def parts(self) -> dict[str, Policy]:
        """The parts that there are, by name."""
        every = zip(PARTS, (self.static, self.score, self.reader), strict=True)
        return {name: part for name, part in every if part is not None}

    def of_layer(self, layer: int) -> Compose:
        """The policy of one layer."""
        return Compose(**{name: part.of_layer(layer) for name, part in self.parts().items()})

    def check(self, layers: int, kv_heads: int) -> None:
        """Raises unless every part fits so many layers and KV heads."""
        for part in self.parts().values():
            part.check(layers, kv_heads)

    def retention(self, kv_heads: int) -> Retention | None:
        """What ``static`` holds; ``None`` where ``score`` chooses."""
        if self.static is None or self.score is not None:
            return None
        return self.static.retention(kv_heads)

    @property
    def folds(self) -> bool:
        """Whether what heads lose, by place or by score, joins a compensation row."""
        return self.static is not None and self.static.folds

    @property
    def joins_rows(self) -> bool:
        """Whether ``score`` merges rows, or some join a compensation row."""
        return self.folds or (self.score is not None and self.score.joins_rows)

    def moment_of(self, k: Tensor) -> Tensor | None:
        """What ``static`` says of keys that join compensation rows."""
        return None if self.static is None else self.static.moment_of(k)

    def fold_bias(self, k: Tensor, mass: Tensor, moment: Tensor | None = None) -> Tensor:
        """What ``static`` says of compensation rows."""
        return mass.log() if self.static is None else self.static.fold_bias(k, mass, moment)

    @property
    def compacts(self) -> bool:
        """Whether there is a part that chooses rows."""
        return self.score is not None

    @property
    def reads_pages(self) -> bool:
        """Whether there is a part that chooses pages."""
        return self.reader is not None

    def scores_of(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The score that ``score`` gives to rows when they come."""
        if self.score is None:
            return super().scores_of(q, k, v)
        return self.score.scores_of(q, k, v)

    def keep(self, seen: Seen) -> Keep | None:
        """What ``score`` keeps, and everything for heads that keep everything."""
        kept = None if self.score is None else self.score.keep(seen)
        if kept is None or self.static is None:
            return kept
        full = self._full(seen.position.shape[1])
        rows = kept.rows
        if bool(full.any()):
            held = seen.position.shape[2]
            every = torch.arange(held, device=rows.device).masked_fill(~seen.held, -1)
            rows = torch.where(full.to(rows.device)[:, None], every, pad(rows, (0, held - rows.shape[2]), value=-1))
        into = kept.into
        if self.static.folds:
            # What no row takes in joins the one for all that is lost.
            lost = torch.full_like(seen.position, DROPPED) if into is None else into
            into = lost.masked_fill(lost == DROPPED, MERGED)
        return Keep(rows, into, kept.weighs)

    def read(self, q: Tensor, pages: PageBounds) -> Tensor | None:
        """What ``read`` chooses, and every page for heads that do not keep everything."""
        rows = None if self.reader is None else self.reader.read(q, pages)
        if rows is None or self.static is None:
            return rows
        return with_every_page(rows, pages, ~self._full(rows.shape[1]))

    def settings(self) -> dict[str, Any]:
        """The settings of each part, or ``None``."""
        parts = self.parts()
        return {"policy": self.name, **{name: parts[name].settings() if name in parts else None for name in PARTS}}

    @classmethod
    def setting_names(cls) -> frozenset[str]:
        """The parts."""
        return frozenset(PARTS)

    def weights(self) -> dict[str, Tensor]:
        """Those of each part, behind its name and a dot."""
        return {f"{name}.{key}": x for name, part in self.parts().items() for key, x in part.weights().items()}

    @classmethod
    def restored(cls, settings: dict[str, Any], weights: dict[str, Tensor]) -> Self:
        """The policy with the parts that settings describe."""
        parts = {name: own for name, own in settings.items() if own is not None}
        return cls(**{name: policy_from(own, _of_part(name, weights)) for name, own in parts.items()})

    def _full(self, kv_heads: int) -> Tensor:
        """Which KV heads keep everything, bool ``[G]``."""
        held = None if self.static is None else self.static.retention(kv_heads)
        return torch.tensor([True] * kv_heads if held is None else held.full, device="cpu")


def _part(name: str, part: Policy | None) -> Policy | None:
    """A part that does what one of its name is there for.

    Raises:
        ConfigError: If it does something else.
    """
    if part is None:
        return None
    if not isinstance(part, Policy):
        raise ConfigError(f"{name}: expected a policy, got {type(part).__name__}")
    does = {"score": part.compacts, "read": part.reads_pages}
    does["static"] = type(part).retention is not Policy.retention and not any(does.values())
    if not does[name] or sum(does.values()) != 1:
        what = {"static": "holds rows by place alone", "score": "chooses rows to keep", "read": "chooses pages to read"}
        raise ConfigError(f"{name}: expected a policy that {what[name]}, got {part.name!r}")
    return part


def _page(static: Policy | None, score: Policy | None, read: Policy | None) -> int:
    """Rows in a page: as many as are read at a time, or as leave at a time."""
    if read is not None and static is not None and static.page != read.page:
        raise ConfigError(f"page: expected {static.page}, the tokens in a block, got {read.page}")
    first = [part for part in (read, static, score) if part is not None]
    return first[0].page


def _of_part(name: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.partition(".")[2]: x for key, x in weights.items() if key.partition(".")[0] == name}
