"""What a head may see: a number that is hidden from ten heads cannot be said, whatever all others see.

The weights of chosen tokens multiplied and renormalised is what *imbalanced attention* names; nothing of that paper's
results is claimed here, but that the mechanism is this one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from attnzoo import heads
from attnzoo.evaluation.passkeys import passkey_cases
from bench.heads.outcome import Head, HeadOutcome, HeadRow, above, at_least, at_most
from bench.heads.setting import HeadSetting

KEY_NLL = "key NLL"
GAMMA = 4.0


def reading(setting: HeadSetting) -> HeadOutcome:
    """A passkey, hidden from some heads or emphasised for them."""
    length = 260 if setting.quick else 300
    case = passkey_cases(setting.encode, count=1, length=length, seed=2)[0]
    start, end = case.needle
    ids = torch.cat([case.ids, case.ids[start:end]])
    key = torch.arange(start, end)
    rows = []
    for name, found, bias, control in _tries(setting, key):
        edits = [] if bias is None else _biased(found, bias)
        with heads.edited(setting.model, edits):
            rows.append(HeadRow(name, {KEY_NLL: _key_nll(setting, ids, len(case.ids))}, control))
    intact, hidden, others, everywhere, _, _ = (row.figures[KEY_NLL] for row in rows)
    return HeadOutcome(
        title="Tokens hidden from heads, and emphasised",
        source="Geva et al. 2023, Dissecting Recall of Factual Associations (arXiv:2304.14767): attention knock-out",
        said=(
            "NLL of a number that was told in a prompt, while its tokens are hidden from heads or their weights "
            "multiplied and renormalised. Of imbalanced attention the mechanism alone is claimed."
        ),
        main=KEY_NLL,
        rows=rows,
        claims=[
            at_least("rise where it is hidden from induction heads, nats", hidden - intact, 1.0),
            above("the same beside five times that of random heads", hidden - intact, 5 * (others - intact)),
            at_least(
                "share of the rise where it is hidden from all heads", (hidden - intact) / (everywhere - intact), 0.3
            ),
            at_most(
                "emphasis beside weights multiplied and renormalised: largest difference",
                _renormalised(setting, ids, key),
                1e-5,
            ),
        ],
        heads={"induction": setting.induction},
    )


Try = tuple[str, Sequence[Head], heads.KeyBias | None, bool]
"""What it is called, which heads, what they see, and whether it is a control."""


def _tries(setting: HeadSetting, key: Tensor) -> list[Try]:
    """From whom the key's tokens ``[n]`` are hidden, or for whom they are emphasised."""
    few = setting.few
    elsewhere = key + (60 if setting.quick else 80)
    layers, width = setting.sizes
    everyone = [(layer, head) for layer in range(layers) for head in range(width)]
    induction = setting.induction
    random = setting.others(few, 0, induction)
    hidden = heads.KeyBias.knock_out(None, key)
    stressed = heads.KeyBias.emphasise(key, math.log(GAMMA))
    return [
        ("as it is", [], None, False),
        (f"hidden from {few} induction heads", induction, hidden, False),
        (f"hidden from {few} others", random, hidden, True),
        ("hidden from all heads", everyone, hidden, False),
        ("other tokens hidden from all heads", everyone, heads.KeyBias.knock_out(None, elsewhere), True),
        (f"emphasised {GAMMA:g} times for {few} induction heads", induction, stressed, False),
    ]


def _biased(found: Sequence[Head], bias: heads.KeyBias) -> list[heads.HeadEdit]:
    """One edit for each layer."""
    by_layer: dict[int, list[int]] = {}
    for layer, head in found:
        by_layer.setdefault(layer, []).append(head)
    return [heads.HeadEdit(layer, sorted(those), key_bias=bias) for layer, those in by_layer.items()]


def _key_nll(setting: HeadSetting, ids: Tensor, start: int) -> float:
    with torch.no_grad():
        logits = setting.model(ids.unsqueeze(0), use_cache=False).logits[0]
    return float(cross_entropy(logits[start - 1 : -1], ids[start:]))


def _renormalised(setting: HeadSetting, ids: Tensor, key: Tensor) -> float:
    """How far weights under emphasis are from weights that were multiplied and renormalised, in the first layer."""
    found: list[Tensor] = []
    rows = torch.tensor([len(ids) - 1])
    for edits in ([], [heads.HeadEdit(0, slice(None), key_bias=heads.KeyBias.emphasise(key, math.log(GAMMA)))]):
        seeing = heads.capture(setting.model, ("pattern",), layers=[0], rows=rows)
        with torch.no_grad(), heads.edited(setting.model, edits), seeing as seen:
            setting.model.base_model(ids.unsqueeze(0), use_cache=False)
        found.append(seen["pattern"][0].double())
    plain, emphasised = found
    expected = plain.clone()
    expected[..., key] *= GAMMA
    expected = expected / expected.sum(-1, keepdim=True)
    return float((emphasised - expected).abs().max())
