"""A first contact with a GPU that wastes nothing: ``python -m bench.gpu_first``; needs torch, triton and pytest.

The doctor's self-test, the GPU's tests on all cores, the cells of ``bench.gpu`` that matter most, tiles, and last the
form of the forward loop that may hang. Each part has its share of the clock, each item a process or a limit of its own;
after every part all that is known lies in one archive. Exit code 0: all parts ran and were right.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.gpu.contact import PLANTED
from bench.gpu_first import cells, parts
from bench.gpu_first.child import end_all, no_cores
from bench.gpu_first.results import Results, table, verdict
from bench.gpu_first.run import SHARES, WHOLE, Clock, Outcome, Run, cores
from bench.kernel_cache import unpack

PARTS: dict[str, Callable[[Run, Outcome], None]] = {
    "machine": parts.machine,
    "self-test": parts.self_test,
    "tests": parts.tests,
    "cells": cells.cells,
    "tiles": cells.tiles,
    "specialised": cells.specialised,
}
IMPLEMENTATIONS = ("reference", "blocked", "triton")
PLANTS = {
    "tests": ("planted_failure: failed", "planted_hang: hung", "planted_crash: crashed"),
    "cells": ("planted crash: crashed",),
    "specialised": ("planted hang: hung", "planted hang: not run: given up"),
}
"""What a rehearsal must find, and nothing else."""


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_first", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/gpu-first"), help="folder of the archive, page and data")
    parser.add_argument("--name", default="gpu-first", help="what the files are called")
    parser.add_argument("--seconds", type=float, default=WHOLE, help="in all; the parts' shares follow")
    parser.add_argument("--impl", default=",".join(IMPLEMENTATIONS), help="implementations, with commas between")
    parser.add_argument("--cores", type=int, default=cores(), help="processes at a time")
    parser.add_argument("--kernels", type=Path, help="an archive of compiled kernels, of make gpu-first-kernels")
    parser.add_argument("--rehearse", action="store_true", help="in the interpreter, at toy sizes, with planted faults")
    found = parser.parse_args(given)
    found.impl = tuple(name for name in found.impl.replace(",", " ").split())
    if unknown := set(found.impl) - set(IMPLEMENTATIONS):
        parser.error(f"--impl: expected some of {', '.join(IMPLEMENTATIONS)}, got {', '.join(sorted(unknown))}")
    if found.seconds <= 0 or found.cores < 1:
        parser.error("--seconds and --cores: expected more than 0")
    return found


@contextmanager
def _ended_politely() -> Iterator[None]:
    """A signal to end raises, so that what there is gets packed; whatever happens, no child stays."""

    def stop(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        end_all()


def _run_part(run: Run, part: str) -> Outcome:
    outcome = Outcome(part, allowed=run.clock.left_for(part))
    run.outcomes.append(outcome)
    run.say(f"{part}: {outcome.allowed:.0f} s")
    begin = time.monotonic()
    try:
        PARTS[part](run, outcome)
    except Exception as error:  # one part's own mistake must not cost the others their time
        outcome.said = f"{type(error).__name__}: {error}"
        outcome.wrong(f"the part itself failed: {outcome.said}")
    except BaseException:
        outcome.wrong("cut off")
        raise
    finally:
        outcome.seconds = time.monotonic() - begin
        run.keep()
    run.say(f"{part}: {outcome.said} ({outcome.seconds:.0f} s)")
    return outcome


def is_as_planted(run: Run) -> bool:
    """Whether a rehearsal found what was planted, and nothing else."""
    for outcome in run.outcomes:
        wanted = PLANTS.get(outcome.part, ())
        if len(outcome.reasons) != len(wanted) or not all(PLANTED in reason for reason in outcome.reasons):
            return False
        if not all(any(text in reason for reason in outcome.reasons) for text in wanted):
            return False
    return len(run.outcomes) == len(SHARES)


def main(given: list[str] | None = None) -> int:
    """Runs the command line; 1 where something is wrong or was not done."""
    options = arguments(given)
    no_cores()
    results = Results(options.out.resolve(), options.name)
    with tempfile.TemporaryDirectory(prefix="gpu-first-", ignore_cleanup_errors=True) as folder, _ended_politely():
        work = Path(folder)
        run = Run(work, Clock(options.seconds), options.rehearse, options.impl, options.cores)

        def keep() -> None:
            results.keep(run)

        run.keep = keep
        if options.kernels is not None:
            run.kernels = unpack.unpack(options.kernels, work / "triton")
        for part in SHARES:
            _run_part(run, part)
            if run.blind:
                break
        written = results.keep(run, cells.draw(run))
        for outcome in run.outcomes:
            for reason in outcome.reasons:
                print(f"- {outcome.part}: {reason}")
        print("\n".join(["", *table(run), ""]))
        print(f"{verdict(run)}; written: {', '.join(str(path) for path in written)}")
        if options.rehearse:
            return int(not is_as_planted(run))
        return int(any(outcome.reasons for outcome in run.outcomes))


if __name__ == "__main__":
    sys.exit(main())
