"""Batched products into memory that is there already, by the one library that torch uses anyway.

Nothing of the process is set, and no lock is held: a precision that a user has chosen for all products holds here too.

A hidden pair counts for nothing because its weight is 0. That is so for every number, but 0 times NaN is NaN. Calls are
computed as if there were numbers alone; where the result is none, :func:`product_where_seen` lets non-finite values
(NaN, infinity) reach only the rows that see them.

Letters: R rows of a chunk, m rows and s slots of a product, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo_kernels.runtime.workspace import scratch


def product(
    name: str, a: Tensor, b: Tensor, out: Tensor | None = None, *, scale: float = 1.0, add: bool = False
) -> Tensor:
    """A batched product times ``scale``.

    Args:
        name: What the product is for: its scratch memory's name.
        a: ``[R, m, n]``.
        b: ``[R, n, D]``.
        out: Where it goes, ``[R, m, D]``; scratch memory by default. What it holds is never read unless ``add``.
        scale: The factor; one that rounds to 0 gives zeros, and NaN where the product is not finite.
        add: Whether the product is added to what ``out`` holds.
    """
    if out is None:
        out = scratch(name, (*a.shape[:2], b.shape[2]), a.dtype, a.device)
    if rounds_to_zero(scale, a.dtype):
        # Some libraries return at once then, and leave in place what ``out`` held before.
        nothing = torch.bmm(a, b).mul_(0.0)
        return out.add_(nothing) if add else out.copy_(nothing)
    if a.dtype == torch.bfloat16:
        return _half_product(a, b, out, scale=scale, add=add)
    return torch.baddbmm(out, a, b, beta=1 if add else 0, alpha=scale, out=out)


def rounds_to_zero(scale: float, dtype: torch.dtype) -> bool:
    """Whether a factor is 0 in the dtype in which products of ``dtype`` are summed."""
    # Half of the least number that fp32 has; at half exactly, rounding goes to the even one, which is 0.
    return scale == 0 or (dtype != torch.float64 and abs(scale) <= 2.0**-150)


def _half_product(a: Tensor, b: Tensor, out: Tensor, *, scale: float, add: bool) -> Tensor:
    """A product in bf16. With AMX torch's reads beyond the rows of ``a``, times 0: a NaN would reach the row before."""
    few = add or a.numel() <= out.numel()
    clean = bool(a.sum().isfinite()) if few else True
    if clean:
        torch.baddbmm(out, a, b, beta=1 if add else 0, alpha=scale, out=out)
        clean = few or bool(out.sum().isfinite())
    if not clean:
        found = torch.bmm(a.float(), b.float()).mul_(scale)
        out.copy_(out + found if add else found)
    return out


def are_numbers(*tensors: Tensor | None) -> bool:
    """Whether tensors hold numbers alone; numbers whose sum overflows count as none."""
    for x in tensors:
        if x is None:
            continue
        # The sum of fp16 numbers soon is none.
        low = x.dtype in (torch.float16, torch.bfloat16)
        if not bool(x.sum(dtype=torch.float32 if low else x.dtype).isfinite()):
            return False
    return True


def product_where_seen(
    name: str, weights: Tensor, x: Tensor, out: Tensor | None = None, *, scale: float = 1.0, add: bool = False
) -> Tensor:
    """As :func:`product`, where a weight of 0 zeroes even non-finite values.

    Args:
        name: As there.
        weights: ``[R, m, s]``, exactly 0 where nothing is seen.
        x: ``[R, s, D]``.
        out: As there.
        scale: As there.
        add: As there.
    """
    wrong = ~x.isfinite()
    if not bool(wrong.any()):
        return product(name, weights, x, out=out, scale=scale, add=add)
    found = product(name, weights, x.masked_fill(wrong, 0.0), out=out, scale=scale, add=add)
    # How many of the wrong values each result has a weight for.
    touched = torch.bmm((weights != 0).float(), wrong.float()) > 0
    spoiled = torch.bmm(weights, x) * scale
    return found.add_(torch.where(touched, spoiled, 0.0))
