"""Policies as the command line names them: ``duo:keep=0.25,window=192``, or several joined by ``+``.

Letters: L layers, G KV heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from attnzoo import policies, surgery
from attnzoo.cache.policies.protocol import Policy
from attnzoo.cache.policies.protocol import policies as known_policies
from attnzoo.evaluation.model_scores import Progress
from attnzoo.evaluation.two_phase.readers import PolicyReader
from attnzoo.factory import read_options
from attnzoo.heads import HeadScores, score_heads
from attnzoo.reporting.choices import check_choice, check_known
from attnzoo_kernels.errors import ConfigError

CHOOSING = ("keep", "heads", "seed")
"""Options that choose the heads that keep everything: which share, by which scores, and the seed of random ones."""

CHOOSING_NOTES = {
    "keep": "The share of KV heads that keep everything.",
    "heads": 'Which scores choose them: "razor", "induction" or "echo"; "random" chooses by lot.',
    "seed": "Of the lot.",
}
"""What these options mean."""

KEEP = 0.25

BY: Mapping[str, Mapping[str, float] | None] = {
    "razor": None,
    "induction": {"induction": 1.0},
    "echo": {"echo": 1.0},
    "random": {},
}
"""Ways of choosing heads, and which scores choose which share of them; ``None`` leaves it to the policy's default."""


@dataclass(frozen=True)
class PolicyPart:
    """One policy, and its options.

    Attributes:
        policy: Its name.
        options: Its settings, and how its heads are chosen.
    """

    policy: str
    options: dict[str, Any]

    @property
    def made(self) -> type[Policy]:
        """The policy's class."""
        return known_policies[self.policy]

    @property
    def takes_heads(self) -> bool:
        """Whether the policy tells heads apart."""
        return any(field.name == "full" for field in fields(self.made))

    @property
    def chooses(self) -> bool:
        """Whether heads are chosen: where a policy needs to know them, or an option speaks of it."""
        required = self.takes_heads and self.made is not known_policies.get("pages")
        return required or bool(self.options.keys() & set(CHOOSING))

    @property
    def needs_scores(self) -> bool:
        """Whether the heads are chosen by scores."""
        return self.chooses and self.options.get("heads", "razor") != "random"

    def check(self) -> None:
        """Raises unless there are such options, and their values make a policy of some model.

        Raises:
            ConfigError: Naming the option.
        """
        names = [field.name for field in fields(self.made) if field.init and field.name != "full"]
        for name in self.options:
            check_known(name, [*names, *(CHOOSING if self.takes_heads else ())], f"{self.policy} options")
        check_choice("heads", self.options.get("heads", "razor"), BY)
        keep = self.options.get("keep", KEEP)
        if isinstance(keep, bool) or not isinstance(keep, int | float) or not 0 <= keep <= 1:
            raise ConfigError(f"keep: expected a share from 0 to 1, got {keep!r}")
        self.built(torch.zeros(1, 1, dtype=torch.bool, device="cpu"))

    def built(self, full: Tensor | None) -> Policy:
        """The policy with heads ``[L, G]`` that keep everything."""
        settings = {name: value for name, value in self.options.items() if name not in CHOOSING}
        if self.chooses:
            settings["full"] = full
        make: Any = self.made
        made: Policy = make(**settings)
        return made

    def heads(self, layers: int, kv_heads: int, scores: HeadScores | None) -> Tensor | None:
        """The heads that keep everything, bool ``[L, G]``; ``None`` where none are chosen."""
        if not self.chooses:
            return None
        keep = self.options.get("keep", KEEP)
        by = self.options.get("heads", "razor")
        if by == "random":
            return random_heads(layers, kv_heads, keep, self.options.get("seed", 0))
        if scores is None:
            raise ConfigError(f"heads: expected scores of the model's heads for {by!r}, got none")
        return policies.Duo.from_scores(scores, keep, kinds=BY[by]).full


