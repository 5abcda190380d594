"""Correctness first: whole groups of heads against fp32 attention with a mask, a chunk of rows at a time.

A wrong layout shows in every row that reads another block, however small its values are: so besides the largest error,
rows are compared one by one, in relation to what they should be.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo_kernels import BlockLayout
from bench.contestants import Wrong

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
CHUNK = 1 << 27
"""Pairs of a chunk."""


@dataclass(frozen=True)
class Truth:
    """What one KV head and its query heads should give, fp32; gradients are ``None`` without an incoming one.

    Attributes:
        group: The KV head.
        out: ``[H / G, T, D]``.
        dq: As out.
        dk: ``[S, D]``.
        dv: As dk.
    """

    group: int
    out: Tensor
    dq: Tensor | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None


def _rows_mask(layout: BlockLayout, keep: Tensor, rows: range) -> Tensor:
    """Which slots rows see, bool ``[rows, S]``; keep is bool ``[M, N]``."""
    place = torch.arange(rows.start, rows.stop, device=keep.device)
    listed = keep[place // layout.block_q].repeat_interleave(layout.block_k, 1)[:, : layout.seq_k]
    last = (place + layout.seq_k - layout.seq_q).unsqueeze(1)
    return listed & (torch.arange(layout.seq_k, device=keep.device) <= last)


@torch.no_grad()
def solve(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, group: int, dout: Tensor | None = None) -> Truth:
    """Attention of one KV head and its query heads, causal, with gradients where ``dout`` is given."""
    per = q.shape[1] // k.shape[1]
    heads = range(group * per, (group + 1) * per)
    keys = k[0, group].float()
    values = v[0, group].float()
    scale = q.shape[3] ** -0.5
    keep = layout.to_mask()[0]
    step = max(1, CHUNK // layout.seq_k)
    out = torch.zeros(per, layout.seq_q, v.shape[3], device=q.device)
    dq, dk, dv = (torch.zeros(per, layout.seq_q, q.shape[3], device=q.device), torch.zeros_like(keys),
                  torch.zeros_like(values)) if dout is not None else (None, None, None)  # fmt: skip
    for i, head in enumerate(heads):
        own = keep[head * keep.shape[0] // q.shape[1]]
        for begin in range(0, layout.seq_q, step):
            rows = range(begin, min(begin + step, layout.seq_q))
            at = slice(rows.start, rows.stop)
            mask = _rows_mask(layout, own, rows)
            queries = q[0, head, at].float()
            weights = (queries @ keys.T * scale).masked_fill_(~mask, -torch.inf).softmax(-1).nan_to_num_(0.0)
            out[i, at] = weights @ values
            if dout is None or dq is None or dk is None or dv is None:
                continue
            pull = dout[0, head, at].float()
            dv += weights.T @ pull
            scores = weights * (pull @ values.T - (pull * out[i, at]).sum(-1, keepdim=True)) * scale
            dq[i, at] = scores @ keys
            dk += scores.T @ queries
    return Truth(group, out, dq, dk, dv)


def _check(name: str, found: Tensor, true: Tensor, dtype: torch.dtype) -> float:
    """The mean error of rows in relation to their size.

    Raises:
        Wrong: If something is further from the truth than rounding explains.
    """
    found = found.float()
    if not bool(found.isfinite().all()):
        raise Wrong(f"{name}: not finite")
    unit = UNIT[dtype]
    largest = float((found - true).abs().max())
    most = 4 * unit * float(true.abs().max())
    if not largest <= most:
        raise Wrong(f"{name}: differs by {largest:.1e}, at most {most:.1e} is right")
    error = (found - true).norm(dim=-1)
    size = true.norm(dim=-1)
    # Gradients of rows that read one key are nothing but rounding: they are measured by the others.
    mean = float((error / (size + 0.1 * size.mean())).mean())
    if not mean <= 3 * unit:
        raise Wrong(f"{name}: rows differ by {mean:.1e} of their size on average, at most {3 * unit:.1e} is right")
    return mean


def check(name: str, truth: Truth, out: Tensor, gradients: tuple[Tensor, ...] | None = None) -> dict[str, float]:
    """Raises unless a contestant is right; the mean error of rows by quantity.

    Raises:
        Wrong: With what differs.
    """
    per = truth.out.shape[0]
    heads = slice(truth.group * per, (truth.group + 1) * per)
    errors = {"out": _check(f"{name}, out", out[0, heads], truth.out, out.dtype)}
    if gradients is not None:
        dq, dk, dv = gradients
        found = {"dq": dq[0, heads], "dk": dk[0, truth.group], "dv": dv[0, truth.group]}
        for quantity, mine in found.items():
            true = getattr(truth, quantity)
            errors[quantity] = _check(f"{name}, {quantity}", mine, true, out.dtype)
    return errors
