"""Of LoFiT: which rows are scored, what is learned, what a gradient reaches, and how heads are ranked."""

from __future__ import annotations

from functools import partial

from tests.mutants.record import Mutant

TESTS = "tests/attnzoo/heads/training/test_lofit.py"
lofit = partial(Mutant, file="attnzoo/heads/training/lofit.py")

MUTANTS = (
    lofit(
        "lofit-own-row", old=".logits[:, :-1][counts]", new=".logits[:, 1:][counts]", wrong="a label is scored by its own row",
        tests=f"{TESTS} -k foretold",
    ),
    lofit(
        "lofit-scale-of-zero", old="scale = 1.0 if self.scale is None else 1 + self.scale.detach()", new="scale = 1.0 if self.scale is None else self.scale.detach()",
        wrong="what is added to 1 is taken for the scale", tests=f"{TESTS} -k step_moves",
    ),
    lofit(
        "lofit-no-penalty", old="(found + training.penalty * penalty).backward()", new="found.backward()", wrong="scales are drawn to 1 by nothing",
        tests=f"{TESTS} -k ranked",
    ),
    lofit(
        "lofit-weights-learn", old="parameter.requires_grad_(False)", new="pass", wrong="weights get gradients",
        tests=f"{TESTS} -k nothing_but",
    ),
    lofit(
        "lofit-thaws-nothing", old="parameter.requires_grad_(True)", new="pass", wrong="weights stay frozen",
        tests=f"{TESTS} -k nothing_but",
    ),
)  # fmt: skip
