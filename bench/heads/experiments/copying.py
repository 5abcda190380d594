"""Path patching on a copy task: what induction heads tell the output, and what they are told by heads before them."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo import heads
from bench.heads.outcome import Head, HeadOutcome, HeadRow, above, at_least
from bench.heads.setting import HeadSetting, pairs

SHARE = "share of the effect"
RANDOM_TENS = 2


def copying(setting: HeadSetting) -> HeadOutcome:
    """Random tokens that come again, and the same ones in another order before."""
    clean, corrupt, right, wrong = copy_task(setting)
    model = setting.model
    rows_of = torch.arange(len(clean))

    def metric(logits: Tensor) -> Tensor:
        said = logits[:, -1]
        return (said[rows_of, right] - said[rows_of, wrong]).mean()

    with torch.no_grad():
        intact, other = (float(metric(model(ids, use_cache=False).logits)) for ids in (clean, corrupt))
    induction = setting.induction
    width = 2 if setting.quick else 60
    previous = pairs(heads.scores.previous(model, length=width, repeats=2).top("previous", setting.few))
    rows = []
    for name, (sending, receiving, control) in _paths(setting, induction, previous).items():
        effect = heads.path(model, clean, corrupt, sending, receiving, metric)
        rows.append(HeadRow(name, {"effect, logits": effect, SHARE: effect / (intact - other)}, control))
    first, second = rows[0].figures[SHARE], rows[-2].figures[SHARE]
    randoms = [abs(row.figures[SHARE]) for row in rows if row.control]
    return HeadOutcome(
        title="Paths of a copy task",
        source="Wang et al. 2022, Interpretability in the Wild (arXiv:2211.00593); Olsson et al. 2022, In-context "
        "Learning and Induction Heads (arXiv:2209.11895)",
        said=(
            f"{len(clean)} sequences of random tokens that come again up to some place, where the next one is to be "
            f"said; the other text has the first copy in another order. Right less wrong logit: {intact:.2f}, and "
            f"{other:.2f} for the other text. An effect is what is lost by these paths alone, exactly."
        ),
        main=SHARE,
        rows=rows,
        claims=[
            at_least("share of induction heads' direct effect", first, 0.1),
            above("the same beside five times the largest of random heads", first, 5 * max(randoms[:RANDOM_TENS])),
            above(
                "share that goes from previous-token heads through induction heads, beside random ones",
                second,
                randoms[-1],
            ),
        ],
        heads={"induction": induction, "previous token": previous},
    )


def _paths(
    setting: HeadSetting, induction: list[Head], previous: list[Head]
) -> dict[str, tuple[list[Head], list[Head] | None, bool]]:
    """Who sends, who receives (the output where nobody is named), and whether it is a control."""
    found: dict[str, tuple[list[Head], list[Head] | None, bool]] = {
        "induction heads -> output": (induction, None, False)
    }
    known = [*induction, *previous]
    for seed in range(RANDOM_TENS):
        found[f"random heads, {seed + 1} -> output"] = (setting.others(setting.few, seed, known), None, True)
    found["previous-token heads -> induction heads"] = (previous, induction, False)
    found["random heads, 1 -> induction heads"] = (setting.others(setting.few, 0, known), induction, True)
    return found


def copy_task(setting: HeadSetting, *, batch: int = 4, length: int = 20) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Texts ``[B, T]``, the same with a first copy in another order, and the tokens that follow by either ``[B]``."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = setting.model.get_input_embeddings().num_embeddings
    again = 3 * length // 4
    texts = []
    for _ in range(batch):
        # Common tokens of byte pairs, none of them special.
        first = torch.randperm(min(vocabulary, 20_000) - 100, generator=generator)[:length] + 100
        order = torch.randperm(length, generator=generator)
        # The token behind which the answer is to be said has another successor in the other text.
        while order[-1] == again - 1 or first[order][(order == again - 1).nonzero().flatten() + 1] == first[again]:
            order = torch.randperm(length, generator=generator)
        cue = int((order == again - 1).nonzero())
        other = first[order]
        texts.append(
            (torch.cat([first, first[:again]]), torch.cat([other, first[:again]]), first[again], other[cue + 1])
        )
    clean, corrupt, right, wrong = (torch.stack(parts) for parts in zip(*texts, strict=True))
    return clean, corrupt, right, wrong
