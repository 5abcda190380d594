"""Heads whose output changes most with a context are those by which a model knows what the context says."""

from __future__ import annotations

from attnzoo import heads
from bench.heads.experiments.conflict import answered
from bench.heads.facts import CONFLICT, QUESTIONS, invented
from bench.heads.outcome import Head, HeadOutcome, HeadRow, above, at_least
from bench.heads.setting import HeadSetting, best

RANDOM_TENS = 2
NLL = "NLL of the context's answer"


def context_heads(setting: HeadSetting) -> HeadOutcome:
    """Divergence of heads with and without a context, and what taking these heads away, or doubling them, does."""
    items = invented(setting.encode, form=CONFLICT)
    alone = invented(setting.encode, form=QUESTIONS)
    search, report = items.half(0), items.half(1)
    table = heads.divergence(setting.model, search.batch, alone.half(0).batch, rows=1)
    chosen = best(table, setting.few)
    tries: dict[str, tuple[list[Head], float]] = {"as it is": ([], 1.0)}
    tries[f"{setting.few} that diverge most, x 0"] = (chosen, 0.0)
    for seed in range(RANDOM_TENS):
        tries[f"{setting.few} others x 0, {seed + 1}"] = (setting.others(setting.few, seed, chosen), 0.0)
    tries[f"{setting.few} that diverge most, x 2"] = (chosen, 2.0)
    tries[f"{setting.few} others x 2, 1"] = (setting.others(setting.few, 0, chosen), 2.0)
    rows = []
    for name, (found, scale) in tries.items():
        answer = answered(setting, report, found, scale)
        rows.append(HeadRow(name, {NLL: answer.nll, "says it": answer.told}, control="others" in name))
    intact, without, *others = (row.figures[NLL] for row in rows[: 2 + RANDOM_TENS])
    most = max(0.0, max(others) - intact)
    return HeadOutcome(
        title="Heads that diverge with a context",
        source="He et al. 2024, Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence "
        "(arXiv:2412.13949)",
        said=(
            "How far outputs of heads at the last token are from what they are without the sentence that tells the "
            f"capital of a country that does not exist, and what scaling them does to {len(report.ids)} other such "
            "questions. The paper's context is an image."
        ),
        main=NLL,
        rows=rows,
        claims=[
            at_least(f"{NLL} without the heads that diverge most: rise, nats", without - intact, 0.5),
            above("the same beside twice that of random heads", without - intact, 2 * most),
        ],
        heads={"diverging": chosen},
        maps={"divergence": table.tolist()},
    )
