"""The command line; needs the extras ``cli`` and, for models, ``hf``."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Runs the command line. An error is one line on stderr: exit code 2 for a wrong call, 1 for a failure."""
    try:
        from attnzoo.cli.app import app
    except ModuleNotFoundError as error:
        sys.exit(f"attnzoo: {error}; pip install 'attnzoo[cli,hf]'")
    from attnzoo_kernels.errors import AttnzooError, ConfigError, UnsupportedError

    debug = "--debug" in sys.argv or os.environ.get("ATTNZOO_DEBUG") == "1"
    try:
        app()
    except (AttnzooError, OSError, ValueError, TypeError, ImportError) as error:
        if debug:
            raise
        kind = 2 if isinstance(error, ConfigError | UnsupportedError) else 1
        sys.stderr.write(f"attnzoo: {' '.join(str(error).split()) or type(error).__name__}\n")
        sys.exit(kind)
