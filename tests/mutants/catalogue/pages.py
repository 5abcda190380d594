"""Of caches of pages: what is read of them, what is chosen and merged."""

from __future__ import annotations

from functools import partial

from tests.mutants.record import Mutant

CALLS = "tests/attnzoo/base/paged/test_attend_paged.py"
pool = partial(Mutant, file="attnzoo/cache/pages/pool.py", tests=f"{CALLS} -k 'by_place or storages'")
cache = partial(
    Mutant, file="attnzoo/cache/pages/cache.py", tests="tests/attnzoo/cache/pages -k 'never_come or taken_back'"
)
chosen = partial(Mutant, tests=f"{CALLS} -k 'chosen'")

MUTANTS = (
    pool(
        "pages-begun-with-what-was-there", old="x.index_fill_(0, page, NOTHING[name])", new="pass",
        wrong="rows of a block that has left are read behind those of the block that took its page",
    ),
    pool(
        "pages-masses-not-logarithms", file="attnzoo/cache/pages/apply.py", tests="tests/attnzoo/cache/pages -k 'without_loss'",
        old="torch.where(joined, mass_of[:, :, :count].log(), kept", new="torch.where(joined, mass_of[:, :, :count], kept", wrong="a bias is the mass itself",
    ),
    pool(
        "pages-bias-forgotten", file="attnzoo/base/paged/one_row.py", tests=f"{CALLS} -k 'chosen'", old="    if pool.is_masked(extent):", new="    if False:",
        wrong="a decoding row counts merged rows once, and reads rows that hold nothing",
    ),
    chosen(
        "pages-shares-not-divided", file="attnzoo/base/paged/signals.py", old="share = (score - end).exp_()", new="share = score.exp_()",
        wrong="attention is counted without what all rows get together",
    ),
)  # fmt: skip
