"""Sinks besides the first token: with beta 1 nothing changes, with less their weight goes to the other tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from attnzoo import heads
from attnzoo.evaluation.passkeys import passkey_cases
from attnzoo.heads import act
from bench.heads.outcome import HeadOutcome, HeadRow, above, at_most
from bench.heads.setting import HeadSetting

TEXT_NLL = "text NLL"
KEY_NLL = "key NLL"
BETAS = (1.0, 0.8, 0.0)


def sinks(setting: HeadSetting) -> HeadOutcome:
    """The sinks of all heads, in a text and in a prompt with a number in it, beside those that are spared."""
    texts = _texts(setting)
    found = {name: act.find_sinks(setting.model, ids.unsqueeze(0)) for name, (ids, _) in texts.items()}
    tries: dict[str, dict[str, list[heads.HeadEdit]]] = {"as it is": {name: [] for name in texts}}
    for beta in BETAS:
        tries[f"beta {beta:g}"] = {name: act.calibrate(found[name], beta) for name in texts}
    layers, width = setting.sizes
    for beta in BETAS[1:]:
        tries[f"beta {beta:g} of the first sinks"] = {name: _of_first(found[name], beta) for name in texts}
    rows: list[HeadRow] = []
    said: list[Tensor] = []
    for name, edits in tries.items():
        figures: dict[str, float] = {}
        for text, (ids, start) in texts.items():
            with torch.no_grad(), heads.edited(setting.model, edits[text]):
                logits = setting.model(ids.unsqueeze(0), use_cache=False).logits[0]
            figures[text] = float(cross_entropy(logits[start - 1 : -1], ids[start:]))
        said.append(logits)
        rows.append(HeadRow(name, figures, control="first" in name))
    calibrated, without, without_first = (
        rows[place].figures[TEXT_NLL] - rows[0].figures[TEXT_NLL] for place in (2, 3, 5)
    )
    reached = found[TEXT_NLL].behind_first
    return HeadOutcome(
        title="Attention sinks that count less",
        source="Yu et al. 2024, Unveiling and Harnessing Hidden Attention Sinks (arXiv:2406.15765)",
        said=(
            f"NLL of a text and of a number that was told in a prompt. Of {layers * width} heads "
            f"{int(reached.any(-1).sum())} have a sink besides their first one, in the text; all are calibrated, "
            "where the paper chooses heads that gain."
        ),
        main=TEXT_NLL,
        rows=rows,
        claims=[
            at_most("largest difference of logits with beta 1", float((said[1] - said[0]).abs().max()), 0.0),
            at_most(f"{TEXT_NLL} with beta {BETAS[1]:g}: rise, nats", calibrated, 0.05),
            above(
                f"{TEXT_NLL} with beta 0 of first sinks, beside that of all others: rise",
                without_first,
                without,
            ),
        ],
        maps={"sinks besides the first, in the text": reached.sum((2, 3)).tolist()},
    )


def _of_first(found: act.Sinks, beta: float) -> list[heads.HeadEdit]:
    """Edits of the sinks that calibration spares: each head's first."""
    first = found.tokens & ~found.behind_first
    reached = first.any(-1).any(-1).nonzero().tolist()
    return [
        heads.HeadEdit(layer, head, post=heads.SinkScaling(first[layer, head], beta, by_token=True))
        for layer, head in reached
    ]


def _texts(setting: HeadSetting) -> dict[str, tuple[Tensor, int]]:
    """Texts by what is measured of them, each from a token on."""
    text = setting.text[1024 : 1024 + 192] if not setting.quick else setting.text[:48]
    case = passkey_cases(setting.encode, count=1, length=250 if setting.quick else 200, seed=3)[0]
    start, end = case.needle
    return {TEXT_NLL: (text, 1), KEY_NLL: (torch.cat([case.ids, case.ids[start:end]]), len(case.ids))}
