"""What a text's likelihood loses without each head, exactly and to first order."""

from __future__ import annotations

import time

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from attnzoo import heads
from bench.heads.outcome import HeadOutcome, HeadRow, at_least, at_most
from bench.heads.setting import HeadSetting, best

LOST = "nats lost"
COMPARED = 10


def ablations(setting: HeadSetting) -> HeadOutcome:
    """All heads of the model, one at a time, and a backward for all of them."""
    ids = setting.text[2048 : 2048 + 128] if not setting.quick else setting.text[:32]
    batch = ids.unsqueeze(0)

    def metric(logits: Tensor) -> Tensor:
        return -cross_entropy(logits[0, :-1].float(), ids[1:])

    began = time.process_time()
    exact = heads.ablation_scores(setting.model, batch, metric)
    seconds = time.process_time() - began
    began = time.process_time()
    estimated = heads.attribution(setting.model, batch, None, metric)
    estimate_seconds = time.process_time() - began
    largest = best(exact.abs(), min(COMPARED, exact.numel()))
    rows = []
    for layer, head in largest:
        figures = {LOST: float(exact[layer, head]), "to first order": float(estimated[layer, head])}
        rows.append(HeadRow(f"({layer}, {head})", figures))
    agreeing = sum(row.figures[LOST] * row.figures["to first order"] > 0 for row in rows)
    both = torch.stack([exact.flatten(), estimated.flatten()])
    claims = [
        at_most(f"CPU seconds of all {exact.numel()} scores", seconds, 180),
        at_least(f"signs that agree among the {len(rows)} largest", agreeing, 0.9 * len(rows)),
    ]
    return HeadOutcome(
        title="Every head taken away",
        source="Michel et al. 2019, Are Sixteen Heads Really Better than One? (arXiv:1905.10650); Syed et al. 2023 "
        "(arXiv:2310.10348)",
        said=(
            f"What {len(ids)} tokens of a text lose in nats per token without a head: {seconds:.0f} CPU seconds for "
            f"all, {estimate_seconds:.1f} for the estimates, which have a correlation of "
            f"{float(both.corrcoef()[0, 1]):.2f}. The largest are shown."
        ),
        main=LOST,
        rows=rows,
        claims=claims,
        heads={"largest": largest},
        maps={"nats lost without a head": exact.tolist()},
    )
