"""Policies of one model side by side: what each holds, and what that costs behind a context."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

from attnzoo.evaluation.model_scores import Progress
from attnzoo.evaluation.two_phase.scores import CaseScore, DenseReader, Reader, TwoPhaseScore, score_case
from attnzoo.evaluation.two_phase.tasks import KEY, RECALL, TEXT, Case

DENSE = "dense"
"""The row of the model as it is."""

HOLDS_ALL = "HOLDS EVERYTHING"
"""Flag of a row whose policy let go of nothing in any of the contexts: its figures say nothing about the policy."""

CONTROL = "negative control"
"""Flag of a row that is there to fail."""


@dataclass(frozen=True)
class PolicyRow:
    """One row's figures.

    Attributes:
        name: What the row is called.
        policy: The policy's own name; "dense" without one.
        settings: As JSON has them; tensors of heads as lists.
        text: NLL of the texts going on, nats per token; ``None`` where nothing of the kind was asked, as below.
        recall: NLL of spans that are repeated word for word.
        key: NLL of passkeys.
        keys_right: Passkeys that greedy decoding says.
        keys_asked: Passkeys asked for.
        held_share: Bytes of the rows held behind the longest contexts, over the dense model's.
        bytes_per_token: The same for each token of a context.
        room_share: Bytes of the buffers that they lie in, over the dense model's.
        read_share: Rows that a decoding step reads over those that the dense model reads.
        flags: What to know about the row.
        cases: What was said behind each context.
        seconds: Measured; differs from run to run.
    """

    name: str
    policy: str
    settings: dict[str, Any]
    text: float | None
    recall: float | None
    key: float | None
    keys_right: int
    keys_asked: int
    held_share: float
    bytes_per_token: float
    room_share: float
    read_share: float
    flags: list[str] = field(default_factory=list)
    cases: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    def figure(self, kind: str) -> float | None:
        """The NLL of a kind of probes."""
        return {TEXT: self.text, RECALL: self.recall, KEY: self.key}[kind]


@dataclass(frozen=True)
class PolicyComparison:
    """Rows, the dense one first, and where they come from."""

    about: dict[str, Any]
    rows: list[PolicyRow]

    @property
    def dense(self) -> PolicyRow:
        """The model as it is."""
        return self.rows[0]

    def above(self, row: PolicyRow, kind: str) -> float | None:
        """Nats that a row's probes cost more than the dense model's."""
        mine, dense = row.figure(kind), self.dense.figure(kind)
        return None if mine is None or dense is None else mine - dense


@runtime_checkable
class Applicable(Protocol):
    """A row to be."""

    @property
    def name(self) -> str:
        """What the row is called."""

    @property
    def control(self) -> bool:
        """Whether it is there to fail."""

    def applied(self, model: Any) -> AbstractContextManager[Reader]:
        """The model under the policy, until the end of the block."""


class PolicyComparer:
    """Runs rows on one model, which is left as it was.

    Args:
        model: A causal language model.
        cases: What is read and asked.
        progress: Told how far it is.
    """

    def __init__(self, model: Any, cases: Sequence[Case], *, progress: Progress | None = None) -> None:
        self.model = model
        self.cases = tuple(cases)
        self.progress = progress

    def run(self, contestants: Sequence[Applicable], about: dict[str, Any]) -> PolicyComparison:
        """The dense model and all rows."""
        return PolicyComparison(self.about(about), list(self.rows(contestants)))

    def about(self, more: dict[str, Any]) -> dict[str, Any]:
        """Where figures come from."""
        read = b"".join(x.numpy().tobytes() for case in self.cases for x in _tokens(case))
        return {
            **more,
            "cases": [case.name for case in self.cases],
            "context": sorted({len(case.context) for case in self.cases}),
            "tokens_sha256": hashlib.sha256(read).hexdigest(),
            "torch": torch.__version__,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        }

    def rows(self, contestants: Sequence[Applicable]) -> Iterator[PolicyRow]:
        """The dense model's row, and then each when it is measured."""
        yield self.dense_row()
        for contestant in contestants:
            yield self.row(contestant)

    def dense_row(self) -> PolicyRow:
        """The row of the model as it is."""
        begin = time.perf_counter()
        return _row(DENSE, DenseReader(self.model), self._scores(DENSE, DenseReader(self.model)), begin)

    def row(self, contestant: Applicable) -> PolicyRow:
        """The row of one policy."""
        begin = time.perf_counter()
        with contestant.applied(self.model) as reader:
            return _row(
                contestant.name, reader, self._scores(contestant.name, reader), begin, control=contestant.control
            )

    def _scores(self, name: str, reader: Reader) -> TwoPhaseScore:
        found: list[CaseScore] = []
        for done, case in enumerate(self.cases):
            if self.progress is not None:
                self.progress(f"{name}: {case.name}", done, len(self.cases))
            found.append(score_case(reader, case))
        return TwoPhaseScore(tuple(found))


def _tokens(case: Case) -> Iterator[torch.Tensor]:
    yield case.context
    for probe in case.probes:
        yield probe.ids


def _row(name: str, reader: Reader, found: TwoPhaseScore, begin: float, *, control: bool = False) -> PolicyRow:
    """The figures of all cases together."""
    right, asked = found.keys
    read_share = found.read_share
    flags = [CONTROL] if control else []
    if reader.policy is not None and found.held_share >= 1 and read_share >= 1:
        flags.append(HOLDS_ALL)
    return PolicyRow(
        name=name,
        policy=DENSE if reader.policy is None else reader.policy.name,
        settings={} if reader.policy is None else reader.policy.settings(),
        text=found.mean(TEXT),
        recall=found.mean(RECALL),
        key=found.mean(KEY),
        keys_right=right,
        keys_asked=asked,
        held_share=found.held_share,
        bytes_per_token=found.bytes_per_token,
        room_share=found.room_share,
        read_share=read_share,
        flags=flags,
        cases=[
            {
                "name": case.name,
                "tokens": case.tokens,
                "nll": case.nll,
                "right": case.right,
                "held_bytes": case.held.rows,
            }
            for case in found.cases
        ],
        seconds=round(time.perf_counter() - begin, 1),
    )
