"""Two public-domain texts: "botchan" to evaluate on, "devil" to calibrate on. Provenance: ``PROVENANCE.md`` beside."""

from __future__ import annotations

from importlib.resources import files

from attnzoo.reporting.choices import check_choice

TEXTS = ("botchan", "devil")


def text(name: str) -> str:
    """One of the texts, line breaks kept.

    Raises:
        ConfigError: If there is none of that name.
    """
    check_choice("text", name, TEXTS)
    return (files("attnzoo.data") / f"{name}.txt").read_text(encoding="utf-8")
