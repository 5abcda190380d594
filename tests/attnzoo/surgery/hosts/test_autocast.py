"""Every kind of conversion under autocast: what torch's own attention does there, with a cache and without."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.attnzoo.surgery.conversions import ALL, READ, convert_as
from tests.attnzoo.surgery.hosts.masks import padding_mask
from tests.attnzoo.surgery.tiny import ids, logits, tiny

TOKENS = 20
LOW = [torch.bfloat16, torch.float16]
PARTLY = {"where": lambda site: site.layer == 1}


def made(kind: str, partial: bool) -> Any:
    # Two layers, of which one is left alone where only a part is converted.
    model = tiny(dtype=torch.float32)
    if kind != "host":
        convert_as(model, kind, **(PARTLY if partial else {}))
    return model


def trained(model: Any, dtype: torch.dtype | None, *, cache: bool) -> tuple[Tensor, Tensor]:
    """Logits, and all gradients of a training step as one vector."""
    model.train().zero_grad()
    tokens = ids(2, TOKENS)
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        said = model(tokens, use_cache=cache).logits
    loss = -said[:, :-1].float().log_softmax(-1).gather(2, tokens[:, 1:, None]).mean()
    loss.backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return said.detach().float(), torch.cat(grads)


def error(found: Tensor, truth: Tensor) -> float:
    assert bool(found.isfinite().all())
    return float((found - truth).norm() / truth.norm())


@functools.cache
def rounding_of_the_host(dtype: torch.dtype) -> tuple[float, float]:
    """What autocast costs the host itself: the share by which its logits and gradients are off."""
    model = made("host", partial=False)
    truth, low = (trained(model, kind, cache=False) for kind in (None, dtype))
    return error(low[0], truth[0]), error(low[1], truth[1])


CASES = [(kind, False) for kind in ALL] + [(kind, True) for kind in (*READ, "latent", "replaced-mha", "replaced-moh")]


@pytest.mark.parametrize(
    ("kind", "partial", "dtype"),
    [
        pytest.param(*case, dtype, marks=pytest.mark.slow if case[1] and dtype == torch.float16 else ())
        for case in CASES
        for dtype in LOW
    ],
)
def test_a_training_step_under_autocast_is_as_close_to_full_precision_as_the_hosts(
    kind: str, partial: bool, dtype: torch.dtype
) -> None:
    model = made(kind, partial)
    truth = trained(model, None, cache=False)
    # Routers and retrieval choose anew where scores are rounded: their error is not that of rounding alone.
    chooses = 12 if kind in ("replaced-moh", "replaced-longheads", "replaced-landmark") else 3
    for cache in (False, True):
        low = trained(model, dtype, cache=cache)
        for found, exact, theirs in zip(low, truth, rounding_of_the_host(dtype), strict=True):
            assert error(found, exact) <= chooses * theirs


@pytest.mark.parametrize("kind", ALL)
def test_decoding_under_autocast_says_what_a_forward_under_autocast_says(kind: str) -> None:
    model, tokens, mask = made(kind, partial=False), ids(2, TOKENS), padding_mask([0, 5], TOKENS)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        whole = logits(model, tokens, attention_mask=mask, use_cache=False)
        first = model(tokens[:, :-2], attention_mask=mask[:, :-2], use_cache=True)
        cache = {name: x for name, x in first.items() if hasattr(x, "get_seq_length")}
        parts = [first.logits]
        for end in (TOKENS - 1, TOKENS):
            parts.append(model(tokens[:, end - 1 : end], attention_mask=mask[:, :end], **cache).logits)
    found, real = torch.cat(parts, 1).float(), mask.bool()
    if kind in ("replaced-moh", "replaced-longheads", "replaced-landmark"):
        assert bool(found[real].isfinite().all())
        return
    assert error(found[real], whole.float()[real]) <= 3 * rounding_of_the_host(torch.bfloat16)[0]
