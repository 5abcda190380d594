"""Of what policies remember, against their formulas: rows in pages, rows that leave, masses, choices, files."""

from __future__ import annotations

from functools import partial

from tests.mutants.record import Mutant

PAGES = "attnzoo/cache/pages"
LAWS = "tests/attnzoo/policies/test_laws.py -m 'not slow'"


def formula(*settings: str) -> str:
    """Some settings of policies against the oracle."""
    return f"{LAWS} -k 'formula and ({' or '.join(settings)})'"


store = partial(Mutant, file=f"{PAGES}/store.py")
pool = partial(Mutant, file=f"{PAGES}/pool.py")
extents = partial(Mutant, file=f"{PAGES}/extents.py")
records = partial(Mutant, file=f"{PAGES}/records.py")
apply = partial(Mutant, file=f"{PAGES}/apply.py")
seen = partial(Mutant, file=f"{PAGES}/seen.py")

MUTANTS = (
    store(
        "paged-table-off-by-one",
        old="self.page_order(extent) + extent.bases(self.batch).unsqueeze(-1)",
        new="self.page_order(extent) + extent.bases(self.batch).unsqueeze(-1) + 1",
        wrong="a row reads the page behind each that it chose",
        tests=formula("pages-0"),
    ),
    store(
        "paged-nothing-is-read",
        old=" or isinstance(extent.rows, Tensor)",
        new="",
        wrong="items with fewer rows than others read zeros behind them",
        tests=formula("snapkv-1", "knorm-0"),
    ),
    store(
        "paged-positions-stay-behind",
        within="PageStore.moved",
        old="for name in self.tensors:",
        new="for name in self.tensors.keys() - {'position'}:",
        wrong="beams are reordered without the positions of their rows",
        tests=f"{LAWS} -k 'items_are_chosen and knorm'",
    ),
    pool(
        "paged-stale-bias",
        within="PagePool.forget_behind",
        old="if name not in PER_PAGE:",
        new="if name not in (*PER_PAGE, 'bias'):",
        wrong="tokens that were taken back are read still",
        tests=f"{LAWS} -k 'slack and pages'",
    ),
    extents(
        "paged-ring-one-block-early",
        within="BlockRing.page_of",
        old="% (self.local + self.spare)",
        new="% max(1, self.local + self.spare - 1)",
        wrong="a block is written over the one that is still read",
        tests=formula("razor-0", "compose-0"),
    ),
    records(
        "paged-choice-one-call-late",
        within="Progress.due",
        old="self.since >= every",
        new="self.since > every",
        wrong="rows are chosen a token later than the policy says",
        tests=formula("tova-0", "knorm-0"),
    ),
    Mutant(
        "paged-choice-between-chunks",
        file=f"{PAGES}/held.py",
        within="HeldRows.stage",
        old="if tokens == 1:",
        new="if tokens >= 1:",
        wrong="a prompt's later chunks read what is left of the earlier ones",
        tests=formula("snapkv-0"),
    ),
    records(
        "paged-since-not-reset",
        within="Progress.choosing",
        old="return Progress(self.tokens, 0, False, self.tokens) if due else self",
        new="return Progress(self.tokens, self.since, False, self.tokens) if due else self",
        wrong="rows are chosen at every token once they were",
        tests=formula("h2o-0", "knorm-0"),
    ),
    records(
        "paged-pausing-items-choose",
        within="Progress.due",
        old="return due & (lengths > 0)",
        new="return due",
        wrong="rows of an item that pauses are chosen by the calls of others",
        tests=formula("tova-0", "h2o-0", "knorm-0"),
    ),
    apply(
        "paged-sidecar-left-behind",
        old="value = picked(x, index)",
        new="value = picked(x, index) if name not in ('mass', 'score') else x[:, :, : index.shape[2]].clone()",
        wrong="a row that moves up has the score of the row that lay there",
        tests=formula("h2o-0", "locret-1"),
    ),
    apply(
        "paged-mass-not-its-logarithm",
        old='torch.where(joined, mass_of[:, :, :count].log(), kept["bias"])',
        new='torch.where(joined, mass_of[:, :, :count], kept["bias"])',
        wrong="a merged row weighs the exponential of its mass",
        tests=formula("ems-0"),
    ),
    apply(
        "paged-mean-of-rows-not-of-mass",
        old="mean = sums[name][:, :, :count] / mass_of[:, :, :count].unsqueeze(-1)",
        new="mean = sums[name][:, :, :count] / number[:, :, :count].unsqueeze(-1)",
        wrong="merged keys are not averaged by mass",
        tests=formula("ems-0"),
    ),
    seen(
        "paged-group-by-its-mean",
        old='mass.amax(2) if group == "max" else mass.mean(2)',
        new="mass.mean(2)",
        wrong="a row that one query head needs is outvoted by the others of its group",
        tests=formula("snapkv-0", "h2o-0"),
    ),
    seen(
        "paged-mass-not-over-queries",
        old='mean = rows["mass"] / queries.unsqueeze(-1)',
        new='mean = rows["mass"]',
        wrong="rows that have been there for longer have received more",
        tests=formula("h2o-0", "h2o-1"),
    ),
    Mutant(
        "policies-first-page-may-be-lost",
        file="attnzoo/cache/policies/reading.py",
        old="(page == 0) | ",
        new="",
        wrong="the page with the sink is left out where its bound is small",
        tests=formula("pages-0", "compose-0", "compose-2"),
    ),
    Mutant(
        "policies-window-without-its-block",
        file="attnzoo/cache/policies/streaming.py",
        old="return self.window // self.block + 1",
        new="return max(1, self.window // self.block)",
        wrong="rows at the front of a block read a block fewer than the window says",
        tests=formula("streaming", "duo"),
    ),
    Mutant(
        "policies-budget-without-what-is-forced",
        file="attnzoo/cache/policies/budget.py",
        old="forced = first_rows(seen, self.sink) | last_rows(",
        new="forced = last_rows(",
        wrong="the sink goes where its score is low",
        tests=formula("knorm-0", "snapkv-1"),
    ),
)
