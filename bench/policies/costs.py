"""What a policy costs a process: memory behind a long text, and a decoding step beside the dense model's.

Each row is a process of its own, which reads the text under the policy, says what memory it took, and only then loads
the dense model's caches, which a first process has left in files, and decodes in turns with it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from attnzoo.cache.policies.protocol import Policy
from bench.policies.setting import Setting


@dataclass(frozen=True)
class StepCost:
    """A decoding step of the whole model on one thread, in CPU time.

    Attributes:
        tokens: Behind so many.
        ms: Milliseconds, the median.
        dense_ms: Of the dense model with transformers' DynamicCache in the same rounds.
        ratio: The median ratio of a round.
        attention: The same without what a step behind one token takes: of attention and cache alone.
    """

    tokens: int
    ms: float
    dense_ms: float
    ratio: float
    attention: float


@dataclass(frozen=True)
class Cost:
    """What one process took.

    Attributes:
        name: Of the row.
        tokens: It has read so many when memory is measured.
        peak_bytes: The most memory that was resident up to then.
        resident_bytes: What was resident then.
        start_bytes: What was resident before it read anything.
        held_bytes: Of the rows held.
        dense_bytes: Of the rows that the dense model holds.
        pool_bytes: Of the buffers.
        read_bytes: Of the rows that a step reads.
        steps: Behind each length.
    """

    name: str
    tokens: int
    peak_bytes: int
    resident_bytes: int
    start_bytes: int
    held_bytes: int
    dense_bytes: int
    pool_bytes: int
    read_bytes: int
    steps: list[StepCost]


def cost_from(data: Mapping[str, Any]) -> Cost:
    """What ``asdict`` gave."""
    return Cost(**{**data, "steps": [StepCost(**step) for step in data["steps"]]})


def run(name: str, policy: Policy | None, setting: Setting, folder: Path, rounds: int) -> Cost:
    """Measures one row in a process of its own; the dense one first, which leaves its caches in ``folder``."""
    order = {
        "name": name,
        "policy": None if policy is None else policy.settings(),
        "quick": setting.quick,
        "lengths": list(setting.lengths),
        "folder": str(folder),
        "rounds": rounds,
    }
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "order.json"
        file.write_text(json.dumps(order), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "bench.policies.worker", str(file)], capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'no reason'}")
    return cost_from(json.loads(done.stdout))


def as_data(costs: Sequence[Cost]) -> list[dict[str, Any]]:
    """As JSON has them."""
    return [asdict(cost) for cost in costs]
