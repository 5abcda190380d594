"""Of the pictures of layouts and switches: what is drawn is what is read."""

from __future__ import annotations

from functools import partial

from tests.mutants.record import Mutant

drawn = partial(
    Mutant,
    file="bench/layout_pictures.py",
    tests="tests/bench/test_layout_pictures.py -k 'area or rectangles or numbers'",
)

MUTANTS = (
    drawn(
        "picture-run-goes-on", old="for run in sorted(set(open_runs) - runs):", new="for run in sorted(set(open_runs) - runs)[1:]:",
        wrong="a rectangle covers rows that are not read",
    ),
    drawn(
        "picture-first-head", old="return out[0, self.head]", new="return out[0, 0]",
        wrong="every head is drawn as the first one",
    ),
    drawn(
        "picture-hidden-as-read", old="fill = f'class=\"seen\" opacity=\"{_number(0.16 + 0.21 * shade)}\"' if shade else", new="fill = f'class=\"seen\" opacity=\"{_number(0.16 + 0.21 * shade)}\"' if True else",
        wrong="what the rule hides is drawn as read",
    ),
    drawn(
        "picture-origin-of-another-entry", old="int(self.layout.col[entry])): int(origin[entry])", new="int(self.layout.col[entry])): int(origin[first])",
        wrong="a block shows the origin of the first one of its row",
    ),
)  # fmt: skip
