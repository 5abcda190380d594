r"""DuoAttention's calibration: a gate for each KV head, trained to say whether the head must remember everything.

Two streams read a text. The first one attends to everything. In the second one each head h mixes what the first
stream's head has given with streaming attention of its own, by the gate of its KV head,

.. math:: O_h = \alpha O^{full}_h + (1 - \alpha) O^{stream}_h,

and gates are trained by the squared distance between the last hidden states of both streams, over rows that give an
answer, and by a penalty on their mean: what a head may forget without harm, it shall forget.

Source: Xiao et al. 2024, *DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads*,
section 2.2 (arXiv:2410.10819); code: mit-han-lab/duo-attention, duo_attn/train.py, whose learning rate, schedule,
penalty and first gates these are. Departures: gates are fp32 instead of bf16; the streams are two forwards, of which
the first one needs no graph; streaming is by blocks, as the policy has it; texts repeat themselves, see
:mod:`attnzoo.heads.training.verbatim`.

Letters: B batch, T tokens, C model width, L layers, H query heads, G KV heads, M blocks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnzoo.base.config import check_int
from attnzoo.cache.policies.duo import SETTINGS, Duo, top_heads, write_gates
from attnzoo.cache.policies.streaming import Streaming
from attnzoo.heads.scores.scored_sites import scored_sites
from attnzoo.surgery.capture import around_attention
from attnzoo.surgery.hosts.calls import AttentionCall
from attnzoo.surgery.hosts.site import Site
from attnzoo.surgery.lowrank.calibration import evaluating
from attnzoo_kernels import BlockLayout, block_sparse_attention
from attnzoo_kernels.errors import ConfigError

Batch = Mapping[str, Tensor]

RAMP = 5
"""The learning rate rises over one part in so many of the steps, and falls over as many."""

LEAST_RATE = 0.1
"""The smallest share of the learning rate."""


@dataclass(frozen=True, eq=False)
class DuoGates:
    """What was learned.

    Attributes:
        gates: On the CPU ``[L, G]``, from 0, a head that may forget, to 1, one that must not.
        losses: Of each step, the penalty included.
        streaming: What heads that may forget keep.
    """

    gates: Tensor
    losses: tuple[float, ...]
    streaming: Streaming = field(default_factory=Streaming)

    def policy(self, keep: float | None = None) -> Duo:
        """The policy that these gates make.

        Args:
            keep: Share of the KV heads that hold everything, those of the largest gates, rounded down to heads;
                ``None`` takes gates of a half and above.

        Raises:
            ConfigError: If it is no share.
        """
        settings = self.streaming
        if keep is None:
            full = self.gates >= 0.5
        elif not 0 <= keep <= 1:
            raise ConfigError(f"keep: expected a share from 0 to 1, got {keep!r}")
        else:
            full = top_heads(self.gates, int(keep * self.gates.numel() + 1e-9))
        return Duo(full, sink=settings.sink, window=settings.window, block=settings.block)

    def save(self, folder: str | Path) -> Path:
        """Writes the folder of published gates, which ``Duo.load`` reads.

        Raises:
            OSError: If the disk refuses.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_gates(folder, self.gates.double())
        sizes = {"sink_size": self.streaming.sink, "recent_size": self.streaming.window}
        (folder / SETTINGS).write_text(json.dumps(sizes, indent=4) + "\n", encoding="utf-8")
        return folder


def calibrate_duo(
    model: Any,
    batches: Iterable[Batch],
    *,
    streaming: Streaming | None = None,
    steps: int = 2000,
    rate: float = 0.02,
    penalty: float = 0.05,
    progress: Callable[[str, int, int], None] | None = None,
) -> DuoGates:
    """Learns which KV heads of a model must hold everything.

    Args:
        model: A causal model of a known family; it is left as it was, weights and gradients too.
        batches: Mappings with "input_ids", int64 ``[B, T]``, and "answers", bool ``[B, T]``, the rows whose hidden
            states shall stay; such as :func:`attnzoo.heads.verbatim_batches` gives. They are gone through in turn.
        streaming: What a head keeps that does not hold everything.
        steps: Of training, a batch each.
        rate: The learning rate of AdamW, without weight decay.
        penalty: The weight of the gates' mean.
        progress: Told of each step.

    Raises:
        ConfigError: If a batch or a number does not fit.
        UnsupportedError: If the model's attention cannot be directed, see :func:`attnzoo.heads.score_heads`.
    """
    check_int("steps", steps, 1)
    for name, value in (("rate", rate), ("penalty", penalty)):
        if not value >= 0:
            raise ConfigError(f"{name}: expected at least 0, got {value!r}")
    sites = scored_sites(model)
    checked = [_checked(batch) for batch in batches]
    if not checked:
        raise ConfigError("batches: expected at least one, got none")
    losses: list[float] = []
    with torch.inference_mode(False), torch.enable_grad(), evaluating(model):
        device = model.device
        wide = torch.promote_types(model.dtype, torch.float32)
        gates = torch.ones(len(sites), sites[0].kv_heads, dtype=wide, device=device, requires_grad=True)
        streams = Streams(model, sites, streaming or Streaming())
        optimizer = torch.optim.AdamW([gates], lr=rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, steps))
        for step in range(steps):
            with torch.no_grad():
                gates.clamp_(0, 1)
            batch = checked[step % len(checked)]
            distance = streams.distance(gates, batch["input_ids"].to(device), batch["answers"].to(device))
            loss = distance + penalty * gates.abs().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
            if progress is not None:
                progress("gates", step + 1, steps)
    return DuoGates(gates.detach().clamp(0, 1).cpu(), tuple(losses), streams.streaming)


