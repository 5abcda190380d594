"""Locret on a model of bytes in which one head copies: trained heads recall from a fifth of the rows, others do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from attnzoo import policies
from attnzoo.cache.policies.known import RetainingHead
from attnzoo.heads import RetainingTraining, retaining_heads
from attnzoo.surgery.hosts.calls import cache_name
from tests.attnzoo.heads.planted import BEGIN, planted

TOKENS = 240
SPAN = 12


def prompt(seed: int) -> tuple[Tensor, list[Tensor]]:
    """Bytes at random, two spans of rare ones among them; the spans."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 128, (TOKENS,), generator=generator)
    ids[0] = BEGIN
    rare = torch.randperm(32, generator=generator) + 224
    spans = [rare[:SPAN], rare[SPAN : 2 * SPAN]]
    for span, place in zip(spans, (20, 130), strict=True):
        start = place + int(torch.randint(0, 60, (1,), generator=generator))
        ids[start : start + SPAN] = span
    return ids.unsqueeze(0), spans


def recall(model: Any, heads: list[RetainingHead] | None) -> float:
    """Negative log-likelihood of spans that come again, behind what is held; ``None`` holds everything."""
    found = []
    for seed in range(3):
        ids, spans = prompt(seed)
        for span in spans:
            with torch.no_grad():
                if heads is None:
                    logits = model(torch.cat([ids, span.unsqueeze(0)], 1)).logits[0, TOKENS:]
                else:
                    logits = behind(model, heads, ids, span)
            found.append(cross_entropy(logits[:-1], span[1:]))
    return float(torch.stack(found).mean())


def behind(model: Any, heads: list[RetainingHead], ids: Tensor, span: Tensor) -> Tensor:
    with policies.applied(model, policies.Locret(heads, share=0.2, local=8, page=16)) as run:
        cache = run.new_cache()
        name = cache_name(model.forward)
        model(ids, **{name: cache})
        run.compact(cache)
        assert run.report(cache).share < 0.21
        logits: Tensor = model(span.unsqueeze(0), **{name: cache}).logits[0]
    return logits


@pytest.mark.slow
def test_a_fifth_of_the_rows_recalls_what_all_do_where_heads_are_trained() -> None:
    model = planted()
    prompts = []
    for seed in range(100, 140):
        ids, spans = prompt(seed)
        prompts.append((torch.cat([ids, *(span.unsqueeze(0) for span in spans)], 1), TOKENS))
    trained = retaining_heads(model, prompts, RetainingTraining(hidden=64, steps=300, lr=1e-2))
    untrained = retaining_heads(model, prompts[:1], RetainingTraining(hidden=64, steps=1, lr=1e-9))
    dense = recall(model, None)
    assert recall(model, trained) <= dense + 0.3
    assert recall(model, untrained) >= dense + 1
