"""How the pages are built."""

from __future__ import annotations

import sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(root), str(root / "kernels")]

import attnzoo  # noqa: E402  (the path above is what makes it importable from source)
from attnzoo.reporting.versions import TRANSFORMERS  # noqa: E402

project = "attnzoo"
author = "the attnzoo engineers"
copyright = "2026, the attnzoo engineers"
version = release = attnzoo.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
]
myst_enable_extensions = ["dollarmath", "colon_fence", "substitution"]
myst_substitutions = {"tested_transformers": " and ".join((", ".join(TRANSFORMERS[:-1]), TRANSFORMERS[-1]))}
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
html_theme = "furo"
html_title = "attnzoo"
exclude_patterns = ["_build"]
