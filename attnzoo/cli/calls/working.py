"""``attnzoo convert`` and ``attnzoo compare``: what they are given, and which way a call goes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attnzoo.cli.manual.application import WORK, app
from attnzoo.cli.manual.help_page import Command
from attnzoo.cli.manual.options import (
    CALIBRATION,
    COMPUTING,
    SCORED,
    SPEC,
    Device,
    Dtype,
    JsonFlag,
    Model,
    Out,
    Threads,
    refuse_unused,
    using_threads,
    warn_unused,
)
from attnzoo.cli.policies import PolicyCall, compare_policies
from attnzoo.evaluation.compare import PRESETS, VariantSpec
from attnzoo.evaluation.two_phase.presets import POLICY_PRESETS

WHAT = "What is compared"
CONVERSION = "The conversion"


@app.command(
    cls=Command,
    rich_help_panel=WORK,
    epilog="""
    A window and a sink, in every block: attnzoo convert smollm2 --to mha:window=256,sink=4 --out windowed
    A cache of a third, calibrated: attnzoo convert smollm2 --to lowrank_gqa:method=latent,latent_dim=128 --out latent
    The upper layers alone: attnzoo convert smollm2 --to mha:window=256,sink=4 --where 8- --out upper
    """,
)
def convert(  # noqa: PLR0913  (a command line has one parameter for each option)
    context: typer.Context,
    model: Model,
    to: Annotated[
        str,
        typer.Option(metavar=SPEC, help="What the blocks become, and its options.", rich_help_panel=CONVERSION),
    ],
    out: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER", help="The folder to write; it appears whole or not at all.", rich_help_panel=CONVERSION
        ),
    ],
    calibrate: Annotated[
        str,
        typer.Option(
            metavar="TEXT", help="What is read where a conversion learns from text.", rich_help_panel=CALIBRATION
        ),
    ] = "devil",
    length: Annotated[
        int, typer.Option(metavar="TOKENS", help="Of a calibration window.", rich_help_panel=CALIBRATION)
    ] = 512,
    windows: Annotated[int, typer.Option(metavar="N", help="Calibration windows.", rich_help_panel=CALIBRATION)] = 16,
    where: Annotated[
        str | None,
        typer.Option(metavar="LAYERS", help="Which layers; all if not given.", rich_help_panel=CONVERSION),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    threads: Threads = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a folder that is not empty.", rich_help_panel=CONVERSION)
    ] = False,
    by_layers: Annotated[
        bool | None,
        typer.Option(
            "--by-layers/--whole",
            help="One layer in memory at a time, or the model; if neither is given, what fits.",
            rich_help_panel=COMPUTING,
        ),
    ] = None,
    run_in: Annotated[
        str,
        typer.Option(
            metavar="DTYPE",
            help="Of the calibration text's run by layers, as --dtype has them.",
            rich_help_panel=COMPUTING,
        ),
    ] = "auto",
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what it would take, and write nothing.", rich_help_panel=CONVERSION),
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Converts a model and saves it, with the files that lie beside its weights."""
    from attnzoo.cli.conversion.call import ConvertCall, convert_by_layers, convert_in_memory

    call = ConvertCall(
        model=model,
        spec=VariantSpec.parse(to, "to"),
        out=out,
        calibrate=calibrate,
        length=length,
        windows=windows,
        where=where,
        dtype=dtype,
        run_in=run_in,
        device=device,
        overwrite=overwrite,
    )
    call.check()
    if not call.spec.needs_calibration:
        warn_unused(context, ("calibrate", "length", "windows"), f"{to} reads no calibration text")
    with using_threads(threads):
        if call.by_layers(asked=True if dry_run else by_layers):
            convert_by_layers(call, dry_run=dry_run, as_json=as_json)
        else:
            convert_in_memory(call, as_json=as_json)


