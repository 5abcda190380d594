"""Two public-domain texts: "botchan" to evaluate on, "devil" to calibrate on. Provenance: ``PROVENANCE.md`` beside."""

from __future__ import annotations

from importlib.resources import files

from attnzoo_kernels.errors import ConfigError

TEXTS = ("botchan", "devil")


def text(name: str) -> str:
    """One of the texts, line breaks kept.

    Raises:
        ConfigError: If there is none of that name.
    """
    if name not in TEXTS:
        raise ConfigError(f"text: expected one of {', '.join(TEXTS)}, got {name!r}")
    return (files("attnzoo.data") / f"{name}.txt").read_text(encoding="utf-8")
