"""The process of one row of :mod:`bench.policies.costs`: an order as JSON in a file, a cost as JSON on stdout."""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnzoo import policies
from attnzoo.cli.models import load_model, text_tokens
from attnzoo.evaluation.decoding import twin_of
from attnzoo.evaluation.two_phase.readers import PolicyReader
from attnzoo.evaluation.two_phase.scores import DenseReader, Reader
from bench.policies.costs import Cost, StepCost
from bench.policies.setting import quick_setting
from bench.step.decoder import Decoder
from bench.step.measure import take_turns


def resident(field: str) -> int:
    """Bytes of ``VmRSS`` or ``VmHWM`` of this process.

    ``ru_maxrss`` would say the parent's where that is larger: it outlives the start of another program.
    """
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{field}: expected a line of /proc/self/status")


def forget_peak() -> None:
    """Begins the count of ``VmHWM`` anew: loading a model takes more than reading a text does."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def load(order: dict[str, Any]) -> tuple[Any, Tensor]:
    """The model, and the text ``[1, L]``."""
    if order["quick"]:
        setting = quick_setting()
        return setting.model, setting.long
    model, tokenizer = load_model("smollm2", dtype="fp32")
    return model, text_tokens(tokenizer, "botchan")[None]


def step_cost(ours: Decoder, dense: Decoder, rounds: int) -> StepCost:
    """A step of ours beside the dense model's, and beside one behind next to nothing."""
    tokens = ours.at
    bare = Decoder(dense.model, dense.text, None)
    bare.read(1)
    found = take_turns((ours.step, dense.step, bare.step), rounds)
    mine, theirs, empty = (statistics.median(times) for times in found)
    ratio = statistics.median(a / b for a, b in zip(found[0], found[1], strict=True))
    return StepCost(tokens, mine, theirs, ratio, (mine - empty) / max(theirs - empty, 1e-9))


def read(reader: Reader, text: Tensor, tokens: int) -> Decoder:
    """A model behind so many tokens of a text ``[1, L]``, compacted."""
    decoder = Decoder(reader.model, text, reader.new_cache())
    decoder.read(tokens)
    reader.compact(cache_in(decoder))
    return decoder


def cache_in(decoder: Decoder) -> Any:
    """The cache."""
    return next(iter(decoder.cache.values()))


def measure(reader: Reader, dense_model: Any, text: Tensor, order: dict[str, Any]) -> Cost:
    """Reads the longest length, says what that took, and decodes behind both."""
    forget_peak()
    start = resident("VmRSS")
    shorter, longest = order["lengths"]
    decoder = read(reader, text, longest)
    memory = {"peak_bytes": resident("VmHWM"), "resident_bytes": resident("VmRSS"), "start_bytes": start}
    held = reader.held(cache_in(decoder))
    places = {length: Path(order["folder"]) / f"dense-{length}.pt" for length in order["lengths"]}
    steps = []
    for own in (decoder, read(reader, text, shorter)):
        if reader.policy is None:
            torch.save(cache_in(own), places[own.at])
        dense = Decoder(dense_model, text, torch.load(places[own.at], weights_only=False))
        dense.at = own.at
        steps.append(step_cost(own, dense, order["rounds"]))
    return Cost(
        name=order["name"],
        tokens=longest,
        held_bytes=held.rows,
        dense_bytes=held.dense,
        pool_bytes=held.room,
        read_bytes=held.read,
        steps=steps[::-1],
        **memory,
    )


def main(file: Path) -> None:
    """Carries out an order."""
    order = json.loads(file.read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    model, text = load(order)
    if order["policy"] is None:
        cost = measure(DenseReader(model), model, text, order)
    else:
        # A second model of the same weights stays as it is.
        dense_model = twin_of(model)
        with policies.applied(model, policies.policy_from(order["policy"])) as run:
            cost = measure(PolicyReader(run), dense_model, text, order)
    print(json.dumps(asdict(cost)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
