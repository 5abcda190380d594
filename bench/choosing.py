"""Tables of the page that helps to choose, from committed results; ``python -m bench.pages`` writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# What a reader chooses between; rows that are checks or controls of other tables are left out.
CONVERSIONS = (
    "dense",
    "sink 4 + window 256",
    "window 256 without sink",
    "s2 with sink",
    "longheads 512",
    "latent 192",
    "latent 128",
    "commuting 3->1",
    "mean_pool 3->1",
    "moh, 7 of 9 heads",
    "landmarks without gates",
    "rcmha, untrained",
)
STEPS = ("1k", "4k")
LONG = ("dense", "window 4096", "window 4096, sink 4", "longheads 2048, chunks of 256", "longheads 4096, chunks of 256")
FAR = "12,288"
HELD = (
    "dense",
    "duo: 40 %",
    "duo + snapkv: 40 %",
    "snapkv: 40 %",
    "streaming: 40 %",
    "pages: 40 %",
    "duo: 20 %",
    "duo + snapkv: 20 %",
    "snapkv: 20 %",
    "streaming: 20 %",
)


def blocks(results: Path) -> dict[str, list[str]]:
    """The lines of each table by the name of its block."""
    return {
        "conversions": conversions(_read(results, "smollm2-demo")),
        "steps": steps([_read(results, f"smollm2-step-{length}") for length in STEPS]),
        "long": long(_read(results, "smollm2-longheads")),
        "policies": policies(_read(results, "policies")),
    }


def conversions(found: dict[str, Any]) -> list[str]:
    """What conversions without training cost in quality and bytes."""
    rows = {row["name"]: row for row in found["rows"]}
    dense = rows["dense"]
    lines = _table("conversion", "perplexity x dense", "cache held x dense", "cache read x dense")
    for name in CONVERSIONS:
        row = rows[name]
        ratio = f"{row['ratio']:.2f}" if row["ratio"] < 10 else f"{row['ratio']:.0f}"
        shares = [f"{row[key] / dense[key]:.2f}" for key in ("kv_bytes_held", "kv_bytes_read")]
        lines.append(_row(name, ratio, *shares))
    about = found["about"]
    count, length = about["windows"]
    return [
        *lines,
        "",
        f"SmolLM2-135M-Instruct in fp32, {count} window of {length:,} tokens of *Botchan*, nothing trained "
        "(`bench/results/smollm2-demo.md`; `make demo`). Held: bytes for each token in the variant's cache that keeps "
        "everything; read: what a step at the end of the window reads of them.",
    ]


def steps(found: list[dict[str, Any]]) -> list[str]:
    """A decoding step of converted models."""
    lengths = [rows["rows"][0]["tokens"] for rows in found]
    lines = _table("conversion", *(f"step behind {length:,}" for length in lengths), f"cache behind {lengths[-1]:,}")
    by_name = [{row["name"]: row for row in rows["rows"]} for rows in found]
    for name, last in by_name[-1].items():
        ratios = [f"{rows[name]['ratio']:.2f}" if name in rows else "" for rows in by_name]
        lines.append(_row(name, *ratios, f"{last['cache_bytes'] / last['token_bytes']:.2f}"))
    return [
        *lines,
        "",
        "Times over transformers' sdpa with its `DynamicCache` in the same rounds, below 1 is quicker; the cache's "
        f"bytes over those of all keys and values. SmolLM2-135M, {_machine(found[-1])} "
        "(`bench/results/smollm2-step-4k.md`; `python -m bench.step`).",
    ]


def long(found: dict[str, Any]) -> list[str]:
    """Perplexity far beyond the trained length."""
    rows = {row["name"]: row for row in found["rows"]}
    lines = _table("what is read", "first 2,048 tokens", f"from {FAR} on", "keys a step")
    for name in LONG:
        row = rows[name]
        lines.append(_row(name, f"{row['perplexity'][0]:.1f}", f"{row['far']:.1f}", f"{row['keys']:,}"))
    return [
        *lines,
        "",
        f"Perplexity of SmolLM2-135M on {found['about']['tokens']:,} tokens of *Botchan*, nothing trained "
        "(`bench/results/smollm2-longheads.md`; `python -m bench.longheads`).",
    ]


def policies(found: dict[str, Any]) -> list[str]:
    """What is left of a cache, and what a model still knows behind it."""
    rows = {row["name"]: row for row in found["rows"]}
    dense = rows["dense"]
    lines = _table("policy", "held", "read", "text", "recall", "keys right")
    for name in HELD:
        row = rows[name]
        shares = [f"{row[key]:.2f}" for key in ("held_share", "read_share")]
        nats = [f"{row[key] - dense[key]:+.2f}" for key in ("text", "recall")]
        lines.append(_row(name, *shares, *nats, f"{row['keys_right']} of {row['keys_asked']}"))
    return [
        *lines,
        "",
        "Held and read: over the dense model's. Text, recall: nats per token above the dense model's, of the text "
        f"going on and of spans of the context word for word. SmolLM2-135M, {_machine(found)} "
        "(`bench/results/policies.md`; `python -m bench.policies`).",
    ]


def _read(results: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((results / f"{name}.json").read_text(encoding="utf-8"))
    return found


def _machine(found: dict[str, Any]) -> str:
    about = found["about"]
    return (
        f"{about['cpu']}, class {about['class']}, threads: {about['threads']}, torch {about['torch']}, {about['date']}"
    )


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _table(*head: str) -> list[str]:
    return [_row(*head), _row(*["---"] * len(head))]
