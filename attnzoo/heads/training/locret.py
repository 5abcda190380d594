r"""Training retaining heads: each row's score becomes the largest logit that an answer's queries give its key.

With A the queries of the answer's tokens, and h the query heads of a KV head's group, the label of row t is

.. math:: y_t = \max_{a \in A,\ h} \sigma q_{a,h} \cdot k_t

before softmax, and a layer's head is trained on

.. math:: \frac{1}{n} \sum_t \mathrm{SmoothL1}(s_t, y_t) + \frac{\alpha}{n - 1} \sum_t (s_t - s_{t+1})^2 .

The model itself is not trained, and each layer's head alone: what its tokens are and their labels is captured once.

Source: Huang et al. 2024, *Locret*, section 3.2 (arXiv:2410.01805): :math:`\alpha = .0025`, AdamW with a rate of
.0005 and betas of .9 and .95, 3,000 steps of one case, a tenth of them rising and the rest falling.

Letters: B batch, H query heads, G KV heads, T tokens of a prompt, A those of an answer, D key width, Dv value width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss, smooth_l1_loss

from attnzoo.cache.policies.locret import RetainingHead
from attnzoo.surgery.capture import watched
from attnzoo.surgery.hosts.calls import AttentionCall
from attnzoo.surgery.hosts.site import Site
from attnzoo_kernels.errors import ConfigError, ShapeError

SMOOTHNESS = 0.0025


@dataclass(frozen=True, eq=False)
class RetainingCase:
    """What one layer's head learns from one prompt and its answer.

    Attributes:
        q: The prompt's queries ``[B, H, T, D]``, before rotation like the keys.
        k: Its keys ``[B, G, T, D]``.
        v: Its values ``[B, G, T, Dv]``.
        labels: ``[B, G, T]``, of :func:`answer_labels`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    labels: Tensor

    @property
    def width(self) -> int:
        """Numbers that a retaining head is shown for a token."""
        return sum(x.shape[1] * x.shape[3] for x in (self.q, self.k, self.v))


@dataclass(frozen=True, kw_only=True)
class RetainingTraining:
    """How heads are trained.

    Attributes:
        hidden: Width between a head's two products.
        steps: Steps, of one case each, in turn.
        lr: The largest rate.
        smoothness: Weight of the squares of differences between neighbours' scores.
        seed: Of the weights that a head begins with.

    Raises:
        ConfigError: If a number is out of its range.
    """

    hidden: int = 1024
    steps: int = 3000
    lr: float = 5e-4
    smoothness: float = SMOOTHNESS
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("hidden", 1), ("steps", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: expected {least} or more, got {getattr(self, name)!r}")
        if not self.lr > 0:
            raise ConfigError(f"lr: expected more than 0, got {self.lr!r}")
        if not self.smoothness >= 0:
            raise ConfigError(f"smoothness: expected 0 or more, got {self.smoothness!r}")

    def rate(self, step: int) -> float:
        """The share of the largest rate at a step: up over the first tenth, then down to nothing."""
        rising = max(1, self.steps // 10)
        if step < rising:
            return (step + 1) / rising
        return (self.steps - step) / max(1, self.steps - rising)


def answer_labels(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """The largest logit that an answer's queries give each row of its prompt.

    Args:
        q: The answer's rotated queries ``[B, H, A, D]``.
        k: The prompt's rotated keys ``[B, G, T, D]``.
        scale: The factor on scores. ``None`` means ``D ** -0.5``.

    Returns:
        ``[B, G, T]``, in float32 or more.

    Raises:
        ShapeError: If there is no answer, or shapes do not fit.
    """
    if q.shape[2] == 0 or q.shape[1] % k.shape[1] or q.shape[3] != k.shape[3]:
        raise ShapeError(f"q: expected queries of keys {list(k.shape)}, one or more, got {list(q.shape)}")
    factor = q.shape[3] ** -0.5 if scale is None else scale
    dtype = torch.promote_types(q.dtype, torch.float32)
    # The group's heads along the rows.
    rows = q.detach().to(dtype).unflatten(1, (k.shape[1], -1)).flatten(2, 3) * factor
    logits: Tensor = rows @ k.detach().to(dtype).mT  # [B, G, g * A, T]
    return logits.amax(2)


def retaining_loss(scores: Tensor, labels: Tensor, smoothness: float = SMOOTHNESS) -> Tensor:
    """How far scores ``[B, G, T]`` are from labels and from their neighbours."""
    loss = smooth_l1_loss(scores, labels.to(scores.dtype))
    if scores.shape[2] < 2:
        return loss
    return loss + smoothness * mse_loss(scores[..., 1:], scores[..., :-1])


def train_retaining_head(cases: Sequence[RetainingCase], training: RetainingTraining | None = None) -> RetainingHead:
    """A head of one layer, trained on cases in turn.

    Args:
        cases: What the layer's tokens are, and their labels.
        training: How.

    Raises:
        ConfigError: If there is no case.
    """
    if not cases:
        raise ConfigError("cases: expected one or more, got none")
    training = training or RetainingTraining()
    first = cases[0]
    device = first.q.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        head = RetainingHead(first.width, first.k.shape[1], training.hidden)
    head.to(device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=training.lr, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, training.rate)
    with torch.enable_grad():
        for step in range(training.steps):
            case = cases[step % len(cases)]
            loss = retaining_loss(head(case.q, case.k, case.v), case.labels, training.smoothness)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return head.requires_grad_(False)


def retaining_cases(model: Any, ids: Tensor, answer: int) -> list[RetainingCase]:
    """What a model's layers are shown by one call, a case for each attention layer.

    Args:
        model: A model of a known family of transformers.
        ids: Prompts and their answers ``[B, T + A]``, without padding.
        answer: Where the answers begin, T.

    Raises:
        ConfigError: If the model has no attention block that is known.
        ShapeError: If nothing is left for a prompt or an answer.
    """
    if ids.dim() != 2 or not 0 < answer < ids.shape[1]:
        raise ShapeError(f"answer: expected a place inside ids, got {answer} in {list(ids.shape)}")
    cases: list[RetainingCase] = []

    def see(site: Site, call: AttentionCall) -> None:
        if call.unrotated is None:
            raise AssertionError("queries and keys before rotation were asked for")
        labels = answer_labels(call.q[:, :, answer:], call.k[:, :, :answer], call.scale)
        q, k, v = (x[:, :, :answer].detach().float() for x in (*call.unrotated, call.v))
        cases.append(RetainingCase(q, k, v, labels))

    with torch.no_grad(), watched(model, see, unrotated=True):
        model(ids, use_cache=False)
    return cases


def retaining_heads(
    model: Any, prompts: Iterable[tuple[Tensor, int]], training: RetainingTraining | None = None
) -> list[RetainingHead]:
    """A trained head for each of a model's attention layers: what :class:`attnzoo.policies.Locret` takes.

    Args:
        model: A model of a known family of transformers; it is not changed.
        prompts: Ids ``[B, T + A]``, and where the answers in them begin.
        training: How heads are trained.

    Raises:
        ConfigError: If there is no prompt.
    """
    by_prompt = [retaining_cases(model, ids, answer) for ids, answer in prompts]
    if not by_prompt:
        raise ConfigError("prompts: expected one or more, got none")
    return [train_retaining_head(cases, training) for cases in zip(*by_prompt, strict=True)]
