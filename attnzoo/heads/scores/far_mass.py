"""How much of a head's attention goes far: to neither the first tokens nor the last ones.

It says where heads look, and not what they are needed for.

Letters: L layers, H query heads, B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from attnzoo.base.config import check_int
from attnzoo.heads.scores.attention_rows import attention_rows
from attnzoo.heads.scores.head_scores import HeadScores
from attnzoo.heads.scores.scored_sites import scored_sites
from attnzoo.surgery.capture import watched
from attnzoo.surgery.hosts.calls import AttentionCall
from attnzoo.surgery.hosts.site import Site
from attnzoo.surgery.lowrank.calibration import evaluating
from attnzoo_kernels.errors import ConfigError

FAR_MASS = "far_mass"


def far_mass(model: Any, texts: Iterable[Tensor], sink: int, window: int) -> HeadScores:
    """One minus the attention that stays within a sink and a window, ``[L, H]``, mean over rows that see beyond them.

    Args:
        model: A model of a known family, each of whose blocks reads all that came before. It is left as it was.
        texts: Ids ``[B, T]`` without padding, longer than sink and window together.
        sink: First tokens that count as near.
        window: Last tokens that count as near, the row's own among them; one or more.

    Raises:
        ConfigError: If a number does not fit, or a text has no row that sees farther.
        UnsupportedError: As for :func:`attnzoo.heads.score_heads`.
    """
    check_int("sink", sink, 0)
    check_int("window", window, 1)
    sites = scored_sites(model)
    first = sink + window
    sums: dict[int, Tensor] = {}
    rows = 0

    def see(site: Site, call: AttentionCall) -> None:
        total = sums.get(site.layer, torch.zeros(site.heads, dtype=torch.float64, device="cpu"))
        for row, weights in attention_rows(call.q, call.k, first, scale=call.scale):
            slot = torch.arange(weights.shape[3], device=weights.device)
            far = (slot >= sink) & (slot <= row[:, None] - window)  # [R, S]
            total = total + (weights * far).sum((0, 2, 3)).double().cpu()
        sums[site.layer] = total

    with torch.no_grad(), evaluating(model), watched(model, see, sites=sites):
        for ids in texts:
            if ids.dim() != 2 or ids.shape[1] <= first:
                raise ConfigError(f"texts: expected ids [B, T] of more than {first} tokens, got {list(ids.shape)}")
            rows += ids.shape[0] * (ids.shape[1] - first)
            model.base_model(ids.to(model.device), use_cache=False)
    if not rows:
        raise ConfigError("texts: expected at least one, got none")
    found = torch.stack([sums[site.layer] for site in sites]) / rows
    return HeadScores({FAR_MASS: found}, sites[0].kv_heads, {"method": FAR_MASS, "sink": sink, "window": window})
