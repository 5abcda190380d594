"""From the words of a command line to an exit code."""

from __future__ import annotations

import io
import json
import os
import sys
import warnings

INTERRUPTED = 130
"""The exit code of a command that Ctrl-C has ended, as shells have it."""

UNREAD = 141
"""The exit code where what reads the output has gone, such as ``head``, as shells have it."""


def main() -> None:
    """Runs the command line.

    An error is one line on stderr: exit code 2 for a wrong call, 1 for a failure, 130 after Ctrl-C. A warning is one
    line on stderr too; nothing but results goes to stdout. With ``--json`` an error is a JSON value on stdout as well.
    """
    for stream in (sys.stdout, sys.stderr):
        # A terminal or a file of a narrow encoding shows "?" for a sign that it has not.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    with warnings.catch_warnings():
        try:
            code = _run()
        except KeyboardInterrupt:
            code = INTERRUPTED
        except (BrokenPipeError, SystemExit) as ended:
            # The parser ends with a code of its own where it is the one that writes.
            if not isinstance(ended, BrokenPipeError) and not isinstance(ended.__context__, BrokenPipeError):
                raise
            code = UNREAD
            # What is left in the buffer has nowhere to go either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if code == INTERRUPTED:
            # Some releases of the parser give the code and raise nothing.
            _fail("interrupted; what was not finished is not there", code)
    sys.exit(code)


def _run() -> int:
    """The exit code."""
    try:
        import typer
        import typer.main

        from attnzoo.cli.app import app
        from attnzoo.cli.manual.wrong_calls import usage
        from attnzoo.cli.notices import show_warnings
    except ModuleNotFoundError as error:
        return _fail(f"{error}; pip install 'attnzoo[cli,hf]'", 1)
    from attnzoo_kernels.errors import AttnzooError, ConfigError, UnsupportedError

    debug = "--debug" in sys.argv or os.environ.get("ATTNZOO_DEBUG") == "1"
    show_warnings()
    group = typer.main.get_command(app)
    try:
        # A command gives nothing; what comes back is the code of an exit.
        return group(standalone_mode=False, prog_name="attnzoo") or 0
    except typer.Abort as error:
        raise KeyboardInterrupt from error
    except BrokenPipeError:
        raise
    except (AttnzooError, OSError, ValueError, TypeError, ImportError) as error:
        if debug:
            raise
        kind = 2 if isinstance(error, ConfigError | UnsupportedError) else 1
        return _fail(str(error) or type(error).__name__, kind)
    except Exception as error:
        found = usage(error, sys.argv[1:], group)
        if found is not None:
            return _fail(*found)
        if debug:
            raise
        return _fail(f"{type(error).__name__}: {error}; attnzoo --debug {' '.join(sys.argv[1:])} shows where", 1)


def _fail(message: str, code: int) -> int:
    line = " ".join(message.split())
    if line:
        sys.stderr.write(f"attnzoo: {line}\n")
    if line and "--json" in sys.argv:
        sys.stdout.write(json.dumps({"error": line, "exit_code": code}, indent=2) + "\n")
    return code
