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

faults = partial(Mutant, file="attnzoo/cache/pages/pool.py", tests="tests/attnzoo/policies/test_faults.py")
choices = partial(Mutant, file="attnzoo/cache/pages/records.py", tests="tests/attnzoo/cache/pages/test_choices.py")

MUTANTS = (
    pool(
        "pages-ring-turns-early", file="attnzoo/cache/pages/extents.py", within="BlockRing.row_of",
        old="% (self.local + self.spare)", new="% max(1, self.local + self.spare - 1)",
        wrong="a ring's row is used again one block early", tests=f"{CALLS} -k storages",
    ),
    faults(
        "pages-turned-without-a-note", old="                self.journal.keep_entries(x, page)", new="                pass",
        wrong="a row that fails at a page's border loses the oldest page of a ring", tests="tests/attnzoo/policies/test_faults.py -k 'slack and border'",
    ),
    faults(
        "pages-half-written-rows-stay", old="behind = (position >= each) | (position < 0)", new="behind = position >= each",
        wrong="a row whose writing was cut short is read as a token",
    ),
    faults(
        "pages-attention-counted-twice", file="attnzoo/cache/pages/held.py", old="                self.pool.journal.keep(received)", new="                pass",
        wrong="attention that a failed call gave stays with the rows", tests="tests/attnzoo/policies/test_faults.py -k h2o",
    ),
    faults(
        "pages-lost-though-nothing-came", file="attnzoo/cache/pages/cache.py", within="PagedCache._return_to", old="        self.lost = moment.lost\n", new="",
        wrong="compensation rows stand for rows that are still held", tests="tests/attnzoo/policies/test_faults.py -k razor",
    ),
    choices(
        "pages-choice-of-a-row-taken-back", old="uses = self.uses - cut", new="uses = self.uses",
        wrong="a choice serves rows though the one that made it is gone",
    ),
    choices(
        "pages-choice-stays-with-its-place", within="PagesRead.select", old="pages = pages.index_select(0, where)", new="pages = pages[:1].expand(index.shape[0], -1, -1)",
        wrong="a beam reads what another has chosen",
    ),
    choices(
        "pages-chosen-by-nobody", old="uses = torch.where(uses > 0, uses, UNCHOSEN)", new="pass",
        wrong="an item whose choosing row is gone reads on what it had chosen",
    ),
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
