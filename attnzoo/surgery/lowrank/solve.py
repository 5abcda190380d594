r"""The closed forms of low-rank conversion: pure linear algebra on fp64 tensors.

Row vectors, as in ``k = x W``: a projection is a matrix ``[C, heads * width]``, its bias an extra row of W beside a
constant 1 in x. ``moment`` is the second moment ``E[x^T x]`` of the inputs, ``metric`` a positive matrix that says how
much an error in each output costs (a Fisher matrix, or a Gram matrix of what reads the outputs).

Source: Yu et al. 2024, *Effectively Compress KV Heads for LLM* (arXiv:2406.07056), for the task; the closed form for
rotated keys follows from rotation being complex multiplication, the same in every head of a plane.

Letters: C inputs, s heads merged, D head width, r values kept, F rotary planes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = 1e-8
"""Eigenvalues of a metric below this share of the largest are raised to it, so that it can be inverted."""


@dataclass(frozen=True, eq=False)
class Factors:
    """A projection through fewer values: ``y = (x down) up`` stands for ``y = x W``.

    Attributes:
        down: ``[C, r]``.
        up: ``[r, n]``.
        kept: Share of the outputs' energy in the metric that is kept, 0 to 1.
    """

    down: Tensor
    up: Tensor
    kept: float

    def for_heads(self, heads: int) -> Factors:
        """The same product where several heads share one ``down``: each head's part of ``up`` is of its size alone."""
        return Factors(self.down / heads**0.5, self.up * heads**0.5, self.kept)


def root(metric: Tensor) -> tuple[Tensor, Tensor]:
    """The Hermitian square root of a positive matrix and its inverse, with eigenvalues floored."""
    values, vectors = torch.linalg.eigh((metric + metric.mH) / 2)
    values = values.clamp(min=max(float(values[-1]), torch.finfo(torch.float64).tiny) * FLOOR)
    scaled = vectors * values.sqrt()
    return scaled @ vectors.mH, (vectors / values.sqrt()) @ vectors.mH


def ridge(moment: Tensor, share: float = 1e-6) -> Tensor:
    """A moment with a share of its mean diagonal added."""
    size = moment.shape[0]
    return moment + torch.eye(size, dtype=moment.dtype, device=moment.device) * (share * moment.diagonal().mean())


def reduce_rank(weight: Tensor, moment: Tensor, metric: Tensor, rank: int) -> Factors:
    r"""The best factors of a rank: they minimise :math:`tr(G\, \Delta W^T C\, \Delta W)`.

    With :math:`B = G^{1/2}` and U the top eigenvectors of :math:`B W^T C W B`: down = W B U, up = U^T B^{-1}. Any
    invertible matrix may stand between the two; it is chosen so that the rows of ``up`` are orthonormal, as those of
    the identity are: a metric spreads over orders of magnitude, and factors that do so cannot be trained further.

    Args:
        weight: W ``[C, n]``.
        moment: C ``[C, C]``.
        metric: G ``[n, n]``.
        rank: r; n or more gives the identity.
    """
    size = weight.shape[1]
    if rank >= size:
        return Factors(weight, torch.eye(size, dtype=weight.dtype, device=weight.device), 1.0)
    half, inverse = root(metric)
    gram = half @ weight.T @ moment @ weight @ half
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    values = values.clamp(min=0)
    top = vectors[:, size - rank :]
    kept = float(values[size - rank :].sum() / values.sum().clamp(min=torch.finfo(torch.float64).tiny))
    orthonormal, between = torch.linalg.qr(inverse @ top)  # up^T = Q R, [n, r] and [r, r]
    return Factors(weight @ half @ top @ between.T, orthonormal.T.contiguous(), kept)


@dataclass(frozen=True, eq=False)
class MergedKeys:
    """One key head in the place of several.

    Attributes:
        key: ``[C, D]``, the merged head.
        query: ``[s, D, D]``: a query of merged head a becomes ``q query[a]``.
        energy: Energy of the heads, and of what the merged head keeps.
    """

    key: Tensor
    query: Tensor
    energy: tuple[float, float]


def as_planes(weight: Tensor, planes: Tensor) -> Tensor:
    """Columns ``[C, s, D]`` paired into rotary planes: complex ``[F, C, s]``."""
    return torch.complex(weight[:, :, planes[:, 0]], weight[:, :, planes[:, 1]]).permute(2, 0, 1)


def plane_metric(metric: Tensor, planes: Tensor) -> Tensor:
    """The rotation-invariant part of a metric or moment ``[s, D, s, D]`` within each plane, Hermitian ``[F, s, s]``."""
    first = planes[:, 0]
    second = planes[:, 1]

    def block(i: Tensor, j: Tensor) -> Tensor:
        return metric[:, i, :, j]  # [F, s, s]

    real = block(first, first) + block(second, second)
    return torch.complex(real, block(first, second) - block(second, first))


def output_moment(weight: Tensor, moment: Tensor) -> Tensor:
    """Second moment of the outputs of projections ``[C, s, D]``, ``[s, D, s, D]``."""
    _, heads, width = weight.shape
    flat = weight.flatten(1)
    return (flat.T @ moment @ flat).view(heads, width, heads, width)


