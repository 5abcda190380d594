r"""What a policy has chosen, done: rows stay, are dropped, or are merged by their mass.

With :math:`m_j = e^{b_j}` the mass of a row, and J(c) a row that stays and those that are merged into it,

.. math::
    m_c' = \sum_{j \in J(c)} m_j, \quad k_c' = \frac{\sum_j m_j k_j}{m_c'}, \quad v_c' = \frac{\sum_j m_j v_j}{m_c'}

in float32 or more. This is the only place that moves rows.

Heads that remember by place lose their rows to compensation rows one block at a time.

Letters: B batch, G KV heads, h heads of an extent, R rows of the head that holds most, K rows that stay, T tokens of a
call, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnzoo.cache.evicting.regions import of_heads
from attnzoo.cache.pages.extents import BlockRing, Extent
from attnzoo.cache.pages.pool import PagePool
from attnzoo.cache.pages.rows import gathered, grouped, laid, picked
from attnzoo.cache.pages.store import NOTHING
from attnzoo.cache.policies.protocol import MERGED, Keep


@dataclass(frozen=True, eq=False)
class Lost:
    """Sums over what each head has lost and still stands for, in float32 or more.

    Attributes:
        k: Keys times mass ``[B, G, D]``.
        v: Values times mass ``[B, G, Dv]``.
        mass: Mass ``[B, G]``.
        moment: What is averaged beside the keys, times mass ``[B, G]``.
    """

    k: Tensor
    v: Tensor
    mass: Tensor
    moment: Tensor

    @property
    def tensors(self) -> list[Tensor]:
        """All of these."""
        return [self.k, self.v, self.mass, self.moment]

    @classmethod
    def nothing(cls, pool: PagePool) -> Lost:
        """Of heads that have lost nothing."""
        bias = pool.tensors["bias"]
        size = (pool.batch, pool.heads)
        k, v = (bias.new_zeros(*size, pool.tensors[name].shape[2]) for name in ("k", "v"))
        return cls(k, v, bias.new_zeros(size), bias.new_zeros(size))

    def plus(self, other: Lost) -> Lost:
        """Of what both stand for."""
        return Lost(self.k + other.k, self.v + other.v, self.mass + other.mass, self.moment + other.moment)

    def select(self, index: Tensor) -> Lost:
        """Of the items ``index``."""
        k, v, mass, moment = (x.index_select(0, index) for x in self.tensors)
        return Lost(k, v, mass, moment)

    def mean(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean key ``[B, G, D]``, value and moment ``[B, G]``; zeros where nothing is lost."""
        mass = self.mass.clamp(min=torch.finfo(self.mass.dtype).tiny)
        return self.k / mass.unsqueeze(-1), self.v / mass.unsqueeze(-1), self.moment / mass


def apply(pool: PagePool, keep: Keep, stays: Tensor | None = None) -> tuple[PagePool, Lost | None]:
    """A pool with what is kept, and nothing of the old one.

    Args:
        pool: What is held, by heads none of which remember by place.
        keep: What stays of it.
        stays: Heads that keep everything whatever is said of them, bool ``[B, G]`` on the CPU.

    Returns:
        The pool, and what joins the compensation rows, where anything may.
    """
    rows, counts = gathered(pool)
    held = rows["k"].shape[2]
    where = keep.rows
    if stays is not None and bool(stays.any()):
        whole = torch.arange(held, device="cpu")
        whole = torch.where(whole < counts.unsqueeze(-1), whole, -1).to(where.device)
        where = pad(where, (0, max(0, held - where.shape[2])), value=-1)
        whole = pad(whole, (0, where.shape[2] - held), value=-1)
        where = torch.where(stays.to(where.device).unsqueeze(-1), whole, where)
    there = where >= 0
    index = where.clamp(min=0)
    kept = {}
    for name, x in rows.items():
        value = picked(x, index)
        absent = ~there.view(*there.shape, *[1] * (x.dim() - 3))
        kept[name] = value.masked_fill_(absent.to(x.device), NOTHING[name])
    lost = None
    if keep.into is not None:
        lost = _merge(rows, kept, where, keep)
    left = there.sum(-1).cpu()
    most = int(left.max()) if left.numel() else 0
    rings: list[BlockRing | None] = [None] * pool.heads
    extents = grouped(left, rings, pool.page)
    made = laid({name: x[:, :, :most] for name, x in kept.items()}, extents, pool, pool.batch)
    made.weighed = pool.weighed or (keep.into is not None and keep.weighs)
    return made, lost


