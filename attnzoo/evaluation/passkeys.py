"""Prompts for retrieval scores that need no data: a number in a haystack of five sentences, and a question for it.

Source: Mohtashami and Jaggi 2023, *Landmark Attention* (arXiv:2305.16300), section 4.2. Departures: the number has five
digits and is said once, so that there is one place to copy it from.
"""

from __future__ import annotations

import torch

from attnzoo.base.config import check_int
from attnzoo.evaluation.two_phase.tasks import GRASS, INTRODUCTION, QUESTION, Encode, keys
from attnzoo.heads.scores.retrieval_cases import RetrievalCase
from attnzoo_kernels.errors import ConfigError

BEFORE = "\nThe pass key is"
BEHIND = ". Remember it.\n"


def passkey_cases(encode: Encode, *, count: int = 5, length: int = 400, seed: int = 0) -> list[RetrievalCase]:
    """Passkeys at places that are evenly apart.

    Args:
        encode: From text to tokens, int64 ``[any]``, without special ones.
        count: How many.
        length: Tokens of each prompt.
        seed: Of the numbers.

    Raises:
        ConfigError: If a number is none, or a prompt has no room for what must be said.
    """
    check_int("count", count, 1)
    check_int("length", length, 1)
    head, before, behind, question = (encode(text) for text in (INTRODUCTION, BEFORE, BEHIND, QUESTION))
    grass = encode(GRASS)
    found: list[RetrievalCase] = []
    for number, key in enumerate(keys(count, seed)):
        needle = encode(f" {key}")
        said = len(head) + len(before) + len(needle) + len(behind) + len(question)
        room = length - said
        if room < 2 or not len(grass):
            raise ConfigError(f"length: expected at least {said + 2} tokens for a passkey, got {length}")
        hay = grass.repeat(-(-room // len(grass)))[:room]
        place = (number + 1) * room // (count + 1)
        start = len(head) + place + len(before)
        ids = torch.cat([head, hay[:place], before, needle, behind, hay[place:], question])
        found.append(RetrievalCase(ids, (start, start + len(needle))))
    return found
