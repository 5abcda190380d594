"""The commands."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer

import attnzoo
from attnzoo.cli import screen, show_view
from attnzoo.cli.models import load_model, text_tokens
from attnzoo.cli.notices import Commands
from attnzoo.cli.policies import PolicyCall, compare_policies
from attnzoo.cli.progress import Bar
from attnzoo.evaluation.compare import PRESETS, Comparer, Comparison, VariantSpec
from attnzoo.evaluation.decoding import STEPS
from attnzoo.evaluation.model_scores import cut_windows
from attnzoo.evaluation.two_phase.presets import POLICY_PRESETS
from attnzoo.reporting.choices import check_choice
from attnzoo.reporting.outputs import check_writable
from attnzoo.reporting.tables import Grid
from attnzoo_kernels.errors import ConfigError

app = typer.Typer(
    cls=Commands,
    help="Attention variants: look at them, convert models to them, and see what is lost.",
    no_args_is_help=True,
)

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Model = Annotated[str, typer.Argument(help="A folder with safetensors, a .gguf file, or smollm2.")]


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Attention variants: look at them, convert models to them, and see what is lost."""
    if version:
        typer.echo(f"attnzoo {attnzoo.__version__}")
        raise typer.Exit


@app.command("list")
def list_command(
    pattern: Annotated[str, typer.Argument(help="A shell pattern.")] = "*", as_json: JsonFlag = False
) -> None:
    """Lists the variants."""
    about = show_view.summaries(pattern)
    if as_json:
        typer.echo(json.dumps(about, indent=2))
    else:
        screen.table(Grid(("variant", "what it is"), list(about.items())))


@app.command()
def show(variant: Annotated[str, typer.Argument(help="A variant's name.")], as_json: JsonFlag = False) -> None:
    """Shows a variant: its source, its options, what a conversion to it takes, and what it reads."""
    found = show_view.about(variant)
    if as_json:
        typer.echo(json.dumps(found, indent=2, default=str))
        return
    for paragraph in found["about"].split("\n\n"):
        screen.text(f"{paragraph}\n")
    for grid in show_view.grids(found):
        screen.table(grid)
        screen.text("")
    if found["conversion"] is None:
        screen.text("no conversion of a pretrained model")
    screen.text(show_view.limit(found))
    screen.text(f"what {variant} reads at small sizes, 96 tokens:")
    screen.picture(found["picture"])


@app.command()
def inspect(model: Model, as_json: JsonFlag = False) -> None:
    """Lists the attention blocks of a model, what each can be converted to, and why not to the rest."""
    from attnzoo import surgery

    found, _ = load_model(model)
    inspection = surgery.inspect(found)
    held = surgery.cache_bytes(found)
    if as_json:
        typer.echo(json.dumps({**inspection.to_dict(), "kv_bytes_per_token": held}, indent=2))
        return
    screen.table(replace(inspection.grid(), title=f"{model}: {held:,} KV bytes per token"))
    for note in inspection.notes():
        screen.text(note)


