"""What a built page holds: its anchors, its links, what it loads, and formulas that were not drawn."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

LOADING = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
    "link": "href",
}
"""What a browser fetches by itself, and the attribute that says from where."""

ABOUT = frozenset({"next", "prev", "index", "search", "author", "canonical", "license"})
"""Relations of a ``link`` that nothing is fetched for."""


@dataclass
class Page:
    """One page.

    Attributes:
        path: Where it lies, from the folder of all pages.
        size: Bytes.
        anchors: Names that a link to a part of it may have.
        links: Where its links lead, as they are written.
        content: Those of them that stand in its text, and not in menus.
        loads: What a browser fetches for it.
        undrawn: Commands of formulas that nobody knew.
        words: Its text, with single spaces.
    """

    path: str
    size: int = 0
    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    content: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    undrawn: list[str] = field(default_factory=list)
    words: str = ""


class PageReader(HTMLParser):
    """Fills a page from its HTML."""

    def __init__(self, page: Page) -> None:
        super().__init__()
        self.page = page
        self._text: list[str] = []
        self._article = 0
        self._math = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Notes what a tag says."""
        given = {name: value or "" for name, value in attrs}
        self.page.anchors |= {given[name] for name in ("id", "name") if given.get(name)}
        self._article += tag == "article"
        self._math += tag == "math"
        if tag == "a" and given.get("href"):
            self.page.links.append(given["href"])
            # A sign beside a heading leads to the heading itself.
            if self._article and "headerlink" not in given.get("class", ""):
                self.page.content.append(given["href"])
        if tag in LOADING and given.get(LOADING[tag]) and not (tag == "link" and given.get("rel", "") in ABOUT):
            self.page.loads.append(given[LOADING[tag]])
        self.page.loads += imports(given.get("style", ""))

    def handle_endtag(self, tag: str) -> None:
        """Leaves what a tag began."""
        self._article -= tag == "article"
        self._math -= tag == "math"

    def handle_data(self, data: str) -> None:
        """Keeps text, and looks for what is left of a formula's source."""
        if self._article:
            self._text.append(data)
        if self._math:
            self.page.undrawn += re.findall(r"\\[A-Za-z]*|\$", data)

    def close(self) -> None:
        """Joins the text."""
        super().close()
        self.page.words = " ".join("".join(self._text).split())


def imports(style: str) -> list[str]:
    """What a style sheet fetches; what it holds itself is left out.

    Example:
        >>> imports("a { background: url('x.png') } b { background: url(data:image/png;base64,AA) }")
        ['x.png']
    """
    found = re.findall(r"url\(\s*['\"]?(?!data:|#)([^'\")\s]+)|@import\s+['\"]([^'\"]+)", style)
    return [first or second for first, second in found]


def read(folder: Path) -> dict[str, Page]:
    """All pages of a folder, by their paths; style sheets are pages without anchors."""
    pages = {}
    for file in sorted([*folder.rglob("*.html"), *folder.rglob("*.css")]):
        path = file.relative_to(folder).as_posix()
        text = file.read_text(encoding="utf-8")
        page = Page(path, size=file.stat().st_size)
        if file.suffix == ".css":
            page.loads = imports(text)
        else:
            reader = PageReader(page)
            reader.feed(text)
            reader.close()
        pages[path] = page
    return pages


def outside(target: str) -> bool:
    """Whether a link leaves the site."""
    return re.match(r"[a-z][a-z0-9+.-]*:|//", target, re.IGNORECASE) is not None


def resolve(page: str, target: str) -> tuple[str, str]:
    """The path and the anchor that a link of a page leads to.

    Example:
        >>> resolve("variants/mha.html", "../surgery.html#saving")
        ('surgery.html', 'saving')
    """
    path, anchor = urldefrag(unquote(target))
    if not path:
        return page, anchor
    parts: list[str] = [] if path.startswith("/") else page.split("/")[:-1]
    for part in path.split("/"):
        if part == "..":
            # Above the site there is nothing; what leads there is not found.
            parts = parts[:-1] if parts else [".."]
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts), anchor
