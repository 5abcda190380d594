"""How far a result may be from the truth, from the arithmetic that it takes, not from what passes.

u is the unit roundoff, S the largest score seen, and the magnitude of a result is the same computation with absolute
values inside, so that a difference of large numbers may be as inaccurate as they are.
- fp64: ``1e-12 (1 + S)`` of the magnitude.
- fp32: an error u S of a score becomes a relative error of a weight, so ``8 u (1 + S)`` of the magnitude, beside twice
  the error that plain torch makes in the same dtype.
- fp16, bf16: twice the error of plain torch and 2 u of the magnitude for rounding what comes out.
- lse: ``16 u (1 + S)`` with u of fp32, whatever the inputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.attnzoo_kernels.oracle import Answer, Problem

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
LIMIT_FP64 = 1e-12


@dataclass(frozen=True)
class Size:
    """What the bounds of one call hang on."""

    score: float
    magnitude: Answer


def _scores(p: Problem, q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    scale = 1 / math.sqrt(q.shape[-1]) if p.scale is None else p.scale
    scores = q @ k.transpose(-1, -2) * scale
    if p.key_bias is not None:
        bias = p.key_bias.to(q.dtype)
        group = p.heads // p.kv_heads
        if bias.shape[1] not in (1, p.heads):
            bias = bias.repeat_interleave(group, 1)
        scores = scores + bias.unsqueeze(2)
    return scores.masked_fill(~mask, -math.inf)


def _weights(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax and log-sum-exp; rows of -inf give 0 and -inf."""
    lse = scores.logsumexp(-1)
    shift = torch.where(lse == -math.inf, 0.0, lse)
    return (scores - shift.unsqueeze(-1)).exp(), lse


def _inputs(p: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    group = p.heads // p.kv_heads
    clean = [torch.nan_to_num(x.detach().to(dtype)) for x in (p.q, p.k, p.v)]
    return clean[0], clean[1].repeat_interleave(group, 1), clean[2].repeat_interleave(group, 1)


def _over_groups(x: Tensor, p: Problem) -> Tensor:
    return x.unflatten(1, (p.kv_heads, p.heads // p.kv_heads)).sum(2)


def _to_bias(dscores: Tensor, p: Problem) -> Tensor | None:
    """Score gradients ``[B, H, T, S]`` summed to the shape of the bias."""
    if p.key_bias is None:
        return None
    each = dscores.sum(2)
    return (each if p.key_bias.shape[1] in (1, p.heads) else _over_groups(each, p)).sum_to_size(p.key_bias.shape)


def plain_torch(p: Problem, dout: Tensor, dlse: Tensor, mask: Tensor, dtype: torch.dtype) -> Answer:
    """The dense computation with every step in one dtype."""
    q, k, v = _inputs(p, dtype)
    scale = 1 / math.sqrt(q.shape[-1]) if p.scale is None else p.scale
    weights, lse = _weights(_scores(p, q, k, mask))
    dout, dlse = dout.to(dtype), dlse.to(dtype)
    out = weights @ v
    dv = weights.transpose(-1, -2) @ dout
    delta = (out * dout).sum(-1, keepdim=True) - dlse.unsqueeze(-1)
    dscores = weights * (dout @ v.transpose(-1, -2) - delta)
    dk = dscores.transpose(-1, -2) @ q * scale
    return Answer(out, lse, dscores @ k * scale, _over_groups(dk, p), _over_groups(dv, p), _to_bias(dscores, p))


def size_of(p: Problem, dout: Tensor, dlse: Tensor, mask: Tensor) -> Size:
    """The largest score and the magnitudes, in fp64."""
    q, k, v = _inputs(p, torch.float64)
    scale = abs(1 / math.sqrt(q.shape[-1]) if p.scale is None else p.scale)
    scores = _scores(p, q, k, mask)
    weights, lse = _weights(scores)
    # A score is itself a sum: what it is made of counts, not only what is left.
    parts = q.abs() @ k.abs().transpose(-1, -2) * scale
    seen = torch.cat([scores.abs()[mask], parts[mask]])
    dout, dlse, v = dout.double().abs(), dlse.double().abs().unsqueeze(-1), v.abs()
    pulls = dout @ v.transpose(-1, -2)
    dscores = weights * (pulls + (weights * pulls).sum(-1, keepdim=True) + dlse)
    dk = dscores.transpose(-1, -2) @ q.abs() * scale
    dv = weights.transpose(-1, -2) @ dout
    dq = dscores @ k.abs() * scale
    magnitude = Answer(weights @ v, lse, dq, _over_groups(dk, p), _over_groups(dv, p), _to_bias(dscores, p))
    return Size(float(seen.max()) if len(seen) else 0.0, magnitude)


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def assert_near(actual: Answer, truth: Answer, p: Problem, seeds: tuple[Tensor, Tensor], mask: Tensor) -> None:
    """Fails if a result or gradient is further from the oracle's than its bound, or empty elsewhere."""
    dtype = p.q.dtype
    size = size_of(p, *seeds, mask)
    unit = UNIT[dtype]
    plain = plain_torch(p, *seeds, mask, dtype)
    empty = truth.lse == -math.inf
    assert torch.equal(actual.lse == -math.inf, empty), "lse is -inf for other rows than the empty ones"
    assert not actual.out[empty].any(), "an empty row has an output"
    for name in Answer._fields:
        if getattr(truth, name) is None:
            continue
        mine, true, magnitude = (getattr(x, name).double() for x in (actual, truth, size.magnitude))
        assert mine.isnan().equal(true.isnan()), f"{name}: NaN in other places"
        off = _largest((mine - true)[mine != true].nan_to_num(0.0))
        if dtype == torch.float64:
            limit = LIMIT_FP64 * (1 + size.score) * (1.0 if name == "lse" else _largest(magnitude))
        elif name == "lse":
            limit = 16 * UNIT[torch.float32] * (1 + size.score)
        else:
            usual = _largest((getattr(plain, name).double() - true).nan_to_num(0.0))
            slack = 8 * unit * (1 + size.score) if dtype == torch.float32 else 2 * unit
            limit = 2 * usual + slack * _largest(magnitude)
        assert off <= limit, f"{name}: off by {off:.3g}, {limit:.3g} allowed"
