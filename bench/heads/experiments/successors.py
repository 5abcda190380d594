"""Heads whose weights alone name the next one of a class: Monday behind Sunday, five behind four."""

from __future__ import annotations

import random

from attnzoo import heads
from attnzoo.evaluation.heads.word_classes import word_classes
from bench.heads.outcome import HeadOutcome, HeadRow, at_least
from bench.heads.setting import HeadSetting, pairs

SHOWN = 5
SUCCESSOR_HEAD = 0.5
"""A head that names more than half of all successors is one."""


def successors(setting: HeadSetting) -> HeadOutcome:
    """The best heads, beside the same classes in another order, of which nothing can be known."""
    classes = {"bytes": list(range(97, 110))} if setting.quick else word_classes(setting.encode)[0]
    shuffled = {name: random.Random(0).sample(tokens, len(tokens)) for name, tokens in classes.items()}
    found = heads.scores.successor(setting.model, classes)
    control = heads.scores.successor(setting.model, shuffled)
    copying = heads.scores.copying(setting.model, classes)
    best = found.top("successor", SHOWN)
    copied = copying.top("copying", SHOWN)
    rows = []
    for one, name in [*((one, "") for one in best), *((one, ", best by copying") for one in copied[:2])]:
        figures = {kind: float(table[kind][one.layer, one.head]) for table in (found, copying) for kind in table.kinds}
        rows.append(HeadRow(f"({one.layer}, {one.head}){name}", figures))
    wrong = control.top("successor", 1)[0]
    other = f"({wrong.layer}, {wrong.head}), classes in another order"
    rows.append(HeadRow(other, {"successor": wrong.score}, control=True))
    verdict = (
        "one is a successor head" if best[0].score >= SUCCESSOR_HEAD else "none is a successor head worth the name"
    )
    asked = found.about["asked"]
    return HeadOutcome(
        title="Successor heads",
        source="Gould et al. 2023, Successor Heads (arXiv:2312.09230)",
        said=(
            f"Share of {asked} tokens of {len(classes)} classes ({', '.join(classes)}) whose successor a head's "
            f"weights score highest in its class: {verdict}. Copying is the same of the token itself."
        ),
        main="successor",
        rows=rows,
        claims=[
            at_least(
                "heads whose weights copy at least .9 of these tokens", float((copying["copying"] >= 0.9).sum()), 1
            )
        ],
        heads={"successor": pairs(best), "copying": pairs(copied)},
        maps={
            "successors named by weights": found["successor"].tolist(),
            "tokens copied by weights": copying["copying"].tolist(),
        },
    )
