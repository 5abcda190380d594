"""What a policy says: which rows the KV heads of a layer hold, and which of them a call reads.

A *row* of a cache is a key, a value and a bias, the logarithm of the mass that it stands for: 0 for a token, log n for
n tokens that were merged. Attention is over all rows that are held and over the call's own tokens, so that every method
is a choice of rows and of biases. Policies are settings and pure functions of what they are shown; what is held belongs
to the cache.

Letters: L layers, B batch, H query heads, G KV heads, C rows of the head that holds most, K rows that are kept, D key
width, Dv value width, P pages of the head that has most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnzoo.cache.retention import Retention
from attnzoo_kernels.errors import ConfigError

MERGED = -2
"""In :attr:`Keep.into`: the row joins the one that stands for all that its head has lost."""

DROPPED = -1
"""In :attr:`Keep.into`: nothing is left of the row."""


@dataclass(frozen=True, eq=False)
class Seen:
    """The rows that a layer holds, as a policy is shown them; heads with fewer than C have nothing behind.

    Attributes:
        k: Keys as they are held, rotated, ``[B, G, C, D]``.
        v: Values ``[B, G, C, Dv]``.
        position: Of each row in its item's sequence, int64 ``[B, G, C]``, ascending; -1 where there is no row. A merged
            row has that of its centre.
        bias: Logarithm of each row's mass ``[B, G, C]``; -inf where there is no row.
        tokens: Tokens that each item has seen, int64 ``[B]``.
        signals: What :attr:`Policy.needs` names, each ``[B, G, C]``.
    """

    k: Tensor
    v: Tensor
    position: Tensor
    bias: Tensor
    tokens: Tensor
    signals: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def held(self) -> Tensor:
        """Where there is a row, bool ``[B, G, C]``."""
        return self.position >= 0


@dataclass(frozen=True, eq=False)
class Keep:
    """What stays of the rows that are held.

    Attributes:
        rows: Places among the rows held, int64 ``[B, G, K]``, ascending, -1 behind where a head keeps fewer.
        into: For every row that does not stay: the place in ``rows`` of the one that it is merged into, ``DROPPED`` or
            ``MERGED``, int64 ``[B, G, C]``; ``None`` drops all. Rows that stay, and places without a row, are not read.
        weighs: Whether a merged row stands for the mass of all; else it counts as much as its centre did.
    """

    rows: Tensor
    into: Tensor | None = None
    weighs: bool = True


@dataclass(frozen=True, eq=False)
class PageBounds:
    """What is known of each page of keys that a layer holds, channel by channel.

    Attributes:
        least: The smallest of the rotated keys ``[B, G, P, D]``.
        most: The largest ``[B, G, P, D]``.
        count: Pages of each head, int64 ``[B, G]``; what lies behind is no page.
        rows: Rows in a page.
    """

    least: Tensor
    most: Tensor
    count: Tensor
    rows: int


NEEDS = frozenset({"window_mass", "mass", "score", "page_bounds"})
"""What a policy may ask for: see :attr:`Policy.needs`."""


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Policy:
    """What the KV heads of one layer, or of all layers of a model, remember.

    A subclass enters :data:`policies` by its class statement, ``class KNorm(Policy, name="knorm")``, and is found by
    its name in files and on the command line.

    Attributes:
        needs: What the cache works out for it, and nothing else: "window_mass", the share of attention that the last
            ``window`` queries give to each row, mean of these queries; "mass", the same of all queries, each counted
            where it could see the row; "score", what :meth:`scores_of` said when the row came; "page_bounds".
        window: The last queries of "window_mass".
        group: How the query heads of a KV head are joined in "window_mass" and "mass": "max" or "mean".
        every: Tokens between two compactions while decoding; ``None`` compacts behind a prompt alone.
        page: Rows in a page, where pages are read or rows are held by place; else those of the pool may have fewer.
        slack: Tokens that an eviction is deferred by, so that as many can be taken back.
        reuse: Decoding steps that one answer of :meth:`read` serves; a page that is begun meanwhile is read too.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()

    window: int = 0
    group: str = "max"
    every: int | None = None
    page: int = 64
    slack: int = 0
    reuse: int = 1

    def __init_subclass__(cls, name: str | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        if name is not None:
            cls.name = name
            policies[name] = cls

    def __repr__(self) -> str:
        told = [f"{f.name}={_told(getattr(self, f.name))}" for f in fields(self) if f.init and self._differs(f)]
        return f"{type(self).__name__}({', '.join(told)})"

    def _differs(self, setting: Field[Any]) -> bool:
        """Whether a setting is another one than if nothing were said."""
        value = getattr(self, setting.name)
        return value is not setting.default and (isinstance(value, Tensor) or value != setting.default)

    def of_layer(self, layer: int) -> Policy:
        """The policy of one layer of the model; the same where all layers have the same.

        Raises:
            ConfigError: If it says nothing about such a layer.
        """
        return self

    def check(self, layers: int, kv_heads: int) -> None:
        """Raises unless the policy fits a model of so many attention layers, each with so many KV heads.

        Raises:
            ConfigError: Naming the setting, what came and what was expected.
        """

    def retention(self, kv_heads: int) -> Retention | None:
        """What is held by place alone, by the KV heads of one layer; ``None`` where that is everything.

        Where :meth:`keep` is a policy's own as well, it chooses for heads that do not keep everything.
        """
        return None

    @property
    def folds(self) -> bool:
        """Whether rows that a head loses by place join its compensation row, as ``MERGED`` ones do.

        That row is the mean, weighed by mass, of the keys and of the values that the head has lost, as they were held;
        it is kept in float32 or more, and updated as rows leave. Its bias is :meth:`fold_bias`.
        """
        return False

    @property
    def joins_rows(self) -> bool:
        """Whether rows may come to stand for several tokens: :meth:`keep` merges, or :attr:`folds`."""
        return self.folds

    def moment_of(self, k: Tensor) -> Tensor | None:
        """What is averaged beside the keys that join compensation rows; ``None`` where that is nothing.

        Args:
            k: Keys as they are held ``[B, G, T, D]``.

        Returns:
            ``[B, G, T]``.
        """
        return None

    def fold_bias(self, k: Tensor, mass: Tensor, moment: Tensor | None = None) -> Tensor:
        """The bias of compensation rows: the logarithm of their mass.

        Args:
            k: The compensation rows' keys ``[B, G, D]``.
            mass: Tokens that they stand for ``[B, G]``; 0 where nothing is lost.
            moment: Mean of what :meth:`moment_of` has said of these tokens ``[B, G]``.

        Returns:
            ``[B, G]``; -inf where nothing is lost.
        """
        return mass.log()

    @property
    def compacts(self) -> bool:
        """Whether rows are chosen by what they hold: see :meth:`keep`."""
        return type(self).keep is not Policy.keep

    @property
    def reads_pages(self) -> bool:
        """Whether a decoding row reads some of the pages alone: see :meth:`read`."""
        return type(self).read is not Policy.read

    @property
    def is_static(self) -> bool:
        """Whether what is held and read follows from place alone."""
        return not (self.compacts or self.reads_pages or self.folds or self.needs)

    def equals(self, other: Policy) -> bool:
        """Whether another policy is the same: its settings and weights."""
        if other is self:
            return True
        mine = self.weights()
        others = other.weights()
        same = self.settings() == other.settings() and mine.keys() == others.keys()
        return same and all(torch.equal(x, others[name]) for name, x in mine.items())

    def scores_of(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The score of each row when it comes, for those that need "score".

        Args:
            q: The queries of the same tokens before rotation ``[B, H, T, D]``.
            k: Their keys before rotation ``[B, G, T, D]``.
            v: Their values ``[B, G, T, Dv]``.

        Returns:
            ``[B, G, T]``.
        """
        raise NotImplementedError

    def keep(self, seen: Seen) -> Keep | None:
        """What stays of the rows held, asked behind a prompt and every :attr:`every` tokens; ``None`` keeps all."""
        return None

    def read(self, q: Tensor, pages: PageBounds) -> Tensor | None:
        """Which pages a decoding row reads; nothing is freed by that.

        Args:
            q: Rotated queries ``[B, H, 1, D]``.
            pages: What is known of the pages held; the last one of a head is being filled.

        Returns:
            Numbers of pages, int64 ``[B, G, K]``, ascending, -1 behind where a head reads fewer; ``None`` reads all.
        """
        return None

    def settings(self) -> dict[str, Any]:
        """The settings as JSON has them, without tensors of weights: what :func:`policy_from` makes it from again.

        A policy that is made of others holds their settings.
        """
        return {"policy": self.name, **{f.name: _as_json(getattr(self, f.name)) for f in fields(self) if f.init}}

    @classmethod
    def setting_names(cls) -> frozenset[str]:
        """What a policy of this class can be told."""
        return frozenset(f.name for f in fields(cls) if f.init)

    def weights(self) -> dict[str, Tensor]:
        """Tensors that settings do not hold, by name: trained scores."""
        return {}

    @classmethod
    def restored(cls, settings: dict[str, Any], weights: dict[str, Tensor]) -> Policy:
        """The policy with settings as JSON has them, and with :meth:`weights`."""
        make: Any = cls
        made: Policy = make(**settings, **weights)
        return made


policies: dict[str, type[Policy]] = {}
"""Every policy's class by its name."""


def _told(value: Any) -> str:
    """A setting in a line: of tensors, and of what holds some, how large they are."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return f"{len(value)} layers" if isinstance(value, tuple) else repr(value)


def _as_json(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value


def policy_from(settings: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None) -> Policy:
    """The policy that settings describe.

    Args:
        settings: What :meth:`Policy.settings` has said.
        weights: What :meth:`Policy.weights` has said.

    Raises:
        ConfigError: If there is no policy of that name, or a setting is unknown or does not fit.
    """
    rest = dict(settings)
    name = rest.pop("policy", None)
    found = policies.get(name) if isinstance(name, str) else None
    if found is None:
        raise ConfigError(f"policy: expected one of {', '.join(sorted(policies))}, got {name!r}")
    known = found.setting_names()
    unknown = sorted(rest.keys() - known)
    if unknown:
        raise ConfigError(f"{unknown[0]}: expected one of {', '.join(sorted(known))}, the settings of {name!r}")
    return found.restored(rest, dict(weights or {}))
