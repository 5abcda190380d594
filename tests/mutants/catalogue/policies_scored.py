"""Of policies: rows and pages that are chosen by scores, rows that stand for others, and policies put together."""

from __future__ import annotations

from functools import partial

from tests.mutants.record import Mutant

FOLDER = "attnzoo/cache/policies"
TESTS = "tests/attnzoo/cache/policies"
budget = partial(Mutant, file=f"{FOLDER}/budget.py", tests=f"{TESTS}/test_scored.py -k 'snapkv or knorm'")
scored = partial(Mutant, file=f"{FOLDER}/scored.py", tests=f"{TESTS}/test_scored.py -k 'snapkv or h2o'")
ems = partial(Mutant, file=f"{FOLDER}/ems.py", tests=f"{TESTS}/test_scored.py -k 'ems or similar or merge'")
reading = partial(Mutant, file=f"{FOLDER}/reading.py", tests=f"{TESTS}/test_reading.py")
razor = partial(Mutant, file=f"{FOLDER}/razor.py", tests=f"{TESTS}/test_razor.py")
compose = partial(Mutant, file=f"{FOLDER}/compose.py", tests=f"{TESTS}/test_compose.py")
locret = partial(Mutant, file=f"{FOLDER}/locret.py", tests=f"{TESTS}/test_locret.py")

MUTANTS = (
    budget(
        "policies-window-one-short",
        old="seen.position >= start[:, None, None]",
        new="seen.position > start[:, None, None]",
        wrong="one of the last tokens fewer is kept",
    ),
    budget(
        "policies-share-of-the-longest",
        old="self.rows_of(tokens) for tokens in seen.tokens.tolist()",
        new="self.rows_of(max(seen.tokens.tolist())) for _ in seen.tokens.tolist()",
        wrong="a share is counted in the tokens of the longest item",
    ),
    scored(
        "policies-window-lends-its-mass",
        old=" | last_rows(seen, [window] * mass.shape[0])",
        new="",
        wrong="rows before the window have the attention of rows in it",
    ),
    scored(
        "policies-h2o-all-recent",
        old="int(self.local * max(rows - self.sink, 0))",
        new="max(rows - self.sink, 0)",
        wrong="no heavy hitter is kept",
    ),
    ems(
        "policies-merges-what-differs",
        old="masked_fill(found < least, DROPPED)",
        new="masked_fill(found < -1, DROPPED)",
        wrong="rows are merged into rows that are not like them",
    ),
    reading(
        "policies-first-page-not-forced",
        old="(page == 0) | ",
        new="",
        wrong="the page with the sink may be left out",
    ),
    reading(
        "policies-pages-by-the-mean",
        old="page_bounds(q, pages).amax(2)",
        new="page_bounds(q, pages).mean(2)",
        wrong="a page that one query head of the group needs is outvoted by the others",
    ),
    razor(
        "policies-moment-about-nothing",
        old="moment - _squared(k.unsqueeze(2), self.moments[0]).squeeze(2)",
        new="moment",
        wrong="keys that are the same are taken for spread ones",
    ),
    razor(
        "policies-whole-group-protected",
        old="(scores.kv_heads, -1)).any(2)",
        new="(scores.kv_heads, -1)).all(2)",
        wrong="a KV head is protected where all its query heads are",
    ),
    compose(
        "policies-full-heads-stream",
        old="with_every_page(rows, pages, ~self._full(rows.shape[1]))",
        new="with_every_page(rows, pages, self._full(rows.shape[1]))",
        wrong="heads that stream read fewer pages, and full ones all",
    ),
    locret(
        "policies-retaining-inputs-swapped",
        old="for x in (q, k, v)], -1)",
        new="for x in (k, q, v)], -1)",
        wrong="weights of queries meet keys",
    ),
)
