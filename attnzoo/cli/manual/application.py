"""The command line that commands are added to, and what is said before any of them."""

from __future__ import annotations

from typing import Annotated

import typer

import attnzoo
from attnzoo.cli.manual.help_page import Commands

app = typer.Typer(
    cls=Commands,
    # Each press of a key would wait for torch to be imported.
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    epilog="""
    Which variants there are: attnzoo list
    What one of them does, its options, and a picture: attnzoo show s2
    What a model's attention can become: attnzoo inspect smollm2
    What a window of 256 tokens would lose: attnzoo compare smollm2 --variants mha:window=256,sink=4
    A model that has it: attnzoo convert smollm2 --to mha:window=256,sink=4 --out windowed
    Whether this machine computes right: attnzoo doctor
    """,
)

LOOK = "Look at variants and policies"
WORK = "Work with a model"
MACHINE = "This machine"


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")] = False,
) -> None:
    """Attention variants: look at them, convert models to them, and see what is lost."""
    if version:
        typer.echo(f"attnzoo {attnzoo.__version__}")
        raise typer.Exit
