"""Ten heads carry a model's retrieval: without them it does not find a number that it was told."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
from torch.nn.functional import cross_entropy

from attnzoo import heads
from attnzoo.evaluation.passkeys import passkey_cases
from attnzoo.evaluation.two_phase.scores import DenseReader, score_case
from attnzoo.evaluation.two_phase.tasks import Case, keys, passkey_case
from bench.heads.outcome import Head, HeadOutcome, HeadRow, above, at_least, at_most
from bench.heads.setting import HeadSetting, pairs, zeroed

KEY_NLL = "key NLL"
TEXT_NLL = "text NLL"
RANDOM_TENS = 3


def knock_out(setting: HeadSetting) -> HeadOutcome:
    """Heads by induction and by retrieval taken away, beside random ones."""
    by_induction = setting.induction
    by_retrieval = _by_retrieval(setting)
    carrying = {*by_induction, *by_retrieval}
    conditions: dict[str, list[Head]] = {
        "as it is": [],
        f"without {setting.few} by induction": by_induction,
        f"without {setting.few} by retrieval": by_retrieval,
    }
    randoms = [setting.others(setting.few, seed, carrying) for seed in range(RANDOM_TENS)]
    conditions |= {f"without {setting.few} others, {i + 1}": found for i, found in enumerate(randoms)}
    cases = key_cases(setting)
    rows: list[HeadRow] = []
    for place, (name, found) in enumerate(conditions.items()):
        with heads.edited(setting.model, zeroed(found)):
            figures = key_figures(setting, cases) | {TEXT_NLL: text_nll(setting)}
        rows.append(HeadRow(name, figures, control=place > 2))
    intact, induction, retrieval, *control = (row.figures for row in rows)
    most = max(figures[KEY_NLL] - intact[KEY_NLL] for figures in control)
    claims = []
    for name, figures in (("induction", induction), ("retrieval", retrieval)):
        rise = figures[KEY_NLL] - intact[KEY_NLL]
        claims += [
            at_least(f"{KEY_NLL} without heads by {name}: rise, nats", rise, 1.0),
            above(f"{KEY_NLL} without heads by {name}: rise, beside five times that of random ones", rise, 5 * most),
            at_most(f"{TEXT_NLL} without heads by {name}: rise, nats", figures[TEXT_NLL] - intact[TEXT_NLL], 0.08),
        ]
    return HeadOutcome(
        title="Retrieval heads knocked out",
        source="Wu et al. 2024, Retrieval Head Mechanistically Explains Long-Context Factuality (arXiv:2404.15574)",
        said=(
            "NLL of numbers of five digits that were told in a longer prompt, and of a text, while outputs of heads "
            "are 0. Heads were chosen on random tokens (induction) or on other numbers (retrieval); random ones are "
            "none of these."
        ),
        main=KEY_NLL,
        rows=rows,
        claims=claims,
        heads={"induction": by_induction, "retrieval": by_retrieval},
    )


def _by_retrieval(setting: HeadSetting) -> list[Head]:
    """Heads that copy passkeys; a tiny model with random weights says none, and gives heads of another kind."""
    if setting.quick:
        return pairs(setting.repeated.top("echo", setting.few))
    cases = passkey_cases(setting.encode, count=3, length=250, seed=1)
    return pairs(heads.scores.retrieval(setting.model, cases).top("retrieval", setting.few))


def key_cases(setting: HeadSetting) -> list[Case]:
    """Numbers in grass, and one in a text."""
    context = 300 if setting.quick else 400
    haystacks = [None, None, setting.text[256:] if not setting.quick else None]
    return [
        passkey_case(f"key {place}", setting.encode, context=context, key=key, depth=depth, haystack=haystack)
        for place, (key, depth, haystack) in enumerate(zip(keys(3), (0.2, 0.4, 0.6), haystacks, strict=True))
    ]


def key_figures(setting: HeadSetting, cases: Sequence[Case]) -> dict[str, float]:
    """NLL of keys, and the share of them that greedy decoding says."""
    found = [score_case(DenseReader(setting.model), case) for case in cases]
    nll = statistics.fmean(value for one in found for value in one.nll["key"])
    said = statistics.fmean(float(right) for one in found for right in one.right)
    return {KEY_NLL: nll, "keys said": said}


def text_nll(setting: HeadSetting) -> float:
    """NLL of a text that is read at once."""
    ids = setting.text[1024 : 1024 + 512] if not setting.quick else setting.text[:64]
    with torch.no_grad():
        logits = setting.model(ids.unsqueeze(0), use_cache=False).logits[0]
    return float(cross_entropy(logits[:-1], ids[1:]))
