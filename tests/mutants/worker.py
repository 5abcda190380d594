"""Runs pytest again and again, each time in a child of a process that has imported what is slow to import.

A script of its own, run in a copy of the repository and never imported: nothing of ours may be loaded before the fork,
or children would run the code as it was. Its arguments are the modules to import. Reads one JSON object a line,
``{tests, timeout, log, keep}``, and answers each with ``{code, seconds, timed_out}``.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

OURS = ("attnzoo", "attnzoo_kernels", "tests")
FOREIGN = 97
"""Exit code of a child that ran code from outside the copy: it decides nothing."""


def warm(names: list[str]) -> None:
    """Imports what is slow; what is not installed is not needed."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            print(f"not imported beforehand: {name} ({error})", file=sys.stderr)
    gc.collect()
    gc.freeze()


def is_foreign(root: Path) -> bool:
    """Whether a module of ours came from elsewhere than ``root``."""
    for name, module in list(sys.modules.items()):
        where = getattr(module, "__file__", None)
        if name.partition(".")[0] in OURS and where and not Path(where).resolve().is_relative_to(root):
            print(f"{name} came from {where}", flush=True)
            return True
    return False


def child(job: dict[str, Any], root: Path) -> None:
    """Runs pytest and ends the process with its exit code."""
    os.setsid()
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    # Compiled test files of the first, unchanged run serve the others; a mutant leaves nothing behind.
    sys.dont_write_bytecode = not job["keep"]
    code = FOREIGN
    try:
        import pytest

        code = int(pytest.main(job["tests"]))
        if is_foreign(root):
            code = FOREIGN
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(job: dict[str, Any], root: Path) -> dict[str, Any]:
    """Forks a child and waits for it, no longer than ``job["timeout"]`` seconds."""
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        child(job, root)
    timed_out = False
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if not timed_out and time.monotonic() - began > job["timeout"]:
            timed_out = True
            end_group(pid)
        time.sleep(0.02)
    # What the child started and left behind.
    end_group(pid)
    return {
        "code": os.waitstatus_to_exitcode(status),
        "seconds": round(time.monotonic() - began, 2),
        "timed_out": timed_out,
    }


def end_group(pid: int) -> None:
    """Ends a child and what it started."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def main() -> None:
    """Answers jobs until there are no more."""
    # The folder of this script is first on the path, and holds modules of ours.
    sys.path.pop(0)
    root = Path.cwd().resolve()
    warm(sys.argv[1:])
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line), root)), flush=True)


if __name__ == "__main__":
    main()
