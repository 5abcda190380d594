"""The command line; needs the extras ``cli`` and, for models, ``hf``."""

from __future__ import annotations

from attnzoo.cli.entry import main

__all__ = ["main"]
