"""What strangers ask, and the clicks from the start page that answer it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        asked: As it is asked.
        clicks: Pages, with anchors where there are some, each linked in the text of the one before; the first in that of
            the start page.
        answer: What the last page says.
    """

    asked: str
    clicks: tuple[str, ...]
    answer: str


QUESTIONS: tuple[Question, ...] = ()