def _merge(rows: dict[str, Tensor], kept: dict[str, Tensor], where: Tensor, keep: Keep) -> Lost | None:
    """Puts the means of rows and what is merged into them in their places; gives what joins compensation rows."""
    into = keep.into
    if into is None:
        return None
    batch, heads, held, _ = rows["k"].shape
    count = where.shape[2]
    # Which row each one joins: of those that stay itself; behind them nothing, and the compensation row.
    nowhere = count
    compensation = count + 1
    target = torch.where(into == MERGED, compensation, torch.where(into < 0, nowhere, into))
    target = torch.where(rows["position"] < 0, nowhere, target)
    own = torch.arange(count, device=where.device).expand(batch, heads, -1)
    behind = torch.where(where < 0, held, where)
    target = pad(target, (0, 1)).scatter(2, behind, own)[:, :, :held]
    bias = rows["bias"]
    mass = bias.exp() if keep.weighs else (bias > -torch.inf).to(bias.dtype)
    mass_of = mass.new_zeros(batch, heads, count + 2).scatter_add_(2, target, mass)
    number = mass.new_zeros(batch, heads, count + 2).scatter_add_(2, target, torch.ones_like(mass))
    joined = number[:, :, :count] > 1
    sums = {}
    for name in ("k", "v"):
        value = rows[name].to(mass) * mass.unsqueeze(-1)
        total = value.new_zeros(batch, heads, count + 2, value.shape[3])
        sums[name] = total.scatter_add_(2, target.unsqueeze(-1).expand_as(value), value)
        mean = sums[name][:, :, :count] / mass_of[:, :, :count].unsqueeze(-1)
        # A row that nothing joins stays as it is, to the last bit.
        plain = kept[name].to(mass.device)
        kept[name].copy_(torch.where(joined.unsqueeze(-1), mean.to(plain.dtype), plain))
    if keep.weighs:
        kept["bias"].copy_(torch.where(joined, mass_of[:, :, :count].log(), kept["bias"]))
    if not bool((into == MERGED).any()):
        return None
    moment = rows.get("moment")
    moments = torch.zeros_like(mass_of[:, :, compensation])
    if moment is not None:
        moments = (moment * mass * (target == compensation)).sum(-1)
    return Lost(sums["k"][:, :, -1], sums["v"][:, :, -1], mass_of[:, :, -1], moments)


def leaving(pool: PagePool, values: Mapping[str, Tensor], lengths: int | Tensor, tokens: int | Tensor) -> Lost | None:
    """The rows that a call's tokens push out, held or its own; ``None`` where there are none.

    Args:
        pool: What is held before.
        values: The call's keys, values and sidecars ``[B, G, T, ...]``.
        lengths: Its tokens of each item, an int or int64 ``[B]`` on the CPU.
        tokens: Tokens seen before, likewise.
    """
    lost = None
    for extent in pool.extents:
        ring = extent.ring
        if ring is None:
            continue
        after = tokens + lengths
        most = after if isinstance(after, int) else int(after.max()) if after.numel() else 0
        if -(-most // pool.page) <= ring.pages:
            continue
        count = values["k"].shape[2]
        if isinstance(tokens, int) and count == 1 and tokens % pool.page:
            continue
        last = _column((after + pool.page - 1) // pool.page - 1, pool.device)
        gone = last - ring.local - ring.spare
        if lost is None:
            lost = Lost.nothing(pool)
        # Of the rows held, and of those that are never written.
        block = pool.view("position", extent) // pool.page
        _add(lost, extent, pool.rows_in_place(extent), (block >= ring.sink) & (block <= gone))
        token = torch.arange(count, device=pool.device)
        block = (token + _column(tokens, pool.device)) // pool.page
        leaves = (block >= ring.sink) & (block <= gone) & (token < _column(lengths, pool.device))
        own = {name: of_heads(x, extent.heads) for name, x in values.items()}
        _add(lost, extent, own, leaves.expand(pool.batch, len(extent.heads), -1))
    return lost


def hidden(pool: PagePool) -> Lost:
    """The rows that are held so that tokens may be taken back, which the next token does not read."""
    lost = Lost.nothing(pool)
    for extent in pool.extents:
        if extent.ring is not None:
            out_of_sight = (pool.view("position", extent) >= 0) & (pool.view("bias", extent) == -torch.inf)
            _add(lost, extent, pool.rows_in_place(extent), out_of_sight)
    return lost


def _add(lost: Lost, extent: Extent, rows: Mapping[str, Tensor], which: Tensor) -> None:
    """Adds some rows ``[B, h, R]`` to what their heads have lost."""
    heads = list(extent.heads)
    dtype = lost.mass.dtype
    for name, total in (("k", lost.k), ("v", lost.v)):
        # Rows that stay may hold anything.
        x = rows[name]
        value = x.to(dtype).masked_fill(~which.unsqueeze(-1).to(x.device), 0)
        total[:, heads] += value.sum(2).to(total.device)
    lost.mass[:, heads] += which.sum(-1).to(dtype)
    if "moment" in rows:
        lost.moment[:, heads] += rows["moment"].to(dtype).masked_fill(~which, 0).sum(-1)


def _column(numbers: int | Tensor, device: torch.device) -> int | Tensor:
    """Numbers of items beside ``[B, h, R]``."""
    return numbers if isinstance(numbers, int) else numbers.to(device).view(-1, 1, 1)
