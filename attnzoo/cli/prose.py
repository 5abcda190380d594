"""Docstrings as plain text for a terminal: no markup, no LaTeX."""

from __future__ import annotations

import inspect
import re

_SYMBOLS = {
    **{"sum": "Σ", "in": "∈", "le": "≤", "ge": "≥", "ne": "≠", "cdot": "·", "odot": "⊙", "bmod": "mod"},
    **{"wedge": "∧", "vee": "∨", "lfloor": "⌊", "rfloor": "⌋", "infty": "∞", "times": "×", "ell": "ℓ"},  # noqa: RUF001
    **{"alpha": "α", "beta": "β", "lambda": "λ", "omega": "ω", "sigma": "σ", "to": "→"},  # noqa: RUF001
    **{"lVert": "‖", "rVert": "‖", "lvert": "|", "rvert": "|", "mid": "|"},
    **{"approx": "≈", "top": "T", **dict.fromkeys(("bigl", "bigr", "Bigl", "Bigr", "big", "Big"), "")},
    **{"quad": " ", "qquad": "  ", "left": "", "right": ""},
}
_ROLE = re.compile(r":[a-z:]+:`~?([^`]+)`")
_EMPHASIS = re.compile(r"(?<![\w*])\*{1,2}([^*\s](?:[^*]*[^*\s])?)\*{1,2}(?![\w*])")
_MATH = ".. math::"
_OVER = {"bar": "\u0304", "hat": "\u0302"}


def plain(document: str) -> list[str]:
    """The paragraphs of a docstring, each in one line, formulas in signs that a terminal has."""
    paragraphs = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(document)):
        text = " ".join(block.split())
        if text.startswith(_MATH):
            # One below the other, as they are written.
            rows = re.split(r"\\\\(?:\[[^]]*\])?", text.removeprefix(_MATH))
            paragraphs.append("\n".join(f"  {_formula(row)}" for row in rows if row.strip()))
        else:
            items = re.split(r"\n+(?=- )", block.strip())
            paragraphs.append("\n".join(words(" ".join(item.split())) for item in items))
    return paragraphs


def words(text: str) -> str:
    """A piece of text without markup."""
    text = re.sub(r":math:`([^`]+)`", lambda found: _formula(found[1]), text)
    text = _ROLE.sub(lambda found: found[1].rpartition(".")[2] if "~" in found[0] else found[1], text)
    text = re.sub(r"``([^`]+)``|`([^`]+)`_?", lambda found: found[1] or found[2], text)
    return _EMPHASIS.sub(r"\1", text)


def _formula(latex: str) -> str:
    """A formula in one line of letters and signs."""
    text = re.sub(r"\\(?:text|mathrm|mathbf|operatorname)\{([^}]*)\}", r"\1", latex)
    text = _fractions(text)
    text = re.sub(r"(?<!\\)&", " ", text)
    # What stands over a letter follows it here.
    for name, sign in _OVER.items():
        text = re.sub(rf"\\{name}\s*(\w)", rf"\1{sign}", text)
    text = re.sub(r"([_^])\{(\w)\}", r"\1\2", text)
    text = re.sub(r"([_^])\{([^{}]*)\}", r"\1(\2)", text)
    text = re.sub(r"\\([a-zA-Z]+)", lambda found: _SYMBOLS.get(found[1], found[1]), text)
    text = text.replace("\\|", "‖").replace("\\,", " ").replace("\\", "")
    return " ".join(text.split()).replace(" ,", ",")


def _fractions(text: str) -> str:
    """Fractions in one line, the inner ones too."""
    while (start := re.search(r"\\[dt]?frac\s*(?={)", text)) is not None:
        above, middle = _group(text, start.end())
        below, end = _group(text, middle)
        told = " / ".join(part if re.fullmatch(r"\\?\w+", part) else f"({part})" for part in (above, below))
        text = f"{text[: start.start()]}({told}){text[end:]}"
    return text


def _group(text: str, start: int) -> tuple[str, int]:
    """What stands in the braces that open at a place, and the place behind them; braces that are printed do not count.

    Example:
        >>> _group("{a_{b}}c", 0)
        ('a_{b}', 7)
    """
    depth = 0
    for brace in re.finditer(r"(?<!\\)[{}]", text[start:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            end = start + brace.end()
            return text[start + 1 : end - 1], end
    return text[start + 1 :], len(text)


def notes(record: type) -> dict[str, str]:
    """What the docstring of a class, or of one that it inherits from, says about each attribute, without markup."""
    return {name: words(text) for name, text in documented(record).items()}


def documented(record: type) -> dict[str, str]:
    """What is said about each attribute as it is written; a class's own words come before those that it inherits."""
    found: dict[str, str] = {}
    for base in reversed(record.__mro__):
        _, _, listed = inspect.cleandoc(base.__dict__.get("__doc__") or "").partition("Attributes:\n")
        name = ""
        for line in listed.splitlines():
            start = re.match(r" {4}(\w+): (.*)", line)
            if start is not None:
                name = start[1]
                found[name] = start[2]
            elif name and line.startswith(" " * 8):
                found[name] += f" {line.strip()}"
            else:
                name = ""
    return found
