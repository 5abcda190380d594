"""Hands mutants to workers, each of which has a copy of the repository, and says what became of them."""

from __future__ import annotations

import compileall
import json
import os
import py_compile
import queue
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

from tests.mutants.record import Mutant, NeedsNewPlaceError
from tests.mutants.verdicts import Verdict

ROOT = Path(__file__).resolve().parents[2]
PARTS = (
    "attnzoo", "kernels", "tests", "bench", "docs", "examples", "scripts",
    "pyproject.toml", "README.md", "CHANGELOG.md",
)  # fmt: skip
"""What tests may look at."""

WARM = (
    "torch", "torch._dynamo", "torch.distributed.tensor", "torch.nn.attention.flex_attention",
    "torch.utils.flop_counter", "numpy", "einops", "pytest", "hypothesis", "transformers",
    "transformers.models.llama.modeling_llama", "transformers.models.qwen2.modeling_qwen2", "safetensors.torch",
    "typer.testing", "rich.progress", "triton.language",
)  # fmt: skip
"""What is imported before the fork: nothing of ours, and nothing that starts threads."""

FLAGS = ("-x", "-q", "-p", "no:cacheprovider", "-m", "not slow and not gpu")
PASSED, FAILED, INTERRUPTED, USAGE = 0, 1, 2, 4
"""Exit codes of pytest; the last two say that something could not be imported."""

LEAST_SECONDS = 30.0
"""A mutant may take so long, and four times what its tests take on the code as it is."""

LONGEST_CLEAN = 300.0
"""Seconds that tests may take on the code as it is."""


class Worker:
    """A warm process in a copy of the repository."""

    def __init__(self, root: Path, where: Path, parts: Sequence[str], warm: Sequence[str]) -> None:
        self.where, self.log = where / "copy", where / "log"
        copy(root, self.where, parts)
        environment = {
            **os.environ,
            "PYTHONPATH": f"{self.where}{os.pathsep}{self.where / 'kernels'}",
            "PYTHONHASHSEED": "0",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "TRITON_INTERPRET": os.environ.get("TRITON_INTERPRET", "1"),
        }
        script = Path(__file__).with_name("worker.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script), *warm],
            cwd=self.where, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()

    def run(self, tests: str, timeout: float, *, keep: bool) -> dict[str, Any]:
        """Runs pytest in a child: ``{code, seconds, timed_out}``."""
        job = {"tests": [*FLAGS, *shlex.split(tests)], "timeout": timeout, "log": str(self.log), "keep": keep}
        sent, answers = self._process.stdin, self._process.stdout
        if sent is None or answers is None:
            raise RuntimeError("worker: it has no pipes")
        sent.write(json.dumps(job) + "\n")
        sent.flush()
        answer = answers.readline()
        if not answer:
            raise RuntimeError(f"worker: it ended with exit code {self._process.wait()}")
        found: dict[str, Any] = json.loads(answer)
        return found

    def tail(self, lines: int = 12) -> str:
        """The end of what the last child printed."""
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def copy(root: Path, where: Path, parts: Sequence[str]) -> None:
    """Copies what is there of ``parts``, and compiles it so that what changes is compiled anew by its content."""
    where.mkdir(parents=True)
    for part in parts:
        source = root / part
        if source.is_dir():
            shutil.copytree(source, where / part, ignore=shutil.ignore_patterns("__pycache__", "_build"))
        elif source.is_file():
            shutil.copy2(source, where / part)
    # By content and not by date: a mutant of the same length may be written within the clock's grain.
    compileall.compile_dir(where, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)


@contextmanager
def applied(mutant: Mutant, where: Path) -> Iterator[None]:
    """The mutant in a copy, for a while."""
    path = where / mutant.file
    text = path.read_text(encoding="utf-8")
    path.write_text(mutant.applied_to(where), encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(text, encoding="utf-8")


def judge(mutant: Mutant, worker: Worker, clean_seconds: float) -> Verdict:
    """What becomes of a mutant whose tests pass on the code as it is."""
    try:
        with applied(mutant, worker.where):
            found = worker.run(mutant.tests, LEAST_SECONDS + 4 * clean_seconds, keep=False)
    except NeedsNewPlaceError as error:
        return Verdict(mutant, "error", str(error), 0.0)
    code, seconds = found["code"], found["seconds"]
    if found["timed_out"]:
        return Verdict(mutant, "timed out", "", seconds)
    if code == PASSED:
        return Verdict(mutant, "survived", "", seconds)
    if code == FAILED or code < 0:
        return Verdict(mutant, "killed", "" if code == FAILED else f"by signal {-code}", seconds)
    if code in (INTERRUPTED, USAGE) and mutant.at_import:
        return Verdict(mutant, "killed", "at import", seconds)
    reason = "it cannot be imported" if code in (INTERRUPTED, USAGE) else f"pytest ended with exit code {code}"
    return Verdict(mutant, "error", f"{reason}:\n{worker.tail()}", seconds)


def judge_group(tests: str, mutants: Sequence[Mutant], worker: Worker) -> Iterator[Verdict]:
    """What becomes of mutants that the same tests should notice; these first have to pass on the code as it is."""
    clean = worker.run(tests, LONGEST_CLEAN, keep=True)
    if clean["code"] != PASSED:
        reason = f"{tests}: exit code {clean['code']} on the code as it is:\n{worker.tail()}"
        yield from (Verdict(mutant, "undecided", reason, clean["seconds"]) for mutant in mutants)
        return
    for mutant in mutants:
        yield judge(mutant, worker, clean["seconds"])


def run(
    mutants: Sequence[Mutant],
    *,
    root: Path = ROOT,
    parts: Sequence[str] = PARTS,
    warm: Sequence[str] = WARM,
    jobs: int = 2,
    tell: Callable[[Verdict, int, int], None] = lambda verdict, done, total: None,
) -> list[Verdict]:
    """Judges mutants, in the order in which they were given.

    Args:
        mutants: The mutants.
        root: The repository.
        parts: What is copied of it.
        warm: What workers import beforehand.
        jobs: Workers at once.
        tell: Called for each verdict with how many there are and will be.
    """
    groups: dict[str, list[Mutant]] = {}
    for mutant in mutants:
        groups.setdefault(mutant.tests, []).append(mutant)
    # The largest first, so that no worker is left alone with it at the end.
    waiting: queue.SimpleQueue[tuple[str, list[Mutant]]] = queue.SimpleQueue()
    for group in sorted(groups.items(), key=lambda item: -len(item[1])):
        waiting.put(group)
    found: dict[str, Verdict] = {}
    one_at_a_time = threading.Lock()

    def work(place: Path) -> None:
        with Worker(root, place, parts, warm) as worker:
            while not waiting.empty():
                try:
                    tests, group = waiting.get_nowait()
                except queue.Empty:
                    return
                for verdict in judge_group(tests, group, worker):
                    with one_at_a_time:
                        found[verdict.mutant.name] = verdict
                        tell(verdict, len(found), len(mutants))

    with TemporaryDirectory(prefix="attnzoo-mutants-") as folder, ThreadPoolExecutor(jobs) as pool:
        places = [Path(folder) / str(number) for number in range(min(jobs, len(groups)))]
        for future in as_completed([pool.submit(work, place) for place in places]):
            future.result()
    return [found[mutant.name] for mutant in mutants]
