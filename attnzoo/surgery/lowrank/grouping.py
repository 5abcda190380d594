"""Which KV heads to merge: groups of equal size whose merged heads lose the least.

Letters: G KV heads, s heads in a group, D head width, F rotary planes.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import torch
from torch import Tensor

Groups = tuple[tuple[int, ...], ...]
Cost = Callable[[tuple[int, ...]], float]

SWEEPS = 20
"""At most so many passes of swaps; each pass that changes nothing ends the search."""

NOTHING = 1e-12
"""The most that counts as no loss: a share of the energy that rounding alone takes."""


def tail_cost(planes: Tensor, values: Tensor, width: int) -> Cost:
    """The energy that merging a group loses, in keys and values, each as a share of its total.

    Args:
        planes: Gram matrices of the heads' keys in each rotary plane, Hermitian ``[F, G, G]``.
        values: Gram matrix of the heads' values (and of keys in no plane), ``[G, n, G, n]``.
        width: Values that one merged head keeps.
    """
    total_keys = float(planes.diagonal(dim1=1, dim2=2).real.sum().clamp(min=1e-300)) if planes.numel() else 1.0
    total_values = float(torch.einsum("gngn->", values).clamp(min=1e-300))
    known: dict[tuple[int, ...], float] = {}

    def cost(group: tuple[int, ...]) -> float:
        key = tuple(sorted(group))
        if key not in known:
            at = torch.tensor(key, device=planes.device)
            lost = 0.0
            if planes.numel():
                spectrum = torch.linalg.eigvalsh(planes[:, at][:, :, at])
                lost += float(spectrum[:, :-1].sum()) / total_keys
            size = len(key) * values.shape[1]
            spectrum = torch.linalg.eigvalsh(values[at][:, :, at].reshape(size, size))
            known[key] = lost + float(spectrum[: size - width].sum()) / total_values
        return known[key]

    return cost


def consecutive(heads: int, groups: int) -> Groups:
    """Neighbours together, as grouped attention numbers its heads."""
    size = heads // groups
    return tuple(tuple(range(g * size, (g + 1) * size)) for g in range(groups))


def find_groups(heads: int, groups: int, cost: Cost) -> Groups:
    """Groups of equal size with a small sum of costs: greedy from the closest pairs, then swaps while they help.

    Neighbours stay together where nothing better is found, so that a model that is grouped already keeps its order.
    """
    if groups in (1, heads):
        return consecutive(heads, groups)
    neighbours = consecutive(heads, groups)
    kept = sum(cost(group) for group in neighbours)
    if kept <= NOTHING:
        # Heads that were repeated before: nothing can cost less, so that nothing is tried.
        return neighbours
    size = heads // groups
    pairs = {pair: cost(pair) for pair in combinations(range(heads), 2)}
    best = _improve(_greedy(heads, size, pairs), cost)
    return neighbours if kept <= sum(cost(group) for group in best) * (1 + 1e-9) + NOTHING else best


def _greedy(heads: int, size: int, pairs: dict[tuple[int, int], float]) -> list[list[int]]:
    """Seeds a group with the closest free pair and adds whoever is closest to its members."""
    free = set(range(heads))
    groups = []
    while free:
        inside = [pair for pair in pairs if free.issuperset(pair)]
        seed = min(inside, key=lambda pair: pairs[pair])
        group = [*seed]
        free.difference_update(group)
        while len(group) < size:
            nearest = min(free, key=lambda head: _closeness(head, group, pairs))
            group.append(nearest)
            free.remove(nearest)
        groups.append(group)
    return groups


def _closeness(head: int, group: list[int], pairs: dict[tuple[int, int], float]) -> float:
    return sum(pairs[min(head, member), max(head, member)] for member in group)


def _improve(groups: list[list[int]], cost: Cost) -> Groups:
    """Swaps members of two groups while that lowers their cost."""
    for _ in range(SWEEPS):
        changed = False
        for a, b in combinations(range(len(groups)), 2):
            for i in range(len(groups[a])):
                for j in range(len(groups[b])):
                    changed |= _try_swap(groups[a], i, groups[b], j, cost)
        if not changed:
            break
    return tuple(sorted(tuple(sorted(group)) for group in groups))


def _try_swap(a: list[int], i: int, b: list[int], j: int, cost: Cost) -> bool:
    before = cost(tuple(a)) + cost(tuple(b))
    a[i], b[j] = b[j], a[i]
    if cost(tuple(a)) + cost(tuple(b)) < before - 1e-12:
        return True
    a[i], b[j] = b[j], a[i]
    return False
