"""The description on the package index: README.md, whose links into the repository lead nowhere from there."""

from __future__ import annotations

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

PICTURE = re.compile(r"!\[[^\]]*\]\((?!https?://)[^)]*\)\n?|<picture>.*?</picture>\n?|<img\b[^>]*>\n?", re.DOTALL)
LINK = re.compile(r"\[([^\]]+)\]\((?!https?://)[^)]*\)")
COMMENT = re.compile(r"<!--.*?-->\n*", re.DOTALL)


def for_an_index(text: str) -> str:
    """A page without pictures and links that only a checkout has; a link's own words stay."""
    return LINK.sub(r"\1", PICTURE.sub("", COMMENT.sub("", text)))


class ReadmeHook(MetadataHookInterface):
    """Gives the field ``readme``, which pyproject.toml says is dynamic."""

    def update(self, metadata: dict[str, object]) -> None:
        """Called by hatchling when it builds."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": for_an_index(text)}
