"""What the parts share: the clock, what was asked for, what was found so far, and the line that says so."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.gpu_first.child import ROOT, Child, environment

SHARES = {"machine": 20.0, "self-test": 60.0, "tests": 180.0, "cells": 105.0, "tiles": 60.0, "specialised": 45.0}
"""Seconds of each part, in order. The form of the forward loop that may hang comes last."""
SPARE = 30.0
"""Seconds for charts and for the archive."""
WHOLE = sum(SHARES.values()) + SPARE


class Clock:
    """Counts down from a number of seconds; shares and limits grow and shrink with it."""

    def __init__(self, seconds: float = WHOLE) -> None:
        self.seconds = seconds
        self._began = time.monotonic()

    @property
    def spent(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._began

    @property
    def left(self) -> float:
        """Seconds to the end."""
        return self.seconds - self.spent

    def scaled(self, seconds: float) -> float:
        """A limit that belongs to the whole time, in proportion to the time there is."""
        return seconds * self.seconds / WHOLE

    def left_for(self, part: str) -> float:
        """Seconds until a part must have ended: all shares up to its own, less what is spent."""
        names = list(SHARES)
        due = sum(SHARES[name] for name in names[: names.index(part) + 1])
        return max(0.0, self.scaled(due) - self.spent)


@dataclass
class Outcome:
    """What a part found.

    Attributes:
        part: Its name.
        said: In a line.
        reasons: What is wrong, or why something was not done.
        data: For the archive.
        seconds: How long it took.
        allowed: How long it might take.
    """

    part: str
    said: str = ""
    reasons: list[str] = field(default_factory=list)
    data: Any = None
    seconds: float = 0.0
    allowed: float = 0.0

    def wrong(self, reason: str) -> None:
        """Adds a reason; paths of this checkout are shortened."""
        self.reasons.append(reason.replace(f"{ROOT}/", ""))


@dataclass
class Run:
    """One first contact.

    Attributes:
        work: The folder in which everything lies before it is packed.
        clock: The clock.
        rehearse: Whether the interpreter stands in for the device, and faults are planted.
        impls: Implementations that are tried.
        cores: Processes at a time.
        kernels: A folder of compiled kernels that were brought along, or ``None``.
        keep: Packs what there is.
        outcomes: Of the parts so far.
        facts: Of the machine.
        blind: Whether there is no device to try anything on.
    """

    work: Path
    clock: Clock
    rehearse: bool
    impls: tuple[str, ...]
    cores: int
    kernels: Path | None = None
    keep: Callable[[], None] = lambda: None
    outcomes: list[Outcome] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    blind: bool = False

    @property
    def device(self) -> str:
        """As torch names it."""
        return "cpu" if self.rehearse else "cuda"

    def env(self, **more: str) -> dict[str, str]:
        """The environment of children."""
        mode = {"TRITON_INTERPRET": "1", "ATTNZOO_TEST_DEVICE": "cpu"} if self.rehearse else {}
        return environment(self.work, **{**mode, **more})

    def start(self, module: str, *arguments: str, log: Path, told: bool = False, **more: str) -> Child:
        """Starts a module of ours."""
        return Child(["-m", module, *arguments], log, self.env(**more), told=told)

    def say(self, line: str) -> None:
        """One line on the terminal, with the seconds that are left."""
        print(f"[{max(0.0, self.clock.left):4.0f} s left] {line}", flush=True)

    @property
    def triton(self) -> bool:
        """Whether the Triton kernels are asked for."""
        return "triton" in self.impls


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
