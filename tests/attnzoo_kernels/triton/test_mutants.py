"""Wrong Triton kernels on purpose: a few probes that the right ones pass must fail on every one of them.

A mutant is a copy of the kernels' modules in which one piece of text is another, loaded beside the real ones.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from attnzoo_kernels import dispatch
from attnzoo_kernels._triton import launch
from attnzoo_kernels._triton.tile_table import tiles_for
from tests.attnzoo_kernels.op.test_switches import assert_is, solved, switched
from tests.attnzoo_kernels.oracle import Problem
from tests.attnzoo_kernels.oracle_switches import Switched
from tests.attnzoo_kernels.triton.interpreted import only_interpreted, stepped
from tests.strategies import Numbers

pytestmark = only_interpreted

MODULES = ("primitives", "forward", "block_lists", "backward", "specialize", "launch")
SOURCE = Path(launch.__file__).parent


def numbers(seed: int, *, heads: int = 4, queries: int = 19, keys: int = 29, **rule: Any) -> Problem:
    """A call of few tiles whose layout differs between groups and is not symmetric."""
    n = Numbers.of(seed)
    fields = {"block_q": 16, "block_k": 10, **rule}
    grid = (-(-queries // fields["block_q"]), -(-keys // fields["block_k"]))
    keep = n.chance(0.7, 1, 2, *grid)
    keep[..., -1, 0], keep[..., 0, -1] = True, False
    shapes = ((heads, queries, 6), (2, keys, 6), (2, keys, 3))
    q, k, v = (n.normal(1, *shape) for shape in shapes)
    return Problem(q, k, v, **{"keep": keep, **fields})


def plain(p: Problem) -> Switched:
    return switched(p, 1, aux=False, rope=False, gate=None, mix=1.0)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@functools.cache
def probes() -> dict[str, Switched]:
    """Calls by name."""
    bias = Numbers.of(5).normal(1, 4, 29)
    bias[:, 1, :12] = -math.inf
    q_pos = torch.arange(19, dtype=torch.int32).view(1, 1, 19) + 10
    q_pos[..., ::3] = -1
    one = torch.ones(1, 1, 1, 3, dtype=torch.bool)
    n = Numbers.of(11)
    wide = {"q": n.normal(1, 4, 19, 20), "k": n.normal(1, 2, 29, 20), "v": n.normal(1, 2, 29, 18)}
    return {
        "causal": plain(numbers(1)),
        "full": plain(numbers(2, causal=False, block_k=16)),
        "full causal": plain(numbers(2, block_k=16)),
        "early rows": plain(numbers(3, queries=29, heads=2, block_q=32, window=2, sink=9)),
        "window": plain(numbers(3, window=ints(3, 12, 5, 30), sink=2)),
        "one window": plain(numbers(4, window=9, causal=False, sink=4)),
        "bias": plain(numbers(5, key_bias=bias)),
        "absent": plain(numbers(6, q_pos=q_pos)),
        "origins": switched(numbers(7, block_k=16), 7, aux=True, rope=True, gate=None, mix=1.0),
        "landmarks": switched(numbers(8), 4, aux=False, rope=False, gate="last", mix=0.6),
        "gate keys": switched(numbers(9, block_k=16), 7, aux=False, rope=True, gate="tensor", mix=0.6),
        "decoding": plain(numbers(10, queries=1, keep=one)),
        "wide": switched(numbers(11, block_k=16).change(**wide), 7, aux=True, rope=True, gate=None, mix=1.0),
    }


@functools.cache
def truth(name: str) -> dict[str, torch.Tensor]:
    """What the oracle says of one, whose loops take a while."""
    return solved(probes()[name])


def load(folder: Path, edits: dict[str, dict[str, str]]) -> ModuleType:
    """The launcher of a mutant."""
    stem = f"mutant_{folder.name}"
    for module in MODULES:
        text = (SOURCE / f"{module}.py").read_text("utf-8")
        for old, new in edits.get(module, {}).items():
            assert text.count(old) >= 1, f"{module} does not hold {old!r}: the mutant needs a new place"
            text = text.replace(old, new)
        for other in MODULES:
            text = text.replace(f"attnzoo_kernels._triton.{other} import", f"{stem}_{other} import")
        path = folder / f"{module}.py"
        path.write_text(text, "utf-8")
        spec = importlib.util.spec_from_file_location(f"{stem}_{module}", path)
        assert spec is not None and spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = loaded
        spec.loader.exec_module(loaded)
    return sys.modules[f"{stem}_launch"]


Mutant = tuple[str, dict[str, dict[str, str]]]
MUTANTS: dict[str, Mutant] = {
    "causality shows the next key": ("causal", {"primitives": {"        hi = pos + 1\n": "        hi = pos + 2\n"}}),
    "causality hides the own key": ("causal", {"primitives": {"        hi = pos + 1\n": "        hi = pos\n"}}),
    "a window that starts one key early": ("window", {"primitives": {"lo = pos - wide + 1": "lo = pos - wide"}}),
    "a window that ends one key late": ("one window", {"primitives": {"hi = pos + wide": "hi = pos + wide + 1"}}),
    "a sink without causality": (
        "early rows",
        {"primitives": {"sink = tl.minimum(sink, pos + 1)": "sink = sink"}},
    ),
    "windows of the first head for all": (
        "window",
        {"primitives": {"optional.windows + head": "optional.windows + head * 0"}},
    ),
    "a tail of keys that are not there": (
        "full",
        {
            "primitives": {
                "tl.minimum(tl.maximum(hi, 0), sizes.seq_k), 0)": "tl.maximum(hi, 0), 0)",
                "hi = tl.zeros_like(pos) + sizes.seq_k": "hi = tl.zeros_like(pos) + sizes.seq_k + 3",
            }
        },
    ),
    "the next block read with this one": ("causal", {"primitives": {"if c.BLOCK_K % c.BN != 0": "if False"}}),
    "partial blocks without a mask": (
        "full causal",
        {"specialize": {"full = lists.full if split else lists.start": "full = lists.end"}},
    ),
    "absent rows taken as present": (
        "absent",
        {
            "primitives": {
                "valid = valid & (pos >= 0)": "valid = valid & (pos >= -9)",
                "tl.where(pos < 0, -1, ": "tl.where(pos < -9, -1, ",
            },
            "forward": {"live = state.l_i > 0": "live = state.l_i > -1"},
        },
    ),
    "no rescale when the maximum rises": (
        "causal",
        {
            "forward": {
                "product(p.to(v.dtype), v, state.acc * alpha[:, None]": "product(p.to(v.dtype), v, state.acc",
            }
        },
    ),
    "the sum of weights not rescaled": ("causal", {"forward": {"state.l_i * alpha + tl": "state.l_i + tl"}}),
    "log-sum-exp of empty rows 0": ("absent", {"forward": {'* LN2, -float("inf"))\n    row': "* LN2, 0.0)\n    row"}}),
    "log-sum-exp to base two": ("causal", {"forward": {"1.0))) * LN2, -f": "1.0))), -f"}}),
    "no delta": ("causal", {"backward": {"p * (dp - kept(delta, AXIS))": "p * dp"}}),
    "the gradient of the log-sum-exp lost": ("causal", {"backward": {"if dlse is not None": "if False"}}),
    "dK without the scale": ("causal", {"backward": {"dk_acc * natural": "dk_acc"}}),
    "dQ without the scale": ("causal", {"backward": {"store_rows(dq, dq_acc * natural": "store_rows(dq, dq_acc"}}),
    "heads on KV heads by remainder": (
        "causal",
        {
            "forward": {"return b, h // c.PER, h": "return b, h % sizes.groups, h"},
            "specialize": {"pack_gqa = per if": "pack_gqa = 1 if"},
        },
    ),
    "lists of heads by remainder": (
        "causal",
        {
            "primitives": {"+ h // c.PER\n    return index": "+ h % groups\n    return index"},
            "specialize": {"pack_gqa = per if": "pack_gqa = 1 if"},
        },
    ),
    "transposed lists that are not": (
        "causal",
        {"block_lists": {"keys = _sorted(column,": "keys = _sorted(entries.row % (blocks_k * batch * heads),"}},
    ),
    "bias scaled twice": ("bias", {"primitives": {".to(c.ACC) * LOG2E\n": ".to(c.ACC) * LOG2E * 2\n"}}),
    "the bias of the first head for all": (
        "bias",
        {"primitives": {"index_of(b, h, groups, c.BIAS": "index_of(b, h * 0, groups, c.BIAS"}},
    ),
    "the own block gated": (
        "landmarks",
        {"primitives": {"shift = tl.where(own, 0.0, ": "shift = tl.where(own & False, 0.0, "}},
    ),
    "landmarks read as ordinary keys": ("landmarks", {"primitives": {"keep = keep & (last == 0)": "keep = keep"}}),
    "the gradient of landmarks lost": (
        "landmarks",
        {"backward": {"kept(dgate, AXIS), ds)": "kept(dgate * 0, AXIS), ds)"}},
    ),
    "the gradient of gates unmixed": (
        "gate keys",
        {"backward": {"tl.where(own, 0.0, mix * change)": "tl.where(own, 0.0, change)"}},
    ),
    "origins turned the other way": (
        "origins",
        {"primitives": {"tl.where(d < c.ROTARY, sin, -sin)": "tl.where(d < c.ROTARY, -sin, sin)"}},
    ),
    "the wrong half of a plane": ("origins", {"primitives": {"tl.where(d < 2 * c.ROTARY, d - c.ROTARY, d)": "d"}}),
    "gradients of turned keys not turned back": (
        "origins",
        {"backward": {"rotate(key, partner, cos, -sin, c)": "rotate(key, partner, cos, sin, c)"}},
    ),
    "auxiliary channels forgotten": (
        "origins",
        {"forward": {"s = pairs(queries.aux, aux, s, optional.q_aux": "s + pairs(queries.aux, aux, s, optional.q_aux"}},
    ),
    "the same channels at every step": (
        "wide stepped",
        {"primitives": {"d = begin + tl.arange(0, c.STEP)": "d = tl.arange(0, c.STEP)"}},
    ),
    "the last step left out": ("wide stepped", {"primitives": {"a.shape[1], c.STEP)": "a.shape[1] - c.STEP, c.STEP)"}}),
    "steps that do not turn": ("wide stepped", {"primitives": {"if origins is not None": "if False"}}),
    "parts joined without weights": (
        "decoding",
        {"forward": {"weight = tl.exp2((found": "weight = tl.exp2(0 * (found"}},
    ),
    "shares rounded down": ("decoding", {"forward": {"(count + splits - 1) // splits": "count // splits"}}),
    "parts of the gradients of keys not added": (
        "causal split",
        {"launch": {"x.sum(0) if splits > 1": "x[0] if splits > 1"}},
    ),
    "the same part of every list": ("causal split", {"backward": {"tl.minimum(split * share, count)": "0"}}),
}


def ask(name: str) -> None:
    """One probe."""
    own = name.removesuffix(" split").removesuffix(" stepped")
    assert_is(probes()[own], truth(own), "triton")


def seams(name: str) -> dict[tuple[str, str], Any]:
    """What of which module is another for a probe."""
    found: dict[tuple[str, str], Any] = {}
    if name.endswith("split") or name == "decoding":
        found["launch", "processors"] = lambda device: 1000
    if name.endswith("stepped"):
        found["specialize", "tiles_for"] = lambda *key: stepped(tiles_for(*key))
    return found


@pytest.mark.parametrize("name", [*probes(), "causal split", "bias split", "wide stepped"])
def test_the_right_kernels_pass_every_probe(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for (module, seam), other in seams(name).items():
        monkeypatch.setattr(f"attnzoo_kernels._triton.{module}.{seam}", other)
    ask(name)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "edits"), MUTANTS.values(), ids=MUTANTS.keys())
def test_wrong_kernels_are_found_out(
    name: str, edits: dict[str, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant = load(tmp_path, edits)
    for (module, seam), other in seams(name).items():
        setattr(sys.modules[f"mutant_{tmp_path.name}_{module}"], seam, other)
    monkeypatch.setattr(dispatch, "_kernels", lambda: mutant)
    with pytest.raises(AssertionError):
        ask(name)
