"""Training for so much CPU time, whatever else the machine does, or for so many steps.

Letters: B batch, L tokens in a window.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from attnzoo_kernels.errors import ConfigError
from bench.trained.texts import Texts

Progress = Callable[[str, int, int], None]

WARM = 0.05
"""The share of a training in which the learning rate rises."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long is trained, and on what.

    Attributes:
        seconds: Of CPU time; ``None`` where steps are counted.
        steps: At most so many; ``None`` where time alone counts.
        rate: The highest learning rate; it rises from 0 and falls to 0 as a cosine.
        batch: B.
        length: L.
        seed: Of the order of windows.

    Raises:
        ConfigError: If neither time nor steps are given, or one of them is not above 0.
    """

    seconds: float | None = None
    steps: int | None = None
    rate: float = 3e-3
    batch: int = 4
    length: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seconds is None and self.steps is None:
            raise ConfigError("seconds: expected a number where steps is None, got None")
        for name in ("seconds", "steps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name}: expected a number above 0, got {value}")

    def done(self, seconds: float, steps: int) -> float:
        """The share that lies behind, from 0 to 1."""
        by_time = 0.0 if self.seconds is None else seconds / self.seconds
        by_steps = 0.0 if self.steps is None else steps / self.steps
        return min(1.0, max(by_time, by_steps))

    def rate_at(self, done: float) -> float:
        """The learning rate where such a share lies behind."""
        if done < WARM:
            return self.rate * (done + WARM / 10) / (WARM * 1.1)
        return self.rate * 0.5 * (1 + math.cos(math.pi * (done - WARM) / (1 - WARM)))


@dataclass(frozen=True)
class Trained:
    """What a training came to.

    Attributes:
        steps: How many.
        seconds: Of CPU time.
        nll: Mean of the last tenth of the steps on the training text, nats per token.
    """

    steps: int
    seconds: float
    nll: float


def train(
    model: Any,
    texts: Texts,
    schedule: Schedule,
    *,
    progress: Progress | None = None,
    name: str = "",
    after: Callable[[int], None] | None = None,
) -> Trained:
    """Trains all weights of a model that want gradients; it is in evaluation mode afterwards.

    Args:
        model: A causal language model.
        texts: What it is trained on.
        schedule: How long.
        progress: Told how far it is, in percent.
        name: What it is told.
        after: Called after each step with the number of steps.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    # Norms and biases do not decay.
    groups = [
        {"params": [p for p in weights if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in weights if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=schedule.rate, betas=(0.9, 0.95))
    model.train()
    losses: list[float] = []
    begin = time.process_time()
    for batch in texts.batches(schedule.length, schedule.batch, schedule.seed):
        done = schedule.done(time.process_time() - begin, len(losses))
        if done >= 1:
            break
        for group in optimiser.param_groups:
            group["lr"] = schedule.rate_at(done)
        loss = next_token_nll(model, batch)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        losses.append(float(loss.detach()))
        if after is not None:
            after(len(losses))
        if progress is not None:
            progress(name, round(100 * done), 100)
    optimiser.zero_grad(set_to_none=True)
    model.eval()
    last = losses[-max(1, len(losses) // 10) :]
    return Trained(len(losses), time.process_time() - begin, sum(last) / len(last))


def next_token_nll(model: Any, tokens: Tensor, **more: Any) -> Tensor:
    """Mean negative log-likelihood of windows ``[B, L]``, all but their first tokens, nats per token."""
    logits = model(input_ids=tokens, use_cache=False, **more).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
