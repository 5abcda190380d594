"""Low-rank forms of one site's projections: fewer KV heads, or one latent.

Letters: C model width (C' with a constant 1 where there are biases), H query heads, G KV heads, D head width, r latent.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from einops import rearrange, repeat
from torch import Tensor

from attnzoo.base.rope import RotaryConfig
from attnzoo.surgery.hosts.projections import LatentProjections, Projections
from attnzoo.surgery.lowrank import grouping, solve
from attnzoo.surgery.lowrank.grouping import Groups
from attnzoo_kernels.errors import ConversionError


@dataclass(frozen=True, eq=False)
class HeadWeights:
    """A site's weights as fp64 matrices of row vectors, ``y = x W``.

    Attributes:
        q: ``[H, C', D]``.
        k: ``[C', G, D]``.
        v: ``[C', G, D]``.
        o: ``[H, D, C]``.
        constant: Whether the last row of q, k and v is a bias.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    constant: bool

    @classmethod
    def of(cls, projections: Projections) -> HeadWeights:
        """The weights of a site."""
        p = projections
        constant = any(bias is not None for bias in (p.q_bias, p.k_bias, p.v_bias))

        def matrix(weight: Tensor, bias: Tensor | None) -> Tensor:
            rows = weight.detach().double().cpu().T
            if not constant:
                return rows
            last = rows.new_zeros(rows.shape[1]) if bias is None else bias.detach().double().cpu()
            return torch.cat([rows, last.unsqueeze(0)])

        q = rearrange(matrix(p.q, p.q_bias), "c (h d) -> h c d", h=p.num_heads)
        k = rearrange(matrix(p.k, p.k_bias), "c (g d) -> c g d", g=p.num_kv_heads)
        v = rearrange(matrix(p.v, p.v_bias), "c (g d) -> c g d", g=p.num_kv_heads)
        o = rearrange(p.o.detach().double().cpu(), "c (h d) -> h d c", h=p.num_heads)
        return cls(q, k, v, o, constant)

    def corrected(self, correction: Tensor) -> HeadWeights:
        """The weights for inputs that a linear map takes to those they were made for."""
        q = correction @ self.q
        k, v = ((correction @ w.flatten(1)).view(w.shape) for w in (self.k, self.v))
        return replace(self, q=q, k=k, v=v)


def rotary_planes(rotary: RotaryConfig | None, width: int) -> Tensor:
    """The dimensions of each rotary plane, int64 ``[F, 2]``; empty without rotation."""
    if rotary is None:
        return torch.zeros(0, 2, dtype=torch.int64, device="cpu")
    size = width if rotary.dim is None else rotary.dim
    pairs = torch.arange(size // 2, device="cpu")
    if rotary.interleaved:
        return torch.stack([2 * pairs, 2 * pairs + 1], 1)
    return torch.stack([pairs, pairs + size // 2], 1)


def split_metric(weights: HeadWeights, moment: Tensor, fisher: Tensor | None) -> tuple[Tensor, Tensor]:
    """What errors in keys ``[G, D, G, D]`` and in values ``[G, D, G, D]`` cost.

    From the Fisher matrix where there is one, else from the queries that read the keys and the output projections that
    read the values.
    """
    _, groups, width = weights.k.shape
    if fisher is not None:
        size = groups * width
        keys = fisher[:size, :size]
        values = fisher[size:, size:]
        return keys.reshape(groups, width, groups, width), values.reshape(groups, width, groups, width)
    queries = rearrange(weights.q, "(g h) c d -> g h c d", g=groups)
    outputs = rearrange(weights.o, "(g h) d c -> g h d c", g=groups)
    return solve.query_metric(queries, moment), solve.output_metric(outputs).view(groups, width, groups, width)


def choose_groups(projections: Projections, moment: Tensor, fisher: Tensor | None, count: int) -> Groups:
    """Which KV heads of a site to merge into ``count``."""
    weights = HeadWeights.of(projections)
    _, groups, width = weights.k.shape
    if count in (1, groups):
        return grouping.consecutive(groups, count)
    keys, values = split_metric(weights, moment, fisher)
    planes = rotary_planes(projections.rotary, width)
    gamma = solve.plane_metric(keys, planes).diagonal(dim1=1, dim2=2).real.clamp(min=0).sqrt()
    grams = solve.plane_metric(solve.output_moment(weights.k, moment), planes)
    grams = grams * gamma.unsqueeze(1) * gamma.unsqueeze(2)
    value_gram = solve.output_moment(weights.v, moment)
    scale = torch.einsum("gdgd->g", values).clamp(min=0).sqrt()
    value_gram = value_gram * scale.view(-1, 1, 1, 1) * scale.view(1, 1, -1, 1)
    rest = [d for d in range(width) if d not in set(planes.flatten().tolist())]
    if rest:
        # Keys in no plane are merged like values; they share the search through their own share of the total.
        key_gram = solve.output_moment(weights.k[..., rest], moment)
        by_keys = grouping.tail_cost(grams, key_gram, len(rest))
        by_values = grouping.tail_cost(grams[:0], value_gram, width)
        return grouping.find_groups(groups, count, lambda group: by_keys(group) + by_values(group))
    return grouping.find_groups(groups, count, grouping.tail_cost(grams, value_gram, width))


def merge_site(
    projections: Projections, weights: HeadWeights, moment: Tensor, fisher: Tensor | None, groups: Groups
) -> tuple[Projections, float]:
    """A site with one KV head for each group, and the share of energy that it keeps."""
    moment = solve.ridge(moment)
    key_metric, value_metric = split_metric(weights, moment, fisher)
    planes = rotary_planes(projections.rotary, projections.head_dim)
    share = weights.q.shape[0] // weights.k.shape[1]
    queries = []
    keys = []
    values = []
    outputs = []
    total = kept = value_kept = 0.0
    for group in groups:
        at = torch.tensor(group, device=key_metric.device)
        merged = solve.merge_keys(weights.k[:, at], moment, key_metric[at][:, :, at], planes)
        total += merged.energy[0]
        kept += merged.energy[1]
        size = len(group) * weights.v.shape[2]
        metric = value_metric[at][:, :, at].reshape(size, size)
        heads = rearrange(weights.v[:, at], "c g d -> c (g d)")
        value = solve.reduce_rank(heads, moment, metric, weights.v.shape[2]).for_heads(len(group))
        value_kept += value.kept / len(groups)
        keys.append(merged.key)
        values.append(value.down)
        for place, head in enumerate(group):
            up = value.up[:, place * weights.v.shape[2] : (place + 1) * weights.v.shape[2]]
            for query in range(head * share, (head + 1) * share):
                queries.append(weights.q[query] @ merged.query[place])
                outputs.append(up @ weights.o[query])
    parts = HeadWeights(
        torch.stack(queries), torch.stack(keys, 1), torch.stack(values, 1), torch.stack(outputs), weights.constant
    )
    return as_projections(projections, parts), (kept / total + value_kept) / 2 if total else value_kept


def mean_site(projections: Projections, groups: Groups) -> Projections:
    """A site whose KV heads are the means of their groups: a baseline that depends on the heads' arbitrary bases."""
    weights = HeadWeights.of(projections)
    share = weights.q.shape[0] // weights.k.shape[1]
    order = [head * share + i for group in groups for head in group for i in range(share)]
    k, v = (torch.stack([w[:, list(group)].mean(1) for group in groups], 1) for w in (weights.k, weights.v))
    return as_projections(projections, HeadWeights(weights.q[order], k, v, weights.o[order], weights.constant))


def expand_site(projections: Projections, count: int) -> Projections:
    """A site with each KV head repeated, exactly the same function."""
    p = projections
    times = count // p.num_kv_heads

    def expand(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        return repeat(x.detach(), "(g d) ... -> (g n d) ...", g=p.num_kv_heads, n=times)

    k = expand(p.k)
    v = expand(p.v)
    if k is None or v is None:
        raise ConversionError("projections: expected key and value weights")
    return replace(p, k=k, v=v, k_bias=expand(p.k_bias), v_bias=expand(p.v_bias), num_kv_heads=count)


def latent_site(
    projections: Projections, moment: Tensor, fisher: Tensor | None, rank: int
) -> tuple[LatentProjections, float]:
    """A site whose keys and values are expanded from ``rank`` values, and the share of energy that it keeps."""
    p = projections
    weights = HeadWeights.of(projections)
    moment = solve.ridge(moment)
    both = torch.cat([rearrange(w, "c g d -> c (g d)") for w in (weights.k, weights.v)], 1)
    half = weights.k.shape[1] * weights.k.shape[2]
    metric = solve.balanced_metric(both, moment, (half, both.shape[1] - half)) if fisher is None else fisher
    found = solve.reduce_rank(both, moment, metric, rank)
    like = p.k
    inputs = found.down.shape[0] - int(weights.constant)
    latent = LatentProjections.beside(
        p,
        down=found.down[:inputs].T.to(like),
        up=found.up.T.to(like),
        down_bias=found.down[inputs].to(like) if weights.constant else None,
    )
    return latent, found.kept


def as_projections(like: Projections, weights: HeadWeights) -> Projections:
    """Matrices of row vectors as a site's weights, in the dtype and on the device of ``like``."""
    q = rearrange(weights.q, "h c d -> c (h d)")
    k, v = (rearrange(w, "c g d -> c (g d)") for w in (weights.k, weights.v))

    def split(rows: Tensor, had_bias: bool) -> tuple[Tensor, Tensor | None]:
        inputs = rows.shape[0] - int(weights.constant)
        kept = weights.constant and (had_bias or bool(rows[inputs].any()))
        bias = rows[inputs].to(like.k) if kept else None
        return rows[:inputs].T.contiguous().to(like.k), bias

    (q_weight, q_bias), (k_weight, k_bias), (v_weight, v_bias) = (
        split(rows, bias is not None) for rows, bias in ((q, like.q_bias), (k, like.k_bias), (v, like.v_bias))
    )
    return replace(
        like,
        q=q_weight,
        k=k_weight,
        v=v_weight,
        o=rearrange(weights.o, "h d c -> c (h d)").contiguous().to(like.k),
        q_bias=q_bias,
        k_bias=k_bias,
        v_bias=v_bias,
        num_kv_heads=weights.k.shape[1],
    )
