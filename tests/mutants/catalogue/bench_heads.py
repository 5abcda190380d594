"""Of experiments on heads: what is a control, which row is the answer's, and what is learned."""

from __future__ import annotations

from functools import partial

from tests.mutants.record import Mutant

TESTS = "tests/bench/test_heads.py"
facts = partial(Mutant, file="bench/heads/facts.py")

MUTANTS = (
    Mutant(
        "bench-heads-among-them", file="bench/heads/setting.py", old="if (layer, head) not in kept", new="if True", wrong="controls may be what they are beside",
        tests=f"{TESTS} -k random_heads",
    ),
    facts(
        "bench-heads-behind-padding", old="hidden[rows, mask.sum(1) - 1]", new="hidden[rows, -1]", wrong="answers are read behind padding",
        tests=f"{TESTS} -k padded_rows",
    ),
    Mutant(
        "bench-heads-learn-prompts", file="bench/heads/experiments/format_task.py", old="torch.full_like(prompt, lofit.IGNORED)", new="prompt",
        wrong="prompts are learned too", tests=f"{TESTS} -k answers_alone",
    ),
    Mutant(
        "bench-heads-same-answer", file="bench/heads/experiments/copying.py", old="other[cue + 1]", new="first[again]", wrong="both texts have one answer",
        tests=f"{TESTS} -k another_order",
    ),
)  # fmt: skip