@app.command(
    cls=Command,
    rich_help_panel=WORK,
    epilog="""
    Windows of two widths: attnzoo compare smollm2 --variants mha:window=512,sink=4 --variants mha:window=256,sink=4
    A cache of a third: attnzoo compare smollm2 --variants lowrank_gqa:method=latent,latent_dim=128 --out third
    Two policies: attnzoo compare smollm2 --policy duo:keep=0.25,window=192 --policy snapkv:share=0.4
    """,
)
def compare(  # noqa: PLR0913  (a command line has one parameter for each option)
    context: typer.Context,
    model: Model,
    variants: Annotated[
        list[str] | None,
        typer.Option(metavar=SPEC, help="A conversion, or dense, the model as it is.", rich_help_panel=WHAT),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="POLICY:OPTION=VALUE,...",
            help="A policy of the KV cache; several at once are joined by +.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="PRESET",
            help=f"A named set of rows: {', '.join([*PRESETS, *POLICY_PRESETS])}.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    windows: Annotated[int, typer.Option(metavar="N", help="Windows to score.", rich_help_panel=SCORED)] = 1,
    offset: Annotated[
        int, typer.Option(metavar="TOKENS", help="Before the first window.", rich_help_panel=SCORED)
    ] = 1024,
    length: Annotated[int, typer.Option(metavar="TOKENS", help="In a window.", rich_help_panel=SCORED)] = 1024,
    text: Annotated[str, typer.Option(metavar="TEXT", help="What is scored.", rich_help_panel=SCORED)] = "botchan",
    calibrate: Annotated[
        str,
        typer.Option(
            metavar="TEXT",
            help="What is read where a conversion learns from text; another one than is scored.",
            rich_help_panel=CALIBRATION,
        ),
    ] = "devil",
    calibration_windows: Annotated[
        int, typer.Option(metavar="N", help="Of 512 tokens each.", rich_help_panel=CALIBRATION)
    ] = 16,
    decode_at: Annotated[
        list[int] | None,
        typer.Option(metavar="TOKENS", help="Time decoding behind so many tokens too.", rich_help_panel=SCORED),
    ] = None,
    passkeys: Annotated[
        int, typer.Option(metavar="N", help="Passkeys that policies are asked for.", rich_help_panel=SCORED)
    ] = 3,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    threads: Threads = None,
    out: Out = None,
    as_json: JsonFlag = False,
) -> None:
    """Compares conversions of a model on real text, or policies of its KV cache behind some of it.

    Conversions are scored in one forward over each window. Policies let go of something behind a context: they are
    scored by what the model says behind the windows. Small losses drown in the rounding of a dtype that is narrower
    than float32.
    """
    from attnzoo.cli.calls.comparing import CompareCall, compare_variants

    place = {"dtype": dtype, "device": device}
    if policy or preset in POLICY_PRESETS:
        why = "beside policies, which are scored in two phases"
        refuse_unused(context, dict.fromkeys(("variants", "decode_at", "calibrate", "calibration_windows"), why))
        behind = PolicyCall(
            model=model,
            policies=tuple(policy or ()),
            preset=preset,
            text=text,
            offset=offset,
            context=length,
            windows=windows,
            passkeys=passkeys,
            **place,
        )
        with using_threads(threads):
            compare_policies(behind, out=out, as_json=as_json)
        return
    call = CompareCall(
        model=model,
        variants=tuple(variants or ()),
        preset=preset,
        text=text,
        windows=(windows, length, offset),
        calibration=(calibrate, calibration_windows),
        decode_at=tuple(decode_at or ()),
        **place,
    )
    specs = call.specs()
    refuse_unused(context, {"passkeys": "but beside policies, which are asked for them"})
    if not any(spec.needs_calibration for spec in specs):
        warn_unused(context, ("calibrate", "calibration_windows"), "no row reads a calibration text")
    with using_threads(threads):
        compare_variants(call, specs, out=out, as_json=as_json)
