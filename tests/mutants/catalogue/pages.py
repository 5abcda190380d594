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
offloaded = partial(Mutant, tests="tests/attnzoo/policies/test_offloaded.py")
choices = partial(Mutant, file="attnzoo/cache/pages/records.py", tests="tests/attnzoo/cache/pages/test_choices.py")

MUTANTS = (
    pool(
        "pages-ring-turns-early", file="attnzoo/cache/pages/extents.py", within="BlockRing.row_of",
        old="% (self.local + self.spare)", new="% max(1, self.local + self.spare - 1)",
        wrong="a ring's row is used again one block early", tests=f"{CALLS} -k storages",
    ),
    faults(
        "pages-turned-without-a-note", old="                self.journal.keep_entries(x, entries)", new="                pass",
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
    offloaded(
        "pages-fetched-whole", file="attnzoo/base/paged/reading.py", old="x.index_select(0, number.to(x.device))", new="x.to(pool.device).index_select(0, number)",
        wrong="a row that reads some pages fetches the whole pool", tests="tests/attnzoo/cache/pages/test_offloaded_pages.py -k fetches",
    ),
    offloaded(
        "pages-not-offloaded-in-hosts", file="attnzoo/surgery/hosts/caches/evicting.py", old="offloaded=self.offloads", new="offloaded=False",
        wrong="keys and values of a host stay on the device",
    ),
    offloaded(
        "pages-static-policies-stay", file="attnzoo/base/evicting/layer.py", old="if policy.is_static and not offload:", new="if policy.is_static:",
        wrong="what a policy holds by place is not offloaded",
    ),
    offloaded(
        "pages-room-of-whole-pages", file="attnzoo/cache/pages/beginning.py", old="return min(policy.page, FINE_PAGE)", new="return policy.page",
        wrong="each head has room for a page of 64 rows more", tests="tests/attnzoo/cache/pages/test_paged_cache.py -k little",
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
        "pages-begun-with-what-was-there", old="x.index_fill_(0, entries, NOTHING[name])", new="pass",
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
        "pages-shares-not-divided", file="attnzoo/base/paged/signals.py", old="share.sub_(end).exp_()", new="share.exp_()",
        wrong="attention is counted without what all rows get together",
    ),
    chosen(
        "pages-next-row-counted", file="attnzoo/base/paged/signals.py", old=".triu_(1)", new=".triu_(2)",
        wrong="a row receives attention from the query before it",
    ),
    Mutant(
        "pages-shares-all-at-once", file="attnzoo/base/paged/signals.py", old="last = min(tokens, first + max(1, SHARES // (pairs * each * slots)))", new="last = tokens",
        wrong="a prompt takes a matrix of tokens by tokens", tests="tests/attnzoo/policies/test_memory_held.py -k matrix",
    ),
    Mutant(
        "pages-room-of-the-allocator", file="attnzoo/cache/streams.py", old="if size < LARGE:", new="if size >= 0:",
        wrong="rows that are let go of stay with the process", tests="tests/attnzoo/policies/test_memory_held.py -k mapping",
    ),
    Mutant(
        "pages-kept-behind-a-choice", file="attnzoo/cache/pages/held.py", old="                if self.policy.slack:\n", new="                if True:\n",
        wrong="a cache holds on to what it let go of", tests="tests/attnzoo/policies/test_memory_held.py -k 'left and h2o'",
    ),
)  # fmt: skip
