"""Rows as a policy is shown them, made by hand: ragged, with junk where there is no row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnzoo.cache.policies.protocol import NEEDS, Keep, Policy, Seen


def seen_of(
    policy: Policy,
    rows: Sequence[Sequence[int]],
    *,
    tokens: Sequence[int] | None = None,
    seed: int = 0,
    width: int | None = None,
    junk: float = float("nan"),
) -> Seen:
    """What heads hold that have ``rows[b][g]`` rows, with the signals that the policy needs and no other.

    Each item has lost tokens before, so that positions have gaps; its last token is always held.
    """
    generator = torch.Generator().manual_seed(seed)
    batch, heads = len(rows), len(rows[0])
    width = max(max(row) for row in rows) if width is None else width
    tokens = [max(row) + 7 * b for b, row in enumerate(rows)] if tokens is None else tokens
    position = torch.full((batch, heads, width), -1)
    k = torch.full((batch, heads, width, 6), junk)
    v = torch.full((batch, heads, width, 5), junk)
    bias = torch.full((batch, heads, width), -torch.inf)
    signals = {name: torch.full((batch, heads, width), junk) for name in policy.needs & NEEDS - {"page_bounds"}}
    for b in range(batch):
        for g in range(heads):
            n = rows[b][g]
            if n == 0:
                continue
            others = torch.randperm(tokens[b] - 1, generator=generator)[: n - 1]
            position[b, g, :n] = torch.cat([others, torch.tensor([tokens[b] - 1])]).sort().values
            k[b, g, :n] = torch.randn(n, 6, generator=generator)
            v[b, g, :n] = torch.randn(n, 5, generator=generator)
            bias[b, g, :n] = torch.rand(n, generator=generator).mul(3).floor().add(1).log()
            for signal in signals.values():
                # Few values, so that many are equal.
                signal[b, g, :n] = torch.randint(0, 6, (n,), generator=generator) / 8
    return Seen(k, v, position, bias, torch.tensor(tokens), signals)


def item(seen: Seen, b: int) -> Seen:
    """One item alone."""
    signals = {name: x[b : b + 1] for name, x in seen.signals.items()}
    own = slice(b, b + 1)
    return Seen(seen.k[own], seen.v[own], seen.position[own], seen.bias[own], seen.tokens[own], signals)


def chosen(keep: Keep | None, seen: Seen) -> list[list[list[int]]]:
    """The places that stay, for each item and head."""
    if keep is None:
        return [[head.nonzero().flatten().tolist() for head in of_item] for of_item in seen.held]
    return [[[place for place in head.tolist() if place >= 0] for head in of_item] for of_item in keep.rows]


def merged(seen: Seen, keep: Keep, b: int, g: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and masses of a head's rows behind a choice, row by row from the formulas."""
    keys, values, masses = [], [], []
    stay = [place for place in keep.rows[b, g].tolist() if place >= 0]
    for number, place in enumerate(stay):
        members = [place]
        if keep.into is not None:
            into = keep.into[b, g].tolist()
            members += [j for j in range(len(into)) if j not in stay and seen.held[b, g, j] and into[j] == number]
        mass = seen.bias[b, g, members].double().exp()
        keys.append((mass[:, None] * seen.k[b, g, members].double()).sum(0) / mass.sum())
        values.append((mass[:, None] * seen.v[b, g, members].double()).sum(0) / mass.sum())
        masses.append(mass.sum() if keep.weighs else mass[0])
    return torch.stack(keys), torch.stack(values), torch.stack(masses)
