"""The commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from attnzoo.cli import screen, show_view
from attnzoo.cli.calls import working as working
from attnzoo.cli.manual.application import LOOK, MACHINE, WORK
from attnzoo.cli.manual.application import app as app
from attnzoo.cli.manual.help_page import Command
from attnzoo.cli.manual.options import (
    COMPUTING,
    RESULTS,
    SPEC,
    Device,
    Dtype,
    JsonFlag,
    Model,
    Out,
    Threads,
    using_threads,
)
from attnzoo.cli.models import load_model
from attnzoo.cli.progress import Bar
from attnzoo.reporting.tables import Grid

SIZES = "What is measured"


@app.command(
    "list",
    cls=Command,
    rich_help_panel=LOOK,
    epilog="""
    All variants: attnzoo list
    Those that begin with lo, for machines: attnzoo list "lo*" --json
    What compare --policy takes: attnzoo list --policies
    """,
)
def list_command(
    pattern: Annotated[str, typer.Argument(metavar="PATTERN", help="A shell pattern, such as 'lo*'.")] = "*",
    policies: Annotated[bool, typer.Option("--policies", help="List policies of KV caches instead.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Lists the variants, or the policies of KV caches."""
    about = show_view.policy_summaries(pattern) if policies else show_view.summaries(pattern)
    if as_json:
        typer.echo(json.dumps(about, indent=2))
    else:
        screen.table(Grid(("policy" if policies else "variant", "what it is"), list(about.items())))


@app.command(
    cls=Command,
    rich_help_panel=LOOK,
    epilog="""
    A variant: attnzoo show s2
    A policy of KV caches: attnzoo show snapkv
    """,
)
def show(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A variant or a policy; attnzoo list prints their names.")
    ],
    as_json: JsonFlag = False,
) -> None:
    """Shows a variant or a policy: its source, what each option does, and where its page is.

    Of a variant also what a conversion to it takes, and a picture of what it reads.
    """
    found = show_view.about(name)
    if as_json:
        typer.echo(json.dumps(found, indent=2, default=str))
    else:
        show_view.show(found)


@app.command(
    cls=Command,
    rich_help_panel=WORK,
    epilog="""
    Every block and what it can become: attnzoo inspect smollm2
    """,
)
def inspect(model: Model, as_json: JsonFlag = False) -> None:
    """Lists the attention blocks of a model, what each can be converted to, and why not to the rest.

    A model without a block that is known is a finding: the exit code is 1.
    """
    from attnzoo.cli.calls.inspecting import inspect_model

    found, _ = load_model(model)
    inspect_model(model, found, as_json=as_json)


@app.command(
    "heads",
    cls=Command,
    rich_help_panel=WORK,
    epilog="""
    Heads that repeat what stood there before: attnzoo heads smollm2
    What the model loses without the ten best: attnzoo heads smollm2 --score induction --ablate top:10
    A map of all heads: attnzoo heads smollm2 --picture heads.png
    """,
)
def heads_command(  # noqa: PLR0913  (a command line has one parameter for each option)
    model: Model,
    score: Annotated[
        str,
        typer.Option(
            metavar="SCORE",
            help="razor, which is induction and echo; one of these; previous, duplicate, far_mass, copying, successor; "
            "retrieval, of passkeys; or ablation, what a text loses by each, in minutes.",
            rich_help_panel=SIZES,
        ),
    ] = "razor",
    top: Annotated[
        int, typer.Option(metavar="N", help="How many heads of each kind to name.", rich_help_panel=RESULTS)
    ] = 10,
    length: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS",
            help="Of one copy, 200 if not given; of a passkey's prompt, 400.",
            rich_help_panel=SIZES,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(metavar="N", help="Of random tokens, passkeys and random heads.", rich_help_panel=SIZES)
    ] = 0,
    ablate: Annotated[
        str | None,
        typer.Option(
            metavar="top:N",
            help="Try the model without the best heads, such as top:10, beside random others.",
            rich_help_panel=SIZES,
        ),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    threads: Threads = None,
    picture: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw all heads' scores: a .png, .pdf or .svg.", rich_help_panel=RESULTS),
    ] = None,
    out: Out = None,
    as_json: JsonFlag = False,
) -> None:
    """Scores a model's attention heads: which repeat, which copy, which retrieve. No data is needed."""
    from attnzoo.cli.heads import HeadsCall, score_model

    call = HeadsCall(
        model=model, score=score, top=top, length=length, seed=seed, ablate=ablate, picture=picture, out=out
    )
    call.check()
    with using_threads(threads):
        found, tokenizer = load_model(model, dtype=dtype, device=device)
        score_model(call, found, tokenizer, as_json=as_json)


