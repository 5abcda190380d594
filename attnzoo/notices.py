"""Warnings that point at the caller's line, not into this package."""

from __future__ import annotations

import sys
import warnings


def warn_caller(message: str) -> None:
    """Warns at the innermost line that lies outside attnzoo."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).split(".")[0] == "attnzoo":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level + 1)
