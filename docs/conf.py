"""How the pages are built."""

from __future__ import annotations

import sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(root), str(root / "kernels"), str(root / "docs" / "_extensions")]

import attnzoo  # noqa: E402  (the path above is what makes it importable from source)
from attnzoo.reporting.versions import FLOORS, TESTED, TRANSFORMERS  # noqa: E402

project = "attnzoo"
author = "the attnzoo engineers"
copyright = "2026, the attnzoo engineers"
version = release = attnzoo.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "attnzoo_docs.commands",
    "attnzoo_docs.mathml",
    "attnzoo_docs.options",
]
myst_enable_extensions = ["dollarmath", "colon_fence", "substitution"]
tested = {**TESTED, "transformers": ", ".join(TRANSFORMERS)}
versions = [f"| {name} | {floor} | {tested[name]} |" for name, floor in FLOORS.items()]
myst_substitutions = {
    "tested_transformers": " and ".join((", ".join(TRANSFORMERS[:-1]), TRANSFORMERS[-1])),
    "versions": "\n".join(["| package | oldest supported | tested with |", "|---|---|---|", *versions]),
}
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_use_ivar = True
# Dashes alone: what stands in quotes is often typed.
smartquotes_action = "D"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
html_math_renderer = "mathml"
html_theme = "furo"
pygments_dark_style = "monokai"
html_title = "attnzoo"
html_static_path = ["_static"]
html_css_files = ["attnzoo.css"]
exclude_patterns = ["_build", "_extensions"]
