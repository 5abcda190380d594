"""The check of what was built: ``python -m attnzoo_docs.check docs/_build``.

Every link and anchor within the site exists; links that leave it are whole; nothing is loaded from elsewhere; every
formula was drawn; every page is small enough to load; and the questions of :mod:`attnzoo_docs.questions` are answered
within two clicks. ``--outside`` lists the links that leave the site.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from attnzoo_docs.built import Page, outside, read, resolve
from attnzoo_docs.questions import QUESTIONS, Question

LARGEST = 300_000
"""Bytes of a page that somebody waits for."""

MOST_CLICKS = 2
START = "index.html"


def faults(pages: dict[str, Page], files: set[str], questions: Sequence[Question] = QUESTIONS) -> list[str]:
    """Everything that is wrong, a line each.

    Args:
        pages: What :func:`attnzoo_docs.built.read` found.
        files: Paths of all files of the site.
        questions: What strangers ask.
    """
    found = []
    for page in pages.values():
        found += [f"{page.path}: {why}" for why in _links(page, pages, files)]
        found += [f"{page.path}: loads {target}" for target in _loads(page, files)]
        found += [f"{page.path}: a formula has {command}" for command in dict.fromkeys(page.undrawn)]
        if page.size > LARGEST and page.path.endswith(".html"):
            found.append(f"{page.path}: {page.size:,} bytes, {LARGEST:,} is the most")
    return [*found, *(f"{one.asked} {why}" for one in questions for why in unanswered(one, pages))]


def _links(page: Page, pages: dict[str, Page], files: set[str]) -> list[str]:
    """What is wrong with the links of a page."""
    found = []
    for target in dict.fromkeys(page.links):
        if outside(target):
            if not is_whole(target):
                found.append(f"{target} is no whole address")
            continue
        path, anchor = resolve(page.path, target)
        if path not in files:
            found.append(f"{target} leads nowhere")
        elif anchor and path in pages and anchor not in pages[path].anchors:
            found.append(f"{target} has no such anchor")
    return found


def _loads(page: Page, files: set[str]) -> list[str]:
    """What a page fetches that does not come with the site."""
    return [
        target
        for target in dict.fromkeys(page.loads)
        if not target.startswith("data:")
        and (outside(target) or resolve(page.path, target.partition("?")[0])[0] not in files)
    ]


def is_whole(target: str) -> bool:
    """Whether an address that leaves the site could be one; nothing is asked of a network.

    Example:
        >>> is_whole("https://arxiv.org/abs/1706.03762"), is_whole("https://arxiv"), is_whole("htps://arxiv.org")
        (True, False, False)
    """
    parts = urlsplit(target)
    if parts.scheme == "mailto":
        return "@" in parts.path
    named = "." in parts.netloc.strip(".") and not any(sign in target for sign in " <>\"'`")
    return parts.scheme in ("http", "https") and named and target.count("(") == target.count(")")


def unanswered(question: Question, pages: dict[str, Page]) -> list[str]:
    """Why somebody who follows a question's clicks from the start page does not find its answer."""
    if len(question.clicks) > MOST_CLICKS:
        return [f"takes {len(question.clicks)} clicks"]
    here = START
    for click in question.clicks:
        if click not in {"#".join(resolve(here, target)).rstrip("#") for target in pages[here].content}:
            return [f"{here} has no link to {click} in its text"]
        here, _, anchor = click.partition("#")
        if here not in pages or (anchor and anchor not in pages[here].anchors):
            return [f"{click} is not there"]
    return [] if question.answer in pages[here].words else [f"{here} does not say {question.answer!r}"]


def main(arguments: Sequence[str]) -> int:
    """Checks a folder, and says what is wrong with it."""
    folder = Path(next(one for one in arguments if not one.startswith("--")))
    pages = read(folder)
    if "--outside" in arguments:
        print("\n".join(sorted({target for page in pages.values() for target in page.links if outside(target)})))
        return 0
    files = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    found = faults(pages, files)
    for line in found:
        print(line, file=sys.stderr)
    return 1 if found or START not in pages else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
