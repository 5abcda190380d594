"""What was found about each head of a model.

Letters: L attention layers, H query heads, G KV heads; a KV head's group are the H / G query heads that read it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnzoo.reporting.choices import check_choice
from attnzoo.reporting.tables import Grid, lines
from attnzoo_kernels.errors import ConfigError

PRINTED = 10
"""Heads of each kind that are printed."""

WIDTH = 100


@dataclass(frozen=True)
class RankedHead:
    """A query head and its score.

    Attributes:
        layer: Among the model's attention blocks.
        head: Among the layer's query heads.
        kv_head: The KV head that it reads.
        score: Of some kind.
    """

    layer: int
    head: int
    kv_head: int
    score: float


@dataclass(frozen=True, eq=False)
class HeadScores:
    """Scores of all query heads of a model, of one kind or several; the higher, the more of it a head does.

    Attributes:
        scores: By kind, on the CPU, fp32 or fp64 ``[L, H]``.
        kv_heads: G.
        about: How they were found, as plain data.

    Raises:
        ConfigError: If there is no kind, shapes disagree, a score is not finite, or H is no multiple of G.
    """

    scores: Mapping[str, Tensor]
    kv_heads: int
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.scores:
            raise ConfigError("scores: expected at least one kind, got none")
        first = next(iter(self.scores.values()))
        for kind, found in self.scores.items():
            if found.dim() != 2 or found.shape != first.shape or found.numel() == 0:
                raise ConfigError(f"scores: expected [L, H] for each kind, got {list(found.shape)} as {kind!r}")
            if not bool(found.isfinite().all()):
                raise ConfigError(f"scores: expected finite ones, got others as {kind!r}")
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ConfigError(f"kv_heads: expected a divisor of {self.heads} query heads, got {self.kv_heads}")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of scores, in order."""
        return tuple(self.scores)

    @property
    def layers(self) -> int:
        """L."""
        return int(self[self.kinds[0]].shape[0])

    @property
    def heads(self) -> int:
        """H."""
        return int(self[self.kinds[0]].shape[1])

    def __getitem__(self, kind: str) -> Tensor:
        """The scores of one kind ``[L, H]``.

        Raises:
            ConfigError: If there are none of it.
        """
        check_choice("kind", kind, self.scores)
        return self.scores[kind]

    def kv(self, kind: str) -> Tensor:
        """Scores of KV heads ``[L, G]``: the largest of a head's group, whose one such head is reason to keep it.

        Raises:
            ConfigError: If there are none of that kind.
        """
        groups: Tensor = self[kind].view(self.layers, self.kv_heads, -1)
        return groups.amax(2)

    def top(self, kind: str, count: int) -> list[RankedHead]:
        """The query heads of the highest scores, best first; equal ones by layer, then by head.

        Raises:
            ConfigError: If there are no scores of that kind, or not so many heads.
        """
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= self[kind].numel():
            raise ConfigError(f"count: expected an int from 0 to {self[kind].numel()}, got {count!r}")
        order = torch.argsort(self[kind].flatten(), descending=True, stable=True)[:count]
        group = self.heads // self.kv_heads
        found: list[RankedHead] = []
        for index in order.tolist():
            layer, head = divmod(index, self.heads)
            found.append(RankedHead(layer, head, head // group, float(self[kind][layer, head])))
        return found

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON; :meth:`from_dict` reads it."""
        return {
            "kv_heads": self.kv_heads,
            "about": dict(self.about),
            "scores": {kind: found.tolist() for kind, found in self.scores.items()},
        }

    def to_json(self) -> str:
        """As JSON."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> HeadScores:
        """What :meth:`to_dict` has written.

        Raises:
            ConfigError: If it is something else.
        """
        try:
            scores = {kind: torch.tensor(rows, device="cpu") for kind, rows in dict(data["scores"]).items()}
            kv_heads = int(data["kv_heads"])
            about = dict(data.get("about", {}))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"scores: expected what HeadScores.to_dict() gives, got something else: {error}"
            ) from error
        return cls(scores, kv_heads, about)

    @classmethod
    def from_json(cls, text: str) -> HeadScores:
        """What :meth:`to_json` has written.

        Raises:
            ConfigError: If it is something else.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"scores: expected JSON, got something else: {error}") from error
        return cls.from_dict(data)

    def grid(self, count: int = PRINTED) -> Grid:
        """The heads of the highest scores of each kind, as a table."""
        count = min(count, self.layers * self.heads)
        columns = [self.top(kind, count) for kind in self.kinds]
        rows: list[list[str]] = []
        for place in range(count):
            cells = [str(place + 1)]
            for column in columns:
                one = column[place]
                cells += [f"{one.layer}, {one.head}", f"{one.kv_head}", f"{one.score:.3f}"]
            rows.append(cells)
        heads = ["rank"]
        for kind in self.kinds:
            heads += ["layer, head", "KV head", kind]
        title = f"{self.layers * self.heads} query heads, {self.layers * self.kv_heads} KV heads"
        numbers = frozenset(place for place in range(len(heads)) if place % 3 != 1)
        return Grid(heads, rows, title=title, numbers=numbers)

    def __str__(self) -> str:
        return "\n".join(line for line, _ in lines(self.grid(), WIDTH))
