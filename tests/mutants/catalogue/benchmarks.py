"""Of the commands that measure on a GPU: what a hang may cost, what is told, and which kernels are found again."""

from __future__ import annotations

from functools import partial

from tests.mutants.record import Mutant

FIRST = "tests/bench/test_gpu_first.py -k 'not rehearsed'"
pool = partial(Mutant, file="bench/gpu_first/pool.py", tests=FIRST)
child = partial(Mutant, file="bench/gpu_first/child.py", tests=FIRST)
shared = partial(Mutant, file="bench/gpu_first/run.py", tests=FIRST)

MUTANTS = (
    pool(
        "first-contact-poisoned-worker", old="elif not worker.begun or code != POISONED:", new="elif True:",
        wrong="tests after one that spoils the device are given up",
    ),
    pool(
        "first-contact-worker-for-ever", old="elif not worker.begun or code != POISONED:", new="elif False:",
        wrong="a worker that cannot begin is started again until the time is up",
    ),
    child(
        "first-contact-kills-one", old="        else:\n            self._signal(signal.SIGKILL)", new="        else:",
        wrong="what a process started lives on, and holds the device",
    ),
    child(
        "first-contact-foreign-variables", old='ours = ("TRITON_", "PYTEST_", "ATTNZOO_")', new='ours = ("PYTEST_", "ATTNZOO_")',
        wrong="a variable of the user's makes other kernels than those that were brought along",
    ),
    shared(
        "first-contact-shares", old="names[: names.index(part) + 1]", new="names[: names.index(part)]",
        wrong="the last part has no time, and each the time of the one before",
    ),
    Mutant(
        "first-contact-swallows", file="bench/gpu_first/__main__.py", tests=FIRST,
        old='        outcome.wrong(f"the part itself failed: {outcome.said}")\n', new="",
        wrong="a part that broke off is told as right",
    ),
    Mutant(
        "kernel-cache-old-paths", file="bench/kernel_cache/unpack.py", tests="tests/bench/test_kernel_cache.py -k groups",
        old="str(path.with_name(Path(old).name))", new="old",
        wrong="kernels that were brought along are looked for where they were made",
    ),
    Mutant(
        "gpu-specialised-warps", file="bench/gpu/peers.py", tests="tests/bench/test_gpu_bench.py -k form",
        old='"warps": 4, "stages": 2', new='"warps": 8, "stages": 2',
        wrong="the specialised form has tiles for which the compiler gives all warps one task",
    ),
    Mutant(
        "gpu-graph-of-a-peer", file="bench/gpu/run.py", tests="tests/bench/test_gpu_bench.py -k graph",
        old="            if name == OURS:\n                raise\n            first = (str(error).strip().splitlines() or [\"\"])[0]\n            reasons[f", new="            raise\n            first = (str(error).strip().splitlines() or [\"\"])[0]\n            reasons[f",
        wrong="a peer that a graph cannot hold takes our time with it",
    ),
)  # fmt: skip
