"""A context says what the model knows better: one head, scaled, decides whom it believes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnzoo import heads
from bench.heads.facts import Answers, Conflicts, answers, conflicts, known_countries
from bench.heads.outcome import Head, HeadOutcome, HeadRow, at_least, at_most
from bench.heads.setting import HeadSetting, best, scaled

PREFERS = "prefers the context"
UP = (3.0, 5.0, 8.0)
DOWN = (0.0, -1.0)
CANDIDATES = 4


def conflict(setting: HeadSetting) -> HeadOutcome:
    """Heads by their contributions on one half of the facts, scales chosen there, and figures of the other half."""
    countries = known_countries(setting.model, setting.encode, ask=not setting.quick)[: 8 if setting.quick else None]
    items = conflicts(setting.encode, countries)
    search, report = items.half(0), items.half(1)
    table = toward_known(setting, search)
    candidates = [(head, scale) for head in best(table, CANDIDATES, largest=False) for scale in UP]
    candidates += [(head, scale) for head in best(table, CANDIDATES // 2) for scale in DOWN]
    tried = [(answered(setting, search, [head], scale).told, head, scale) for head, scale in candidates]
    _, chosen, scale = max(tried)
    rows = [_row("as it is", answers(setting.model, report))]
    rows.append(_row(f"{chosen} x {scale:g}", answered(setting, report, [chosen], scale)))
    back = 0.0 if scale > 1 else 3.0
    rows.append(_row(f"{chosen} x {back:g}", answered(setting, report, [chosen], back)))
    # Random heads of the same layer, so that what is told apart is the head, and not where it stands.
    width = setting.sizes[1]
    beside = [head for head in range(width) if (chosen[0], head) not in {one for one, _ in candidates}][:3]
    for head in beside:
        name = f"({chosen[0]}, {head}) x {scale:g}"
        rows.append(_row(name, answered(setting, report, [(chosen[0], head)], scale), control=True))
    intact, flipped, _, *control = (row.figures[PREFERS] for row in rows)
    claims = [
        at_most("items that prefer the context as it is", intact, 0.3),
        at_least("items that prefer the context with one head scaled", flipped, 0.5),
        at_most("the same with another head of that layer scaled", max(control, default=0.0), 0.4),
    ]
    return HeadOutcome(
        title="A head that flips a knowledge conflict",
        source="Yu et al. 2023, Characterizing Mechanisms for Factual Recall in Language Models (arXiv:2310.15910)",
        said=(
            f"{len(items.ids)} capitals that the model knows, each contradicted by its prompt. Heads and their scale "
            f"were chosen on {len(search.ids)} of them by what they contribute and by what the model then says; "
            f"figures are of the other {len(report.ids)}."
        ),
        main=PREFERS,
        rows=rows,
        claims=claims,
        heads={"toward what is known": best(table, 5), "toward the context": best(table, 5, largest=False)},
        maps={"contribution toward what is known, logits": table.tolist()},
    )


def toward_known(setting: HeadSetting, items: Conflicts) -> Tensor:
    """How much each head adds to the logit of what is known, less that of what the context says: ``[L, H]``."""
    unembedding = setting.model.get_output_embeddings().weight.detach()
    direction = (unembedding[items.known] - unembedding[items.told]).unsqueeze(1)  # [B, 1, C]
    with torch.no_grad(), heads.capture(setting.model, rows="last") as seen:
        setting.model(**items.batch, use_cache=False, logits_to_keep=1)
    found = heads.contributions(setting.model, seen, direction)  # [L, H, B, 1]
    return found.mean((2, 3)).double().cpu()


def answered(setting: HeadSetting, items: Conflicts, found: Sequence[Head], scale: float) -> Answers:
    """What the model answers while heads are scaled."""
    with heads.edited(setting.model, scaled(found, scale)):
        return answers(setting.model, items)


def _row(name: str, found: Answers, *, control: bool = False) -> HeadRow:
    figures = {PREFERS: found.prefers, "says the context's": found.told, "says what it knows": found.known}
    return HeadRow(name, figures, control)
