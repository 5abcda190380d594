"""From the words of a command line to an exit code."""

from __future__ import annotations

import os
import sys
import warnings

INTERRUPTED = 130
"""The exit code of a command that Ctrl-C has ended, as shells have it."""


def main() -> None:
    """Runs the command line.

    An error is one line on stderr: exit code 2 for a wrong call, 1 for a failure, 130 after Ctrl-C. A warning is one
    line on stderr too; nothing but results goes to stdout.
    """
    with warnings.catch_warnings():
        try:
            code = _run()
        except KeyboardInterrupt:
            code = INTERRUPTED
        if code == INTERRUPTED:
            sys.stderr.write("attnzoo: interrupted; what was not finished is not there\n")
    sys.exit(code)


def _run() -> int:
    """The exit code."""
    try:
        import typer

        from attnzoo.cli.app import app
        from attnzoo.cli.notices import show_warnings, usage
    except ModuleNotFoundError as error:
        return _fail(f"{error}; pip install 'attnzoo[cli,hf]'", 1)
    from attnzoo_kernels.errors import AttnzooError, ConfigError, UnsupportedError

    debug = "--debug" in sys.argv or os.environ.get("ATTNZOO_DEBUG") == "1"
    show_warnings()
    try:
        # A command gives nothing; what comes back is the code of an exit.
        return app(standalone_mode=False) or 0
    except typer.Abort as error:
        raise KeyboardInterrupt from error
    except (AttnzooError, OSError, ValueError, TypeError, ImportError) as error:
        if debug:
            raise
        kind = 2 if isinstance(error, ConfigError | UnsupportedError) else 1
        return _fail(str(error) or type(error).__name__, kind)
    except Exception as error:
        found = usage(error)
        if found is None:
            raise
        return _fail(*found)


def _fail(message: str, code: int) -> int:
    if message:
        sys.stderr.write(f"attnzoo: {' '.join(message.split())}\n")
    return code
