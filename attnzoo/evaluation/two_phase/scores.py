"""Two-phase scores: a context is read, what the policy lets go of is gone, and then the model goes on.

Scoring a text in one forward says nothing about a policy that chooses behind a prompt: every token of it is read while
everything is still held.

Letters: C tokens of a context, T tokens of a continuation, V vocabulary.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from attnzoo.cache.policies.protocol import Policy
from attnzoo.evaluation.decoding import PIECE, Continuation
from attnzoo.evaluation.two_phase.tasks import KEY, Case, Probe
from attnzoo.policies.one_forward import why_one_forward_says_nothing
from attnzoo_kernels.errors import UnsupportedError


@dataclass(frozen=True)
class Held:
    """What a cache takes for one sequence, all layers.

    Attributes:
        rows: Bytes of the rows that are held.
        room: Bytes of the buffers that they lie in.
        dense: Bytes that keys and values of all tokens would take.
        read: Bytes of the rows that a decoding step reads.
    """

    rows: int
    room: int
    dense: int
    read: int

    @property
    def share(self) -> float:
        """Of what the dense model holds."""
        return self.rows / self.dense


@runtime_checkable
class Reader(Protocol):
    """A model that reads under a policy, or under none."""

    @property
    def model(self) -> Any:
        """A causal language model with ``.logits`` and a cache in its output."""

    @property
    def policy(self) -> Policy | None:
        """What its heads remember; ``None`` is everything."""

    def new_cache(self) -> Any:
        """An empty cache; ``None`` leaves it to the model."""

    def compact(self, cache: Any) -> None:
        """Lets go of what the policy does not keep, as the first token that is decoded would."""

    def held(self, cache: Any) -> Held:
        """What a cache takes."""


class DenseReader:
    """The model as it is: the row that all others are beside.

    Args:
        model: A causal language model.
    """

    policy = None

    def __init__(self, model: Any) -> None:
        self.model = model

    def new_cache(self) -> Any:
        """The model makes its own."""

    def compact(self, cache: Any) -> None:
        """Nothing is let go of."""

    def held(self, cache: Any) -> Held:
        """Keys and values of all layers."""
        taken = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
        return Held(taken, taken, taken, taken)


@dataclass(frozen=True)
class CaseScore:
    """What was said behind one context.

    Attributes:
        name: Of the case.
        tokens: C.
        nll: For each kind of probe, the NLL of each, nats per scored token.
        right: Of each passkey: whether greedy decoding says it.
        held: What the cache took when the context had been read.
    """

    name: str
    tokens: int
    nll: dict[str, list[float]]
    right: list[bool]
    held: Held


@dataclass(frozen=True)
class TwoPhaseScore:
    """What was said behind all contexts."""

    cases: tuple[CaseScore, ...] = field(default_factory=tuple)

    def mean(self, kind: str) -> float | None:
        """The mean NLL of all probes of a kind; ``None`` where there is none."""
        found = [value for case in self.cases for value in case.nll.get(kind, [])]
        return statistics.fmean(found) if found else None

    @property
    def keys(self) -> tuple[int, int]:
        """How many passkeys greedy decoding says, and how many there are."""
        right = [one for case in self.cases for one in case.right]
        return sum(right), len(right)

    @property
    def longest(self) -> tuple[CaseScore, ...]:
        """Those behind the longest contexts: what a policy holds of a text depends on the text's length."""
        most = max(case.tokens for case in self.cases)
        return tuple(case for case in self.cases if case.tokens == most)

    @property
    def held_share(self) -> float:
        """Bytes of rows held over the dense model's, behind the longest contexts."""
        return sum(case.held.rows for case in self.longest) / self._dense

    @property
    def room_share(self) -> float:
        """Bytes of buffers, likewise."""
        return sum(case.held.room for case in self.longest) / self._dense

    @property
    def read_share(self) -> float:
        """Bytes that a step reads, likewise."""
        return sum(case.held.read for case in self.longest) / self._dense

    @property
    def bytes_per_token(self) -> float:
        """Bytes of rows held for each token of the longest contexts."""
        return sum(case.held.rows for case in self.longest) / sum(case.tokens for case in self.longest)

    @property
    def _dense(self) -> int:
        return sum(case.held.dense for case in self.longest)


def score_case(reader: Reader, case: Case) -> CaseScore:
    """Reads a context, lets go of what the policy lets go of, and scores each probe behind it.

    Args:
        reader: A model under a policy.
        case: What is read and asked.
    """
    sequence, cache = read_context(reader, case.context)
    held = reader.held(cache)
    nll: dict[str, list[float]] = {}
    right: list[bool] = []
    for probe in case.probes:
        value, exact = score_probe(sequence.copy(), probe, by_step=reads_by_step(reader.policy))
        nll.setdefault(probe.kind, []).append(value)
        if probe.kind == KEY:
            right.append(exact)
    return CaseScore(case.name, len(case.context), nll, right, held)


def score_cases(reader: Reader, cases: Iterable[Case]) -> TwoPhaseScore:
    """All cases, one after the other."""
    return TwoPhaseScore(tuple(score_case(reader, case) for case in cases))


def read_context(reader: Reader, context: Tensor) -> tuple[Continuation, Any]:
    """A sequence behind a context ``[C]`` that has been compacted, and its cache."""
    sequence = Continuation(reader.model, cache=reader.new_cache())
    context = context.to(reader.model.device)
    # A piece of one token would count as decoding, behind which a policy compacts.
    for piece in context.tensor_split(-(-len(context) // PIECE)):
        sequence.read(piece)
    reader.compact(sequence.cache)
    return sequence, sequence.cache


def reads_by_step(policy: Policy | None) -> bool:
    """Whether a continuation must be read token by token: where decoding rows choose pages, or compact again."""
    return policy is not None and (policy.reads_pages or policy.every is not None)


def score_probe(sequence: Continuation, probe: Probe, *, by_step: bool = False) -> tuple[float, bool]:
    """The NLL of a probe in nats per scored token, and whether each of these tokens is the likeliest one.

    Args:
        sequence: Behind the context; it goes on.
        probe: The continuation, whose tokens are given whatever the model says.
        by_step: Whether they are read one at a time, as in decoding.
    """
    ids = probe.ids.to(sequence.model.device)
    scored = probe.scored.to(ids.device)
    parts: Sequence[Tensor] = ids[:-1].split(1) if by_step else (ids[:-1],)
    said = torch.cat([sequence.read_all(part) for part in parts])  # [T - 1, V]
    logits = said[scored - 1]
    expected = ids[scored]
    return float(cross_entropy(logits, expected)), bool((logits.argmax(-1) == expected).all())


def prefill_nll(reader: Reader, ids: Tensor) -> float:
    """The NLL of a text ``[C]`` that is read at once, all but its first token.

    It says something of a policy that holds by place alone: there a prompt is read as it will be held, from the first
    token on.

    Raises:
        UnsupportedError: If the policy chooses by what it holds.
    """
    if (reason := why_one_forward_says_nothing(reader.policy)) is not None:
        raise UnsupportedError(f"prefill_nll: {reason}")
    said = Continuation(reader.model, cache=reader.new_cache()).read_all(ids)
    return float(cross_entropy(said[:-1], ids[1:]))