@app.command("heads")
def heads_command(  # noqa: PLR0913  (a command line has one parameter for each option)
    model: Model,
    score: Annotated[
        str,
        typer.Option(
            help="razor, which is induction and echo; one of these; previous, duplicate, far_mass, copying, successor; "
            "retrieval, of passkeys; or ablation, what a text loses by each, in minutes."
        ),
    ] = "razor",
    top: Annotated[int, typer.Option(help="How many heads of each kind to name.")] = 10,
    length: Annotated[
        int | None, typer.Option(help="Tokens of one copy, 200 if not given; of a passkey's prompt, 400.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of random tokens, passkeys and random heads.")] = 0,
    ablate: Annotated[
        str | None, typer.Option(help="Try the model without the best heads, such as top:10, beside random others.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the weights: float32, bfloat16, float16, float64, or auto, as they are stored.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="cpu, or cuda with or without a number.")] = "cpu",
    picture: Annotated[Path | None, typer.Option(help="Draw all heads' scores: a .png, .pdf or .svg.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write OUT.json, OUT.md and OUT.png.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Scores a model's attention heads: which repeat, which copy, which retrieve. No data is needed."""
    from attnzoo.cli.heads import HeadsCall, score_model

    call = HeadsCall(
        model=model, score=score, top=top, length=length, seed=seed, ablate=ablate, picture=picture, out=out
    )
    call.check()
    found, tokenizer = load_model(model, dtype=dtype, device=device)
    score_model(call, found, tokenizer, as_json=as_json)


@app.command()
def convert(  # noqa: PLR0913  (a command line has one parameter for each option)
    model: Model,
    to: Annotated[str, typer.Option(help="variant:option=value,...")],
    out: Annotated[Path, typer.Option(help="The folder to write; it appears whole or not at all.")],
    calibrate: Annotated[
        str, typer.Option(help="Calibration text: a file, or devil or botchan, which ship.")
    ] = "devil",
    length: Annotated[int, typer.Option(help="Tokens in a calibration window.")] = 512,
    windows: Annotated[int, typer.Option(help="Calibration windows.")] = 16,
    where: Annotated[str | None, typer.Option(help="Layers, such as 8- or 0,2,5-9; all if not given.")] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the weights: float32, bfloat16, float16, float64, or auto, as they are stored.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="cpu, or cuda with or without a number.")] = "cpu",
    overwrite: Annotated[bool, typer.Option(help="Replace a folder that is not empty.")] = False,
    by_layers: Annotated[
        bool | None,
        typer.Option("--by-layers/--whole", help="One layer in memory at a time, or the model; by default what fits."),
    ] = None,
    run_in: Annotated[
        str, typer.Option(help="Of the calibration text's run by layers: float32, ..., or auto.")
    ] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would take, and write nothing.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Converts a model and saves it, with the files that lie beside its weights."""
    from attnzoo.cli.conversion.call import ConvertCall, convert_by_layers, convert_in_memory

    spec = VariantSpec.parse(to)
    if not spec.conversions:
        raise ConfigError("to: expected a variant, got 'dense', which changes nothing")
    call = ConvertCall(
        model=model,
        spec=spec,
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
    if call.by_layers(asked=True if dry_run else by_layers):
        convert_by_layers(call, dry_run=dry_run, as_json=as_json)
    else:
        convert_in_memory(call, as_json=as_json)


@app.command()
def compare(  # noqa: PLR0913  (a command line has one parameter for each option)
    model: Model,
    variants_: Annotated[
        list[str] | None, typer.Option("--variants", help="dense, or variant:option=value,...; may be repeated.")
    ] = None,
    policy: Annotated[
        list[str] | None, typer.Option(help="A KV-cache policy, such as duo:keep=0.25,window=192; may be repeated.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help=f"A named set of rows: {', '.join([*PRESETS, *POLICY_PRESETS])}.")
    ] = None,
    windows: Annotated[int, typer.Option(help="Windows to score.")] = 1,
    offset: Annotated[int, typer.Option(help="Tokens before the first window.")] = 1024,
    length: Annotated[int, typer.Option(help="Tokens in a window.")] = 1024,
    text: Annotated[str, typer.Option(help="Text to score: a file, or botchan or devil, which ship.")] = "botchan",
    calibrate: Annotated[str, typer.Option(help="Calibration text, another one.")] = "devil",
    calibration_windows: Annotated[int, typer.Option(help="Calibration windows of 512 tokens.")] = 16,
    decode_at: Annotated[
        list[int] | None, typer.Option(help="Time decoding behind so many tokens too; may be repeated.")
    ] = None,
    passkeys: Annotated[int, typer.Option(help="Passkeys that policies are asked for.")] = 3,
    out: Annotated[Path | None, typer.Option(help="Write OUT.json, OUT.md and OUT.png.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Compares conversions of a model on real text, or KV-cache policies behind some of it.

    Conversions are scored in one forward over each window. Policies let go of something behind a context: they are
    scored by what the model says behind the windows.
    """
    if policy or preset in POLICY_PRESETS:
        if variants_ or decode_at:
            name = "variants" if variants_ else "decode_at"
            raise ConfigError(f"{name}: expected nothing beside policies, which are scored in two phases")
        call = PolicyCall(
            model=model,
            policies=tuple(policy or ()),
            preset=preset,
            text=text,
            offset=offset,
            context=length,
            windows=windows,
            passkeys=passkeys,
        )
        compare_policies(call, out=out, as_json=as_json)
        return
    specs = _specs(variants_, preset)
    if out is not None:
        check_writable(out)
    needed = any(spec.needs_calibration for spec in specs)
    if needed and text == calibrate:
        raise ConfigError(f"calibrate: expected another text than the one scored, got {text!r} for both")
    # Certificates and small losses drown in the rounding of narrower weights.
    found, tokenizer = load_model(model, dtype="float32")
    tokens = text_tokens(tokenizer, text)
    scored = cut_windows(tokens, length=length, offset=offset, count=windows)
    longer = [cut_windows(tokens, length=more, offset=offset, count=1)[0] for more in _longer(decode_at, length)]
    about = {"model": model, "text": text, "offset": offset}
    calibration = None
    if needed:
        calibration = cut_windows(text_tokens(tokenizer, calibrate), length=512, offset=0, count=calibration_windows)
        about |= {"calibration": calibrate, "calibration_tokens": calibration.numel()}
    with Bar() as progress:
        comparison = Comparer(found, scored, calibration, progress=progress, longer=longer).run(specs, about)
    _tell(comparison, out, as_json=as_json)
    failed = [row.name for row in comparison.rows if "CERTIFICATE FAILS" in row.flags]
    if failed:
        raise typer.Exit(1)


@app.command()
def bench(  # noqa: PLR0913  (a command line has one parameter for each option)
    variants_: Annotated[
        list[str] | None, typer.Option("--variants", help="variant:option=value,...; may be repeated.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of a sequence, and nearly all that a step has behind it.")] = 2048,
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    dim: Annotated[int, typer.Option(help="The layer's width.")] = 512,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 8,
    kv_heads: Annotated[int | None, typer.Option(help="KV heads; as many as query heads if not given.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, float64, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, or cuda with or without a number.")] = "cpu",
    impl: Annotated[str, typer.Option(help="auto, or one implementation by name.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads; torch's own number if not given.")] = None,
    seconds: Annotated[float, typer.Option(help="About how long each figure is measured.")] = 1.0,
    out: Annotated[Path | None, typer.Option(help="Write OUT.json, OUT.md and OUT.png.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Measures layers on this machine beside ten lines of torch, in turns; correctness first."""
    import torch

    from attnzoo.doctor import IMPLEMENTATIONS
    from attnzoo.evaluation import cost_setting, costs_report, layer_costs

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
    if threads is not None:
        if threads < 1:
            raise ConfigError(f"threads: expected at least 1, got {threads}")
        torch.set_num_threads(threads)
    if out is not None:
        check_writable(out)
    check_choice("impl", impl, ("auto", *IMPLEMENTATIONS))
    where = costs_report.about(setting)
    with Bar() as progress:
        found = layer_costs.measure(setting, variants_ or list(layer_costs.SPECS), progress)
    if out is not None:
        costs_report.write(found, where, out)
    if as_json:
        typer.echo(costs_report.to_json(found, where), nl=False)
    else:
        screen.table(costs_report.grid(found, where))
        for cost in found:
            if cost.problem is not None:
                screen.text(f"{cost.name}: {cost.problem}")
        if out is not None:
            screen.text(f"written: {out}.json, .md, .png")
    if any(cost.problem is not None for cost in found):
        raise typer.Exit(1)


@app.command()
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


def _longer(decode_at: list[int] | None, length: int) -> list[int]:
    """The lengths of prompts behind which decoding is timed too, ascending.

    Raises:
        ConfigError: If one leaves no room for the steps behind a window.
    """
    found = sorted(set(decode_at or []))
    for shorter, more in pairwise([length, *found]):
        if more < shorter + STEPS:
            raise ConfigError(f"decode_at: expected at least {STEPS} tokens more than {shorter}, got {more}")
    return found


def _tell(comparison: Comparison, out: Path | None, *, as_json: bool) -> None:
    """Writes and prints a comparison."""
    from attnzoo.evaluation import compare_report

    if out is not None:
        compare_report.write(comparison, out)
    if as_json:
        typer.echo(compare_report.to_json(comparison), nl=False)
        return
    screen.table(compare_report.grid(comparison))
    for grid in compare_report.long_grids(comparison):
        screen.text("")
        screen.table(grid)
    if out is not None:
        screen.text(f"written: {out}.json, .md, .png")


def _specs(texts: list[str] | None, preset: str | None) -> list[VariantSpec]:
    if preset is not None:
        check_choice("preset", preset, [*PRESETS, *POLICY_PRESETS])
    chosen: list[Any] = list(PRESETS[preset]) if preset is not None else []
    chosen += [VariantSpec.parse(text) for text in texts or []]
    if not chosen:
        raise ConfigError("variants: expected --variants, --policy or --preset, got none of them")
    return chosen
