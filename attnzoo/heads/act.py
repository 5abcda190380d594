r"""ACT: attention that some tokens take without need is given to the others, in heads that are chosen.

A *sink* is a token that more attention goes to than its share. With S the sinks of a head but for the first one, P the
attention that a row gives to S, and :math:`\ell` the log-sum-exps of its scores on S and on all other keys N,

.. math:: P = \mathrm{sigmoid}(\ell_S - \ell_N), \quad o = \beta P\, o_S + (1 - \beta P)\, o_N,

so that what is left of attention to S is :math:`\beta` of it, the rest goes to the other keys in proportion, and rows
still sum to 1. Two reads of the same keys do it; no matrix of rows and keys is ever held, and a row of a decoding step
reads as the same row of a prompt.

Source: Yu et al. 2024, *Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without
Training through Attention Calibration* (arXiv:2406.15765); written from the formulas alone.

Departures:
    - Sinks are found in a prompt once, and are the same tokens in decoding; published code works them out anew for each
      row of a step, whose weights then sum to more than 1.
    - A token's attention is the sum over rows of what they give it, over the mean of all tokens.
    - Which heads are calibrated is the caller's choice.

Letters: L layers, H query heads, B batch, T tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo.base.padding import Alignment
from attnzoo.heads.scores.attention_rows import attention_rows
from attnzoo.heads.scores.scored_sites import scored_sites
from attnzoo.surgery.capture import watched
from attnzoo.surgery.edits.edit import HeadEdit, Where
from attnzoo.surgery.edits.key_bias import SinkScaling
from attnzoo.surgery.hosts.calls import AttentionCall
from attnzoo.surgery.hosts.site import Site
from attnzoo.surgery.lowrank.calibration import evaluating
from attnzoo_kernels.errors import ConfigError

THRESHOLD = 5.0
"""How many times the mean a token's attention is where it is a sink."""


@dataclass(frozen=True, eq=False)
class Sinks:
    """The attention that tokens receive, and which of them are sinks.

    Attributes:
        mass: Over the mean of an item's tokens ``[L, H, B, T]``, fp32 or fp64; 0 behind an item's last token.
        threshold: From how many times the mean on a token is a sink.
    """

    mass: Tensor
    threshold: float

    @property
    def tokens(self) -> Tensor:
        """Which tokens are sinks, bool ``[L, H, B, T]``; padding does not count among tokens."""
        return self.mass > self.threshold

    @property
    def behind_first(self) -> Tensor:
        """The same without the first sink of each head and item, which models need."""
        return self.tokens & (self.tokens.cumsum(-1) > 1)


def find_sinks(
    model: Any, tokens: Tensor, *, attention_mask: Tensor | None = None, threshold: float = THRESHOLD
) -> Sinks:
    """Finds the sinks of each head in prompts, in one forward.

    Args:
        model: A model of a known family, each of whose blocks reads all that came before. It is left as it was.
        tokens: Ids ``[B, T]``.
        attention_mask: Where there are tokens, ``[B, T]``.
        threshold: How many times the mean of its item's tokens a sink receives.

    Raises:
        ConfigError: If the threshold is not above 0.
        UnsupportedError: As for :func:`attnzoo.heads.score_heads`.
    """
    if not threshold > 0:
        raise ConfigError(f"threshold: expected more than 0, got {threshold!r}")
    sites = scored_sites(model)
    found: list[Tensor] = []

    def see(site: Site, call: AttentionCall) -> None:
        found.append(_received(call).cpu())

    with torch.no_grad(), evaluating(model), watched(model, see, sites=sites):
        model.base_model(tokens.to(model.device), attention_mask=attention_mask, use_cache=False)
    return Sinks(torch.stack(found), threshold)


def calibrate(
    sinks: Sinks, beta: float, *, heads: Iterable[tuple[int, int]] | None = None, where: Where = "all"
) -> list[HeadEdit]:
    """Edits that leave a share of the attention to sinks, for the prompts in which these were found.

    Args:
        sinks: What :func:`find_sinks` has found; the first sink of each head and item is spared.
        beta: What is left of the attention to the others, from 0 to 1; 1 changes nothing, to the bit.
        heads: Layers and query heads; all by default.
        where: In which calls: see :class:`attnzoo.heads.HeadEdit`.

    Returns:
        One for each of these heads that has a sink to calibrate.

    Raises:
        ConfigError: If there is no such head, or ``beta`` is out of its range.
    """
    layers, count = sinks.mass.shape[:2]
    every = [(layer, head) for layer in range(layers) for head in range(count)]
    chosen = every if heads is None else list(heads)
    reached = sinks.behind_first
    edits = []
    for layer, head in chosen:
        if not (0 <= layer < layers and 0 <= head < count):
            raise ConfigError(f"heads: expected layers below {layers} and heads below {count}, got {(layer, head)}")
        if bool(reached[layer, head].any()):
            post = SinkScaling(reached[layer, head], beta, by_token=True)
            edits.append(HeadEdit(layer, head, post=post, where=where))
    return edits


def _received(call: AttentionCall) -> Tensor:
    """The attention that each token receives from all rows, over the mean of its item's ``[H, B, T]``."""
    q = call.q
    k = call.k
    batch, heads, tokens, _ = q.shape
    lengths = torch.full((batch,), tokens, device=q.device)
    if call.geometry.real is not None:
        # Padding receives nothing, and asks for nothing: each item's tokens come first.
        moved = Alignment.of(~call.geometry.real[:, :tokens].bool())
        q = moved.aligned(q)
        k = moved.aligned(k)
        lengths = moved.lengths
    mass = torch.zeros(batch, heads, tokens, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    for row, weights in attention_rows(q, k, 0, scale=call.scale):
        real = (row < lengths[:, None])[:, None, :, None]
        mass[:, :, : weights.shape[3]] += weights.masked_fill(~real, 0).sum(2)
    # As many rows as tokens: the mean of an item's tokens is 1.
    return mass.transpose(0, 1)
