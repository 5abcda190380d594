"""Of converted models as programs: what an export leaves open is refused by name."""

from __future__ import annotations

from tests.mutants.record import Mutant

MUTANTS = (
    Mutant(
        "export-of-a-rule-at-any-length", file="attnzoo/surgery/hosts/attending.py",
        tests="tests/attnzoo/surgery/hosts/test_programs.py -k open_length",
        old="if isinstance(first, torch.SymInt):", new="if False:",
        wrong="an export with an open length dies inside with something about integers",
    ),
    Mutant(
        "compiled-page-other-ratio", file="bench/compiled.py", tests="tests/bench/test_pages.py -k table_is_that",
        old="{r.ratio:.2f} | {r.peer_ratio:.2f} |", new="{r.peer_ratio:.2f} | {r.ratio:.2f} |",
        wrong="the page tells a step's gain for that of ten lines of torch",
    ),
)  # fmt: skip
