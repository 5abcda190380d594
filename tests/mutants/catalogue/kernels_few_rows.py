"""Of calls of few rows: what they read, and what of it is kept."""

from __future__ import annotations

from functools import partial

from tests.mutants.record import Mutant

FOLDER, TESTS = "kernels/attnzoo_kernels", "tests/attnzoo_kernels"
few_rows = partial(Mutant, file=f"{FOLDER}/cpu/few_rows.py", tests=f"{TESTS}/cpu/test_few_rows.py")
slots = partial(Mutant, file=f"{FOLDER}/cpu/slots.py", tests=f"{TESTS}/cpu/test_few_rows.py")
runs = partial(Mutant, file=f"{FOLDER}/layouts/runs.py", tests=f"{TESTS}/cpu/test_few_rows.py")

MUTANTS = (
    runs(
        "runs-sink-beside-window", old="if first < sink < seen.lo:", new="if first < sink < seen.lo - 1:",
        wrong="a sink that ends just before the window reads on to it",
    ),
    runs(
        "runs-index-beyond-the-end", old="* self.block - seen.hi, 0)", new="* self.block - seen.hi - 1, 0)",
        wrong="a list of many runs reads one slot that is not there yet",
    ),
    runs(
        "runs-of-equal-neighbours-alone", old="        of_head.append(len(found) - 1)", new="        of_head.append(0)",
        wrong="all heads read what the first one does",
    ),
    slots(
        "slots-cut-groups", old="if at % each or stop <= at:", new="if stop <= at:",
        wrong="heads that begin within a group are laid along the rows of two",
    ),
    slots(
        "slots-scale-of-auxiliary-channels", old=".transpose(-1, -2)\n        score = torch.matmul(q_aux.reshape(batch, *rows.shape[1:3], -1), near) * scale",
        new=".transpose(-1, -2)\n        score = torch.matmul(q_aux.reshape(batch, *rows.shape[1:3], -1), near)",
        wrong="auxiliary channels are not scaled",
    ),
    few_rows(
        "few-rows-dead-lse", old="lse = lse.masked_fill(reading.dead, torch.inf)", new="pass",
        wrong="rows that see nothing have weights in the backward",
        tests=f"{TESTS}/cpu/test_few_rows.py -k next_path",
    ),
    few_rows(
        "few-rows-gaps", old="whole[..., slots - first] = seen", new="whole[...] = True",
        wrong="slots between those that are listed are seen", tests=f"{TESTS}/cpu/test_paths.py -k 'few_rows and definition'",
    ),
    few_rows(
        "few-rows-not-finite", old="if reading.hides and not _is_finite(out):", new="if False:",
        wrong="what is hidden spoils results of few rows", tests=f"{TESTS}/cpu/test_few_rows.py",
    ),
)  # fmt: skip
