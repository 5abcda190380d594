"""Heads whose weights alone name the next one of a class: Monday behind Sunday, five behind four."""

from __future__ import annotations

from attnzoo import heads
from bench.heads.outcome import HeadRow, Outcome, at_least
from bench.heads.setting import HeadSetting, pairs

CLASSES = {
    "weekdays": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "months": "January February March April May June July August September October November December",
    "numbers": "one two three four five six seven eight nine ten",
    "ordinals": "first second third fourth fifth sixth seventh eighth ninth tenth",
    "letters": "A B C D E F G H I J K L",
    "roman numbers": "I II III IV V VI VII VIII IX X",
}
SHOWN = 5
SUCCESSOR_HEAD = 0.5
"""A head that names more than half of all successors is one."""


def successors(setting: HeadSetting) -> Outcome:
    """The best heads, beside the same classes in the wrong order, of which nothing can be known."""
    classes = single_tokens(setting)
    # Every third word next: a head that has learned the order finds few of these.
    shuffled = {name: [tokens[(3 * i) % len(tokens)] for i in range(len(tokens))] for name, tokens in classes.items()}
    shuffled = {name: list(dict.fromkeys(tokens)) for name, tokens in shuffled.items()}
    found = heads.scores.successor(setting.model, classes)
    control = heads.scores.successor(setting.model, shuffled)
    copying = heads.scores.copying(setting.model, classes)
    asked = int(found.about["asked"])
    best = found.top("successor", SHOWN)
    rows = [
        HeadRow(
            f"({one.layer}, {one.head})",
            {"successors": one.score, "copies": float(copying["copying"][one.layer, one.head])},
        )
        for one in best
    ]
    wrong = control.top("successor", 1)[0]
    name = f"({wrong.layer}, {wrong.head}), classes in another order"
    rows.append(HeadRow(name, {"successors": wrong.score}, control=True))
    copied = copying.top("copying", SHOWN)
    rows += [
        HeadRow(
            f"({one.layer}, {one.head}), best by copying",
            {"successors": float(found["successor"][one.layer, one.head]), "copies": one.score},
        )
        for one in copied[:2]
    ]
    verdict = "a successor head" if best[0].score >= SUCCESSOR_HEAD else "no successor head worth the name"
    return Outcome(
        title="Successor heads",
        source="Gould et al. 2023, Successor Heads (arXiv:2312.09230)",
        said=(
            f"Share of {asked} tokens of {len(classes)} classes whose successor a head's weights score highest in its "
            f"class: {verdict}."
        ),
        main="successors",
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


def single_tokens(setting: HeadSetting) -> dict[str, list[int]]:
    """Words of each class that are one token; a class of which fewer than four are left is skipped."""
    found: dict[str, list[int]] = {}
    for name, words in CLASSES.items():
        tokens = [setting.encode(f" {word}") for word in words.split()]
        # Bytes stand for words where the model reads bytes.
        kept = [int(ids[1 if setting.quick else 0]) for ids in tokens if setting.quick or len(ids) == 1]
        kept = list(dict.fromkeys(kept))
        if len(kept) >= 4:
            found[name] = kept
    return found
