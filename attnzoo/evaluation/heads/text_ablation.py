"""What each head is worth to a text: its mean log-likelihood with all heads, less that without the head.

Letters: T tokens, L layers, H query heads, V words.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnzoo.heads import HeadScores, ablation_scores, sites
from attnzoo.heads.causal.batches import Progress

ABLATION = "ablation"


def text_ablation(model: Any, ids: Tensor, progress: Progress | None = None) -> HeadScores:
    """What a text's likelihood loses, in nats a token, where each head's output is 0, ``[L, H]``.

    Args:
        model: A decoder of a known family. It is left as it was.
        ids: The text, int64 ``[T]``.
        progress: Told of each layer.

    Raises:
        UnsupportedError: If heads cannot be edited, or layers have different numbers of heads.
    """
    asked = ids[1:].to(model.device)

    def likelihood(logits: Tensor) -> Tensor:
        said = logits[0, :-1].float().log_softmax(-1)  # [T - 1, V]
        return said.gather(1, asked[:, None]).mean()

    found = ablation_scores(model, ids[None], likelihood, progress=progress)
    return HeadScores({ABLATION: found}, sites(model)[0].kv_heads, {"method": ABLATION, "tokens": len(ids)})
