"""LoFiT: offsets of eight heads teach a form of answers; eight random heads learn less of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnzoo import heads
from attnzoo.heads import lofit
from bench.heads.facts import CAPITALS, padded
from bench.heads.outcome import HeadOutcome, HeadRow, above, at_least
from bench.heads.setting import HeadSetting, pairs

PROMPT = "{country}, {capital} ->"
ANSWER = " [{capital}/{country}]"
CHOSEN = 8
ITEMS = 4
RANDOM_EIGHTS = 2

LOSS = "loss"


def format_task(setting: HeadSetting) -> HeadOutcome:
    """Heads are chosen and trained on some countries; losses are of others."""
    learned, kept = batches(setting)
    count = 2 if setting.quick else CHOSEN
    selection = lofit.LofitTraining(steps=2 if setting.quick else 24, rate=5e-3, penalty=1e-3)
    training = lofit.LofitTraining(steps=2 if setting.quick else 32, rate=3e-2)
    found = lofit.select(setting.model, learned, training=selection)
    chosen = pairs(found.top(lofit.LOFIT, count))
    rows = [HeadRow("as it is", {LOSS: mean_loss(setting, kept)})]
    tries = {f"{count} heads that were selected": chosen}
    for seed in range(RANDOM_EIGHTS):
        tries[f"{count} random heads, {seed + 1}"] = setting.others(count, seed, chosen)
    for name, which in tries.items():
        edits = lofit.train(setting.model, learned, heads=which, training=training)
        with heads.edited(setting.model, edits):
            figures = {LOSS: mean_loss(setting, kept)}
        rows.append(HeadRow(name, figures, control=name not in list(tries)[:1]))
    intact, selected, *control = (row.figures[LOSS] for row in rows)
    falls = [1 - loss / intact for loss in (selected, *control)]
    return HeadOutcome(
        title="Offsets of eight heads teach a form of answers",
        source="Yin et al. 2024, LoFiT: Localized Fine-tuning on LLM Representations (arXiv:2406.01563)",
        said=(
            f"Nats per token of answers such as {ANSWER.format(country='Peru', capital='Lima').strip()!r} to prompts "
            f"such as {PROMPT.format(country='Peru', capital='Lima')!r}, of countries that were not trained on. "
            f"{selection.steps} steps of {ITEMS} items choose heads, {training.steps} train their offsets."
        ),
        main=LOSS,
        rows=rows,
        claims=[
            at_least("fall of the loss by selected heads", falls[0], 0.5),
            above("fall of the loss by selected heads, beside the best random ones", falls[0], max(falls[1:])),
        ],
        heads={"selected": chosen},
        maps={"norm of the learned scale": found[lofit.LOFIT].tolist()},
    )


def batches(setting: HeadSetting) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Batches to learn from, and others."""
    items = list(CAPITALS.items())[: 16 if setting.quick else None]
    found = [_batch(setting, items[place : place + ITEMS]) for place in range(0, len(items), ITEMS)]
    return found[0::2], found[1::2][:6]


def _batch(setting: HeadSetting, items: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    rows: list[Tensor] = []
    labels: list[Tensor] = []
    for country, capital in items:
        prompt = setting.encode(PROMPT.format(country=country, capital=capital))
        answer = setting.encode(ANSWER.format(country=country, capital=capital))
        rows.append(torch.cat([prompt, answer]))
        labels.append(torch.cat([torch.full_like(prompt, lofit.IGNORED), answer]))
    ids, mask = padded(rows)
    aligned, _ = padded(labels)
    return {"input_ids": ids, "attention_mask": mask, "labels": aligned.where(mask.bool(), lofit.IGNORED)}


def mean_loss(setting: HeadSetting, given: Sequence[dict[str, Tensor]]) -> float:
    """The mean loss of batches."""
    with torch.no_grad():
        return float(torch.stack([lofit.answer_loss(setting.model, batch) for batch in given]).mean())
