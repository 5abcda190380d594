"""Which versions of other packages are supported, and which of them the tests run with: said here and nowhere else.

Nothing is imported: who asks may have to say that an import would fail.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, version

from attnzoo.reporting.warn import warn_caller
from attnzoo_kernels.errors import UnsupportedError

FLOORS = {"torch": "2.11", "triton": "3.6", "transformers": "5.4", "numpy": "1.26", "einops": "0.8"}
"""The oldest that is supported."""

TESTED = {"torch": "2.13.0", "triton": "3.9.0", "transformers": "5.24.0", "numpy": "2.4.6", "einops": "0.8.2"}
"""What the test suite runs with."""

TRANSFORMERS = ("5.4.0", "5.23.0", "5.24.0")
"""What the surgery tests run with, oldest first: the ends of the range, and the last before blocks took ``cache``."""

_warned: set[str] = set()


def release(text: str) -> tuple[int, ...]:
    """The numbers of a version: "2.13.0+cpu" is (2, 13, 0)."""
    return tuple(int(x) for x in re.findall(r"\d+", text.partition("+")[0])[:3])


def transformers_version() -> str | None:
    """The version of transformers that is loaded, else of the one that is installed; ``None`` without either."""
    loaded = getattr(sys.modules.get("transformers"), "__version__", None)
    if isinstance(loaded, str):
        return loaded
    try:
        return version("transformers")
    except PackageNotFoundError:
        return None


def untested_transformers(found: str | None) -> str | None:
    """What to say of a version of transformers that lies outside the tested range; ``None`` of one inside."""
    oldest = TRANSFORMERS[0]
    newest = TRANSFORMERS[-1]
    # A repair of a tested version counts as tested.
    if found is None or release(oldest)[:2] <= release(found)[:2] <= release(newest)[:2]:
        return None
    return f"transformers {found} is outside what was tested, {oldest} to {newest}"


def check_transformers() -> None:
    """Looks at the version of transformers before a model is converted.

    Warns, once in a process, of one that is newer than what was tested.

    Raises:
        UnsupportedError: If it is older than what is supported.
    """
    found = transformers_version()
    if found is None:
        return
    if release(found) < release(FLOORS["transformers"]):
        reason = f"expected {FLOORS['transformers']} or newer, got {found}"
        raise UnsupportedError(
            f"transformers: {reason}; pip install 'transformers>={FLOORS['transformers']}'", (reason,)
        )
    news = untested_transformers(found)
    if news is not None and found not in _warned:
        _warned.add(found)
        warn_caller(f"{news}: compare a converted model with the one it was, or install a version in between")
