"""The command that trains small models and converts them."""

from __future__ import annotations

from tests.mutants.record import Mutant

TESTS = "tests/bench/test_trained.py"

MUTANTS = (
    Mutant(
        "trained-on-held-out", file="bench/trained/texts.py",
        old="Texts(torch.cat([x[:-HELD_OUT] for x in whole])", new="Texts(torch.cat(whole)",
        wrong="models are trained on what they are scored on", tests=f"{TESTS} -k no_training_sees",
    ),
    Mutant(
        "trained-control-wastes", file="bench/trained/conversions.py",
        old="chance.masked_fill_(place > place[:, None], -1.0)", new="pass",
        wrong="a control draws later tokens too, and reads fewer", tests=f"{TESTS} -k itself_the_first",
    ),
    Mutant(
        "trained-control-of-shards", file="bench/trained/conversions.py",
        old="far = (own - 2).clamp(min=0)", new="far = own",
        wrong="a control reads more than what it stands beside", tests=f"{TESTS} -k on_average",
    ),
    Mutant(
        "trained-figures-anyway", file="bench/trained/measure.py",
        old="and row.problem is None and not row.holds:", new="and False:",
        wrong="figures are given of a conversion whose certificate fails", tests=f"{TESTS} -k certificate_fails",
    ),
    Mutant(
        "trained-one-after-the-other", file="bench/trained/healing.py",
        old="model = deepcopy(self.model)", new="model = self.model",
        wrong="each conversion begins where the training of the last one ended", tests=f"{TESTS} -k one_model",
    ),
    Mutant(
        "trained-both-ends", file="bench/trained/training.py",
        old="min(1.0, max(by_time, by_steps))", new="min(1.0, min(by_time, by_steps))",
        wrong="a training ends when time and steps are spent, not one of them", tests=f"{TESTS} -k time_or_with_steps",
    ),
    Mutant(
        "trained-others-first", file="bench/trained/results.py",
        old="self.rows = {**other.rows, **self.rows}", new="self.rows = {**self.rows, **other.rows}",
        wrong="what a file had before stands in the place of what was measured", tests=f"{TESTS} -k read_back_and_joined",
    ),
)  # fmt: skip