def rate_at(step: int, steps: int) -> float:
    """The share of the learning rate at a step: up, level, and down, each end a fifth of the steps."""
    ramp = max(1, steps // RAMP)
    return min(1.0, max((step + 1) / ramp, LEAST_RATE), max((steps - step) / ramp, LEAST_RATE))


class Streams:
    """The two streams of a model.

    Args:
        model: The model, in evaluation mode.
        sites: Its attention blocks.
        streaming: What a head keeps that does not hold everything.
    """

    def __init__(self, model: Any, sites: Sequence[Site], streaming: Streaming) -> None:
        self.model = model
        self.sites = sites
        self.streaming = streaming
        self._layouts: dict[int, BlockLayout] = {}

    def distance(self, gates: Tensor, ids: Tensor, answers: Tensor) -> Tensor:
        """How far the second stream's hidden states are from the first one's: squared, mean over answers and width.

        Args:
            gates: ``[L, G]``.
            ids: int64 ``[B, T]``.
            answers: Which rows count, bool ``[B, T]``.
        """
        whole: dict[int, Tensor] = {}

        def attend_whole(site: Site, call: AttentionCall) -> Tensor:
            whole[site.layer] = call.answered()
            return whole[site.layer]

        def attend_mixed(site: Site, call: AttentionCall) -> Tensor:
            layout = self._layout(call.q)
            streamed = block_sparse_attention(call.q, call.k, call.v, layout, causal=True, scale=call.scale)
            gate = gates[site.layer].repeat_interleave(site.heads // site.kv_heads).view(1, -1, 1, 1)
            return (gate * whole.pop(site.layer) + (1 - gate) * streamed).to(call.q.dtype)

        with torch.no_grad(), around_attention(self.model, attend_whole, sites=self.sites):
            target = self._hidden(ids)[answers]
        with around_attention(self.model, attend_mixed, sites=self.sites):
            found = self._hidden(ids)[answers]
        return (found - target).to(gates.dtype).square().mean()

    def _hidden(self, ids: Tensor) -> Tensor:
        """The last hidden states ``[B, T, C]``."""
        hidden: Tensor = self.model.base_model(ids, use_cache=False).last_hidden_state
        return hidden

    def _layout(self, q: Tensor) -> BlockLayout:
        """The blocks that streaming heads read in texts of so many tokens."""
        tokens = q.shape[2]
        if tokens not in self._layouts:
            rule = self.streaming
            number = torch.arange(-(-tokens // rule.block), device=q.device)
            behind = number[:, None] - number  # [M, M]
            keep = (behind >= 0) & ((behind < rule.near_blocks) | (number < rule.sink_blocks))
            layout = BlockLayout.from_mask(keep[None, None], rule.block, rule.block, tokens, tokens)
            self._layouts[tokens] = layout
        return self._layouts[tokens]


def _checked(batch: Batch) -> Batch:
    """A batch of ids and answers of one shape.

    Raises:
        ConfigError: If it is something else.
    """
    if not isinstance(batch, Mapping) or set(batch) != {"input_ids", "answers"}:
        got = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise ConfigError(f"batches: expected mappings with input_ids and answers, got {got}")
    ids = batch["input_ids"]
    answers = batch["answers"]
    if ids.dtype != torch.int64 or ids.dim() != 2:
        raise ConfigError(f"batches: expected input_ids int64 [B, T], got {ids.dtype} {list(ids.shape)}")
    if answers.dtype != torch.bool or answers.shape != ids.shape or not bool(answers.any()):
        raise ConfigError(
            f"batches: expected answers bool {list(ids.shape)} with a row that counts, got {answers.dtype} "
            f"{list(answers.shape)}"
        )
    return batch
