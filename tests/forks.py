"""Modules run as commands by a process that knows torch and nothing of ours: each starts in a fork of its own.

What takes long about a short command is importing torch, which all of them do.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.child import ROOT, environment

THEIRS = ("torch", "torch.export", "typer", "rich.table")
"""What is imported once, none of it ours."""

SERVE = """
import atexit, gc, importlib, json, os, runpy, sys
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
assert not [name for name in sys.modules if name.partition(".")[0] in ("attnzoo", "attnzoo_kernels", "bench", "tests")]
# What is there before a fork is not looked at again by children, who would copy it.
gc.collect()
gc.freeze()
for line in sys.stdin:
    words, outs = json.loads(line)
    child = os.fork()
    if not child:
        for number, path in zip((0, 1, 2), (os.devnull, *outs)):
            os.dup2(os.open(path, os.O_RDWR), number)
        sys.argv = words
        code = 0
        try:
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code or 0
            if isinstance(code, str):
                sys.exit(code)
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        # Taking torch apart would be most of what is left to do.
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Forks:
    """Runs modules as commands, one after the other.

    Args:
        process: Of :data:`SERVE`.
        folder: Where output goes.
    """

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process = process
        self._outs = [folder / name for name in ("stdout", "stderr")]

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """What ``python -m`` gives for these words."""
        for path in self._outs:
            path.write_text("", encoding="utf-8")
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([words, [str(path) for path in self._outs]]) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        return subprocess.CompletedProcess(words, code, *(path.read_text(encoding="utf-8") for path in self._outs))


@contextmanager
def forks(folder: Path, **more: str) -> Iterator[Forks]:
    """A process to fork from, with more variables in its environment."""
    command = [sys.executable, "-c", SERVE, json.dumps(THEIRS)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment(**more), cwd=ROOT, text=True, **pipes) as process:  # type: ignore[call-overload]
        try:
            yield Forks(process, folder)
        finally:
            process.stdin.close()
