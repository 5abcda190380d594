"""Formulas as MathML, written when the pages are built: browsers draw it themselves, and nothing has to be loaded."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

# A backslash hides what is behind it: an escaped brace opens nothing.
TOKEN = re.compile(r"\\(?:begin|end)\{\w+\*?\}|\\[A-Za-z]+|\\.|[{}]|[^\\{}]+", re.DOTALL)


def setup(app: Sphinx) -> dict[str, Any]:
    """Makes this the way in which formulas are written."""
    app.add_html_math_renderer("mathml", (write_inline, None), (write_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


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
        >>> lines(r"a & = b \\\\ & = c")
        ['\\\\begin{aligned}a & = b \\\\\\\\ & = c\\\\end{aligned}']
    """
    outside = re.sub(r"\\begin\{(\w+\*?)\}.*?\\end\{\1\}", "", latex, flags=re.DOTALL)
    if "\\\\" in outside or "&" in outside:
        return [rf"\begin{{aligned}}{latex}\end{{aligned}}"]
    return pieces(latex)


def write_inline(writer: HTML5Translator, node: nodes.math) -> None:
    """Writes a formula within a line."""
    writer.body.append(f'<span class="math notranslate">{convert(node.astext())}</span>')
    raise nodes.SkipNode


def write_block(writer: HTML5Translator, node: nodes.math_block) -> None:
    """Writes a formula in a place of its own, its parts beside each other where there is room."""
    parts = [convert(piece, display="block") for piece in lines(node.astext())]
    writer.body.append(f'<div class="math notranslate">{"".join(parts)}</div>\n')
    raise nodes.SkipNode