def merge_keys(weight: Tensor, moment: Tensor, metric: Tensor, planes: Tensor) -> MergedKeys:
    r"""Merges key heads into one so that rotation after the merge is rotation before it.

    Rotation multiplies a plane of every head by the same complex number, so any complex mix over heads within a plane
    commutes with it. Per plane, with M the heads' complex columns and :math:`\Gamma` the metric, :math:`B =
    \Gamma^{1/2}` and u the top eigenvector of :math:`B M^H C M B`: the key is M B u, and a query of head a is
    multiplied by :math:`\overline{(u^H B^{-1})_a}`. Of the two, the factors of queries are brought to a mean square of
    1, as they are where nothing is merged. Dimensions in no plane are merged by :func:`reduce_rank`.

    Args:
        weight: Key projections ``[C, s, D]``.
        moment: ``[C, C]``.
        metric: ``[s, D, s, D]``.
        planes: int64 ``[F, 2]``, the dimensions of each rotary plane.
    """
    inputs, heads, width = weight.shape
    key = weight.new_zeros(inputs, width)
    query = weight.new_zeros(heads, width, width)
    total = kept = 0.0
    columns = as_planes(weight, planes)
    gamma = plane_metric(metric, planes)
    energy = plane_metric(output_moment(weight, moment), planes)
    for plane, (first, second) in enumerate(planes.tolist()):
        half, inverse = root(gamma[plane])
        gram = half @ energy[plane] @ half
        values, vectors = torch.linalg.eigh((gram + gram.mH) / 2)
        top = vectors[:, -1]
        factor = (top.conj() @ inverse).conj()
        size = factor.abs().square().mean().sqrt()
        factor = factor / size
        merged = columns[plane] @ (half @ top) * size
        key[:, first] = merged.real
        key[:, second] = merged.imag
        query[:, first, first] = query[:, second, second] = factor.real
        query[:, first, second] = factor.imag
        query[:, second, first] = -factor.imag
        total += float(values.sum())
        kept += float(values[-1])
    rest = [d for d in range(width) if d not in set(planes.flatten().tolist())]
    if rest:
        part = reduce_rank(
            weight[:, :, rest].flatten(1),
            moment,
            metric[:, rest][:, :, :, rest].reshape(heads * len(rest), heads * len(rest)),
            len(rest),
        ).for_heads(heads)
        key[:, rest] = part.down
        at = torch.tensor(rest, device=query.device)
        for head, up in enumerate(part.up.view(len(rest), heads, len(rest)).unbind(1)):
            query[head][at.unsqueeze(1), at] = up.T
    return MergedKeys(key, query, (total, kept))


def output_metric(outputs: Tensor) -> Tensor:
    """What an error in the values costs at the output, each head by itself.

    Args:
        outputs: Output projections of the query heads of each value head, ``[s, q, D, C]``.

    Returns:
        ``[s * D, s * D]``, block diagonal.
    """
    metric: Tensor = torch.block_diag(*torch.einsum("sqdc,sqec->sde", outputs, outputs))
    return metric


def query_metric(queries: Tensor, moment: Tensor) -> Tensor:
    """What an error in the keys costs in the scores, each head by itself.

    Args:
        queries: Query projections of each key head, ``[s, q, C, D]``.
        moment: ``[C, C]``.

    Returns:
        ``[s, D, s, D]``, block diagonal over heads.
    """
    blocks = torch.einsum("sqcd,ce,sqef->sdf", queries, moment, queries)
    heads, width, _ = blocks.shape
    metric: Tensor = torch.block_diag(*blocks)
    return metric.view(heads, width, heads, width)


def balanced_metric(weight: Tensor, moment: Tensor, parts: tuple[int, int]) -> Tensor:
    """A metric in which keys and values, the two parts of the columns, weigh the same."""
    scales = []
    for columns in weight.split(parts, dim=1):
        energy = torch.einsum("cn,ce,en->", columns, moment, columns)
        scales += [1.0 / float(energy)] * columns.shape[1]
    return torch.diag(weight.new_tensor(scales))


def correction(students: Tensor, cross: Tensor, share: float) -> Tensor:
    r"""The linear map that takes student inputs towards teacher inputs: :math:`I + (S^T S + \lambda)^{-1} S^T (T - S)`.

    Args:
        students: :math:`S^T S` ``[C, C]``.
        cross: :math:`S^T (T - S)` ``[C, C]``.
        share: Lambda as a share of the mean diagonal.
    """
    step: Tensor = torch.linalg.solve(ridge(students, share), cross)
    return torch.eye(students.shape[0], dtype=students.dtype, device=students.device) + step


def refit(gram: Tensor, cross: Tensor, start: Tensor, share: float) -> Tensor:
    r"""Ridge regression round a start: minimises :math:`|A W - Y|^2 + \lambda |W - W_0|^2`.

    Args:
        gram: :math:`A^T A` ``[n, n]``.
        cross: :math:`A^T Y` ``[n, C]``.
        start: :math:`W_0` ``[n, C]``.
        share: Lambda as a share of the mean diagonal.
    """
    step: Tensor = torch.linalg.solve(ridge(gram, share), cross - gram @ start)
    return start + step
