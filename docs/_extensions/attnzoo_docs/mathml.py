"""Formulas as MathML, written when the pages are built: browsers draw it themselves, and no script is loaded.

Brackets that grow and sums of the right size need a font that has them. STIX Two Math, under the SIL Open Font License,
comes with the package ziamath; what formulas use of it is written beside the style sheets.
"""

from __future__ import annotations

import logging
import re
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from docutils import nodes
from fontTools import subset
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

SHORT_BAR = '<mo accent="true">&#x02015;</mo>'
WIDE_BAR = '<mo stretchy="true">&#x203E;</mo>'

FUNCTION = r"\\(?:sin|cos|log|ln)"

RANGES = (
    (0x20, 0x180), (0x370, 0x400), (0x2000, 0x2070), (0x20D0, 0x20F0), (0x2100, 0x2150), (0x2190, 0x2330),
    (0x27E0, 0x27F0), (0x1D400, 0x1D800),
)  # fmt: skip
"""Letters, accents, arrows, operators and brackets."""

# A backslash hides what is behind it: an escaped brace opens nothing.
TOKEN = re.compile(r"\\(?:begin|end)\{\w+\*?\}|\\[A-Za-z]+|\\.|[{}]|[^\\{}]+", re.DOTALL)


def setup(app: Sphinx) -> dict[str, Any]:
    """Makes this the way in which formulas are written."""
    app.add_html_math_renderer("mathml", (write_inline, None), (write_block, None))
    app.connect("build-finished", write_font)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def write_font(app: Sphinx, exception: Exception | None) -> None:
    """Writes the font of formulas into the folder of style sheets."""
    if exception is not None or app.builder.format != "html":
        return
    options = subset.Options(flavor="woff", layout_features=["*"], name_IDs=["*"], hinting=False, notdef_outline=True)
    # What is left out of a font is of no interest.
    logging.getLogger("fontTools").setLevel(logging.ERROR)
    with as_file(files("ziamath.fonts") / "STIXTwoMath-Regular.ttf") as path:
        font = subset.load_font(path, options)
    subsetter = subset.Subsetter(options)
    subsetter.populate(unicodes=[code for first, end in RANGES for code in range(first, end)])
    subsetter.subset(font)
    subset.save_font(font, Path(app.outdir) / "_static" / "stix-two-math.woff", options)


def pieces(latex: str) -> list[str]:
    r"""The parts of a formula between its wide spaces, which may stand on lines of their own.

    Example:
        >>> pieces(r"a = b, \qquad \frac{c \quad d}{e}")
        ['a = b,', '\\frac{c \\quad d}{e}']
    """
    found = [""]
    depth = 0
    for token in TOKEN.findall(latex):
        if token in ("{", "\\left") or token.startswith("\\begin{"):
            depth += 1
        elif token in ("}", "\\right") or token.startswith("\\end{"):
            depth -= 1
        if depth == 0 and token in ("\\quad", "\\qquad"):
            found.append("")
        else:
            found[-1] += token
    return [piece.strip() for piece in found if piece.strip()]


def lines(latex: str) -> list[str]:
    r"""What stands in a place of its own: the parts of a formula, or the whole of one that is aligned.

    Example:
        >>> lines(r"a & = b \\ & = c")
        ['\\begin{aligned}a & = b \\\\ & = c\\end{aligned}']
    """
    outside = re.sub(r"\\begin\{(\w+\*?)\}.*?\\end\{\1\}", "", latex, flags=re.DOTALL)
    if "\\\\" in outside or "&" in outside:
        return [rf"\begin{{aligned}}{latex}\end{{aligned}}"]
    return pieces(latex)


def drawn(latex: str, *, block: bool) -> str:
    """A formula as MathML, with what the converter leaves out: spaces round functions, upright single letters."""
    # A backslash at a line's end is a space; the converter takes it for a part of what follows.
    text = re.sub(r"(?<!\\)\\\n", r"\\ ", latex)
    text = re.sub(r"\\mathrm\{(\w)\}", r"\\text{\1}", text)
    text = re.sub(rf"(?<=[\w}}])\s*(?={FUNCTION}\b)", r"\\,", text)
    text = re.sub(rf"({FUNCTION}(?:_\w)?)\s*(?=\w|\\(?!,|left|[bB]ig)[A-Za-z])", r"\1\\,", text)
    text = re.sub(r"\s:\s", r" \\,:\\, ", text)
    # A bar as wide as what is below it.
    return convert(text, display="block" if block else "inline").replace(SHORT_BAR, WIDE_BAR)


def write_inline(writer: HTML5Translator, node: nodes.math) -> None:
    """Writes a formula within a line."""
    writer.body.append(f'<span class="math notranslate">{drawn(node.astext(), block=False)}</span>')
    raise nodes.SkipNode


def write_block(writer: HTML5Translator, node: nodes.math_block) -> None:
    """Writes a formula in a place of its own, its parts beside each other where there is room."""
    parts = [drawn(piece, block=True) for piece in lines(node.astext())]
    writer.body.append(f'<div class="math notranslate">{"".join(parts)}</div>\n')
    raise nodes.SkipNode
