"""Warnings that point at the caller's line, not into a library."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

# A module's call goes through torch, and a converted model's through its host's library.
_LIBRARIES = frozenset({"attnzoo", "attnzoo_kernels", "torch", "transformers", "accelerate", "peft"})


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns at the innermost line that lies outside the libraries between a user's code and this package."""
    frame = _caller(sys._getframe(1))
    warnings.warn_explicit(
        message,
        category,
        filename=frame.f_code.co_filename,
        lineno=frame.f_lineno,
        module=str(frame.f_globals.get("__name__", "")),
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )


def _caller(frame: FrameType) -> FrameType:
    """The innermost frame of a user's code; the outermost one where all are of libraries."""
    while frame.f_back is not None and _is_library(frame):
        frame = frame.f_back
    return frame


def _is_library(frame: FrameType) -> bool:
    name = str(frame.f_globals.get("__name__", ""))
    return name.partition(".")[0] in _LIBRARIES
