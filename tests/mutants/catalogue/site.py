"""Of the pages: what is read from the packages for them, and what the check of the built ones sees."""

from __future__ import annotations

from functools import partial

from tests.mutants.record import Mutant

checked = partial(Mutant, file="docs/_extensions/attnzoo_docs/check.py", tests="tests/docs/test_check.py")
built = partial(Mutant, file="docs/_extensions/attnzoo_docs/built.py", tests="tests/docs/test_check.py")
told = partial(Mutant, tests="tests/docs/test_generated.py")

MUTANTS = (
    checked(
        "site-anchors-unseen", old="elif anchor and path in pages and anchor not in pages[path].anchors:", new="elif anchor and path not in pages:",
        wrong="a link to an anchor that is not there is whole",
    ),
    checked(
        "site-any-click", old="if click not in {", new="if False and click not in {",
        wrong="a question's clicks need no links",
    ),
    built(
        "site-menus-count", old='if self._article and "headerlink" not in', new='if "headerlink" not in',
        wrong="a link in the menu of every page answers every question",
    ),
    built(
        "site-styles-unread", old="page.loads = imports(text)", new="page.loads = []",
        wrong="a style sheet may fetch fonts from elsewhere",
    ),
    told(
        "site-own-words-lost", file="docs/_extensions/attnzoo_docs/options.py", old="if shared.get(option.name) != option]", new="if option.name not in shared]",
        wrong="what a variant says otherwise of a shared option is left out",
    ),
    told(
        "site-conversion-as-layer", file="docs/_extensions/attnzoo_docs/options.py", within="_of_conversion", old="options_of(variant).items()", new="{**options_of(variant), **{field.name: default_of(field) for field in fields(attnzoo.get_config(variant)) if field.name in options_of(variant)}}.items()",
        wrong="a conversion's options have the defaults of the layer",
    ),
    told(
        "site-formula-parted-in-braces", file="docs/_extensions/attnzoo_docs/mathml.py", old="if depth == 0 and token in", new="if token in",
        wrong="a formula is parted within a fraction",
    ),
)  # fmt: skip