@dataclass(frozen=True)
class PolicySpec:
    """A row of a comparison.

    Attributes:
        name: What the row is called.
        parts: Policies, each of another kind: what is held by place, what is chosen by score, which pages are read.
        control: Whether the row is there to fail.
    """

    name: str
    parts: tuple[PolicyPart, ...]
    control: bool = False

    @classmethod
    def parse(cls, text: str, name: str | None = None, *, control: bool = False) -> PolicySpec:
        """Reads ``policy:option=value,...`` and several such joined by ``+``.

        Args:
            text: Of the policy. Beside its settings, a policy that tells heads apart takes ``keep``, the share of KV
                heads that keep everything, ``heads``, how they are chosen ("razor", "induction", "echo" or "random"),
                and ``seed`` for random ones.
            name: What the row is called; ``None`` takes the text.
            control: Whether the row is there to fail.

        Raises:
            ConfigError: If a policy or an option is unknown, or a value does not fit.

        Example:
            >>> PolicySpec.parse("duo:keep=0.25,window=192").parts[0].options
            {'keep': 0.25, 'window': 192}
        """
        parts = []
        for piece in text.split("+"):
            policy = piece.partition(":")[0]
            if policy == "dense":
                raise ConfigError("policy: expected a policy, got 'dense', which is measured in any case")
            check_known(policy, sorted(offered()), "policies")
            part = PolicyPart(policy, read_options(piece, "policy"))
            part.check()
            parts.append(part)
        return cls(text if name is None else name, tuple(parts), control)

    @property
    def needs_scores(self) -> bool:
        """Whether the model's heads must be scored."""
        return any(part.needs_scores for part in self.parts)

    def policy(self, layers: int, kv_heads: int, scores: HeadScores | None = None) -> Policy:
        """The policy for a model of so many layers and KV heads.

        Args:
            layers: L.
            kv_heads: G.
            scores: Of the model's heads, where some are chosen by them.
        """
        made = [part.built(part.heads(layers, kv_heads, scores)) for part in self.parts]
        found = made[0] if len(made) == 1 else composed(made)
        found.check(layers, kv_heads)
        return found


@dataclass(frozen=True, eq=False)
class PolicyContestant:
    """A policy that fits the model, and what its row is called.

    Attributes:
        name: Of the row.
        policy: What heads remember.
        control: Whether the row is there to fail.
    """

    name: str
    policy: Policy
    control: bool = False

    @contextmanager
    def applied(self, model: Any) -> Iterator[PolicyReader]:
        """The model under the policy, until the end of the block."""
        with policies.applied(model, self.policy) as run:
            yield PolicyReader(run)


def fit(model: Any, specs: Sequence[PolicySpec], progress: Progress | None = None) -> list[PolicyContestant]:
    """Policies that fit a model; its heads are scored once, and only where a policy chooses some by their scores.

    Args:
        model: A causal language model of a family that surgery knows.
        specs: What was asked for.
        progress: Told how far the scoring is.

    Raises:
        ConfigError: If a policy does not fit the model.
    """
    sites = surgery.find(model)
    scores = score_heads(model, progress=progress) if any(spec.needs_scores for spec in specs) else None
    return [
        PolicyContestant(spec.name, spec.policy(len(sites), sites[0].kv_heads, scores), spec.control) for spec in specs
    ]


def random_heads(layers: int, kv_heads: int, keep: float, seed: int) -> Tensor:
    """A share of all KV heads by lot, rounded down, bool ``[L, G]``."""
    count = math.floor(keep * layers * kv_heads + 1e-9)
    order = torch.randperm(layers * kv_heads, generator=torch.Generator().manual_seed(seed), device="cpu")
    full = torch.zeros(layers * kv_heads, dtype=torch.bool, device="cpu")
    full[order[:count]] = True
    return full.view(layers, kv_heads)


def composed(made: list[Policy]) -> Policy:
    """Several policies as one: each says what it says alone.

    Raises:
        ConfigError: If two of them say the same.
    """
    parts: dict[str, Policy] = {}
    for policy in made:
        kind = "read" if policy.reads_pages else "score" if policy.compacts else "static"
        if kind in parts:
            raise ConfigError(f"policy: expected parts of different kinds, got {parts[kind].name}+{policy.name}")
        parts[kind] = policy
    return policies.Compose(**parts)


def offered() -> list[str]:
    """Policies that options describe; trained weights, and parts of a composition, are no option."""
    return [name for name in known_policies if name not in ("compose", "locret")]
