"""Processes that cannot take others with them: a group of their own, output in a file, killed at their limit."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAST_WORDS = 1.5
"""Seconds that a process has to write down where it hung."""

_running: set[Child] = set()


def environment(work: Path, **more: str) -> dict[str, str]:
    """What children see: this checkout first, caches in the work folder, nothing of ours that changes kernels.

    Compiled kernels are found again by such variables too, so nobody's own may be among them.
    """
    ours = ("TRITON_", "PYTEST_", "ATTNZOO_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "TRITON_CACHE_DIR": str(work / "triton"),
        "TRITON_DEFAULT_FP_FUSION": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
        "OMP_NUM_THREADS": "1",
        **more,
    }


class Child:
    """A Python process; what it prints goes to ``log``."""

    def __init__(self, arguments: Sequence[str], log: Path, env: dict[str, str], *, told: bool = False) -> None:
        """Starts it; with ``told`` it waits for a line on its standard input."""
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, *arguments], cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT,
                stdin=subprocess.PIPE if told else subprocess.DEVNULL, process_group=0,
            )  # fmt: skip
        _running.add(self)

    @property
    def code(self) -> int | None:
        """Its exit code, or ``None`` while it runs; what it left behind is killed."""
        code = self._process.poll()
        if code is not None and self in _running:
            self._signal(signal.SIGKILL)
            _running.discard(self)
        return code

    def tell(self, line: str) -> None:
        """Gives it the line that it waits for; one that has died already shows in its exit code."""
        stdin = self._process.stdin
        assert stdin is not None
        try:
            stdin.write(line.encode() + b"\n")
            stdin.close()
        except BrokenPipeError:
            self._process.wait(LAST_WORDS)

    def wait(self, seconds: float) -> int | None:
        """Its exit code, or ``None`` where it did not end in time: then it is dead."""
        end = time.monotonic() + seconds
        while self.code is None:
            if time.monotonic() >= end:
                self.kill()
                return None
            time.sleep(0.02)
        return self.code

    def kill(self) -> None:
        """Ends it and what it started; a process that hangs writes its stack into its log first."""
        if self.code is not None:
            return
        self._process.send_signal(signal.SIGABRT)
        try:
            self._process.wait(LAST_WORDS)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                # A device may not let go of a process: nobody waits for it.
                _running.discard(self)
        else:
            self._signal(signal.SIGKILL)
            _running.discard(self)

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self._process.pid, number)
        except (ProcessLookupError, PermissionError):
            # The whole group has ended.
            return

    def last_words(self) -> str:
        """Where it was when it was killed or crashed, or the last line of its output."""
        text = self.log.read_text(encoding="utf-8", errors="replace").replace(f"{ROOT}/", "")
        _, fatal, stack = text.rpartition("Fatal Python error: ")
        if fatal:
            what = stack.partition("\n")[0]
            # The innermost frame of the thread that was running, else of any.
            frames = stack.partition("Current thread")[2] or stack
            found = re.search(r'File "([^"]+)", line (\d+) in (\S+)', frames)
            return f"{what} in {found[3]}, {found[1]}:{found[2]}" if found else what
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return (lines or ["no message"])[-1][:300]


def no_cores() -> None:
    """No memory images of processes that are killed: those of a GPU take longer than their test."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def end_all() -> None:
    """Kills every child."""
    for child in list(_running):
        child.kill()