@app.command(
    cls=Command,
    rich_help_panel=MACHINE,
    epilog="""
    Every variant, in some minutes: attnzoo bench
    Two of them at 1,024 tokens: attnzoo bench --variants mha --variants s2:local_blocks=4 --tokens 1024
    """,
)
def bench(  # noqa: PLR0913  (a command line has one parameter for each option)
    variants: Annotated[
        list[str] | None,
        typer.Option(metavar=SPEC, help="A layer; every variant if none is given.", rich_help_panel=SIZES),
    ] = None,
    tokens: Annotated[
        int,
        typer.Option(
            metavar="N", help="Of a sequence, and nearly all that a step has behind it.", rich_help_panel=SIZES
        ),
    ] = 2048,
    batch: Annotated[int, typer.Option(metavar="N", help="Sequences.", rich_help_panel=SIZES)] = 1,
    dim: Annotated[int, typer.Option(metavar="N", help="The layer's width.", rich_help_panel=SIZES)] = 512,
    heads: Annotated[int, typer.Option(metavar="N", help="Query heads.", rich_help_panel=SIZES)] = 8,
    kv_heads: Annotated[
        int | None,
        typer.Option(metavar="N", help="KV heads; as many as query heads if not given.", rich_help_panel=SIZES),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="DTYPE",
            help="Of inputs and weights: float32, float64, bfloat16 or float16, also fp32, fp64, bf16, fp16.",
            rich_help_panel=COMPUTING,
        ),
    ] = "float32",
    device: Device = "cpu",
    impl: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="auto, or one implementation: reference, blocked, triton.", rich_help_panel=COMPUTING
        ),
    ] = "auto",
    threads: Threads = None,
    seconds: Annotated[
        float, typer.Option(metavar="S", help="About how long each figure is measured.", rich_help_panel=COMPUTING)
    ] = 1.0,
    out: Out = None,
    as_json: JsonFlag = False,
) -> None:
    """Measures layers on this machine beside ten lines of torch, in turns; correctness first."""
    from attnzoo.cli.calls.measuring import measure_layers
    from attnzoo.evaluation import cost_setting

    setting = cost_setting.CostSetting(
        tokens=tokens,
        batch=batch,
        dim=dim,
        num_heads=heads,
        num_kv_heads=kv_heads,
        dtype=cost_setting.read_dtype(dtype),
        device=cost_setting.read_device(device),
        impl=impl,
        seconds=seconds,
    )
    with using_threads(threads):
        measure_layers(setting, variants, out=out, as_json=as_json)


@app.command(
    cls=Command,
    rich_help_panel=MACHINE,
    epilog="""
    What runs here, and whether it computes right: attnzoo doctor
    What runs here, at once: attnzoo doctor --no-test
    """,
)
def doctor(
    test: Annotated[
        bool, typer.Option("--test/--no-test", help="Run each implementation against the reference.")
    ] = True,
    as_json: JsonFlag = False,
) -> None:
    """Says what is installed, what runs on which device and why nothing else, and whether it computes right."""
    from attnzoo.cli.doctor_view import show as show_report
    from attnzoo.doctor import diagnose

    with Bar() as progress:
        report = diagnose(test=test, progress=progress)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        show_report(report)
    if report.wrong:
        raise typer.Exit(1)
