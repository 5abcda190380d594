"""Products in which non-finite values (NaN, infinity) reach only the rows that see them.

Elsewhere a hidden pair counts for nothing because its weight is 0. That is so for every number, but 0 times NaN is NaN.
Calls are computed as if there were numbers alone; one whose results are none is computed again, by what stands here.

Letters: R rows of a chunk, n key blocks of each, m rows and s slots of a product, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo_kernels.cpu.products import product
from attnzoo_kernels.cpu.schedule import Bucket
from attnzoo_kernels.spec.call import Call


def hides(call: Call, parts: list[Bucket]) -> bool:
    """Whether a call computes pairs that it then hides; where it does not, what is no number is so by right."""
    if call.gate is not None or any(part.partial for part in parts):
        return True
    return call.key_bias is not None and bool((call.key_bias == -torch.inf).any())


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
    """As :func:`~attnzoo_kernels.cpu.products.product`, where a weight of 0 zeroes even non-finite values.

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
