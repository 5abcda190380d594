"""What a caller is told beside results: warnings at their own line, which code that knows better may keep back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from attnzoo_kernels.runtime.warn import warn_caller as _warn

_SILENT: ContextVar[bool] = ContextVar("attnzoo_silent", default=False)


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns at the innermost line that lies outside attnzoo and the libraries that call it."""
    if not _SILENT.get():
        _warn(message, category)


@contextmanager
def silent() -> Iterator[None]:
    """Keeps back what layers say about their own configuration, for code that builds them on purpose as they are."""
    token = _SILENT.set(True)
    try:
        yield
    finally:
        _SILENT.reset(token)
