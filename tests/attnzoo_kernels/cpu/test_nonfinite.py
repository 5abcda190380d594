"""Hidden means hidden for every input: what a row or slot has no part in may be no number, whatever tensor holds it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from attnzoo_kernels import BlockLayout, Extras, block_sparse_attention, block_sparse_attention_with_lse
from attnzoo_kernels.cpu import bf16, few_rows, flash
from attnzoo_kernels.op import make_call
from attnzoo_kernels.reference import visible_mask
from tests.attnzoo_kernels.cpu.cpu_classes import answering
from tests.strategies import Numbers

BATCH, HEADS, GROUPS, ROWS, SLOTS, BLOCK = 2, 4, 2, 21, 37, 8
PLACES = 6
LIMIT = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


class Tensors(NamedTuple):
    """What a call reads; what a switch leaves out is ``None``."""

    q: Tensor
    k: Tensor
    v: Tensor
    key_bias: Tensor | None
    q_aux: Tensor | None
    k_aux: Tensor | None
    gate: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    dout: Tensor
    dlse: Tensor


@dataclass(frozen=True)
class TokenRule:
    """What stays the same where inputs are spoiled."""

    causal: bool = True
    window: int | None = None
    sink: int = 0
    positions: bool = False
    padding: bool = False
    gate: str | None = None
    aux: bool = False
    rope: bool = False
    listed: float = 0.7


RULES = {
    "causal": TokenRule(listed=1.0),
    "window and sink": TokenRule(window=9, sink=3),
    "rows anywhere, some absent": TokenRule(positions=True, window=11),
    "padding": TokenRule(padding=True),
    "aux and padding": TokenRule(aux=True, padding=True, positions=True),
    "landmarks": TokenRule(gate="last", padding=True),
    "gate keys": TokenRule(gate="keys", listed=1.0),
    "origins": TokenRule(rope=True, positions=True),
    "all of them": TokenRule(gate="keys", aux=True, rope=True, padding=True, positions=True, window=20),
}


def layout_of(rule: TokenRule) -> BlockLayout:
    n, grid = Numbers.of(5), (1, GROUPS, -(-ROWS // BLOCK), -(-SLOTS // BLOCK))
    keep = n.chance(rule.listed, *grid)
    index = torch.where(keep, torch.arange(grid[3]).expand(grid), -1)
    # The last place of the tables is nobody's.
    origin = n.integers(0, PLACES - 2, *grid) if rule.rope else None
    return BlockLayout.from_indices(index, BLOCK, BLOCK, ROWS, SLOTS, origin=origin)


def tensors_of(rule: TokenRule, dtype: torch.dtype) -> Tensors:
    n = Numbers.of(6)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return n.normal(*shape).to(kind)

    bias = normal(BATCH, HEADS, SLOTS, kind=wide)
    bias[0, :, :5] = -math.inf
    bias[1, 1, 20:] = -math.inf
    angle = n.normal(PLACES, 3).to(wide)
    aux = (normal(BATCH, HEADS, ROWS, 3), normal(BATCH, 1, SLOTS, 3)) if rule.aux else (None, None)
    return Tensors(
        normal(BATCH, HEADS, ROWS, 8), normal(BATCH, GROUPS, SLOTS, 8), normal(BATCH, GROUPS, SLOTS, 8),
        bias if rule.padding else None, *aux,
        normal(BATCH, GROUPS, -(-SLOTS // BLOCK), 8) if rule.gate == "keys" else None,
        *((angle.cos(), angle.sin()) if rule.rope else (None, None)),
        normal(BATCH, HEADS, ROWS, 8), normal(BATCH, HEADS, ROWS, kind=wide),
    )  # fmt: skip


def extras_of(rule: TokenRule, x: Tensors) -> Extras:
    q_pos = Numbers.of(7).integers(0, SLOTS - 1, BATCH, 1, ROWS)
    q_pos[..., ::4] = -1
    return Extras(
        q_pos=q_pos if rule.positions else None,
        key_bias=x.key_bias,
        window=rule.window,
        sink=rule.sink,
        aux=None if x.q_aux is None or x.k_aux is None else (x.q_aux, x.k_aux),
        gate=x.gate if x.gate is not None else "last" if rule.gate == "last" else None,
        gate_mix=0.6,
        rope=None if x.cos is None or x.sin is None else (x.cos, x.sin),
    )


@cache
def seen_by(rule: TokenRule) -> tuple[Tensor, Tensor]:
    """Who sees whom, bool ``[B, H, T, S]``, and the blocks that hold rows' own positions, bool ``[B, H, T, N]``."""
    x = tensors_of(rule, torch.float32)
    call = make_call((x.q, x.k, x.v), layout_of(rule), causal=rule.causal, scale=1.0, extras=extras_of(rule, x))
    pos = call.rule.positions(ROWS, SLOTS, torch.device("cpu"))
    own = pos.unsqueeze(-1) // BLOCK == torch.arange(-(-SLOTS // BLOCK))
    return visible_mask(call)[0], own.expand(BATCH, HEADS, ROWS, -1)


LEAVES = ("q", "k", "v", "key_bias", "q_aux", "k_aux", "gate")


def results(rule: TokenRule, x: Tensors, impl: str, *, with_lse: bool) -> dict[str, Tensor]:
    leaves = {name: getattr(x, name).clone().requires_grad_() for name in LEAVES if getattr(x, name) is not None}
    given = x._replace(**leaves)
    call: dict[str, Any] = {"causal": rule.causal, "extras": extras_of(rule, given), "impl": impl}
    if with_lse:
        found = block_sparse_attention_with_lse(given.q, given.k, given.v, layout_of(rule), **call)
        grads = torch.autograd.grad(found, list(leaves.values()), (x.dout, x.dlse))
    else:
        found = (block_sparse_attention(given.q, given.k, given.v, layout_of(rule), **call),)
        grads = torch.autograd.grad(found, list(leaves.values()), (x.dout,))
    named = dict(zip(("out", "lse"), (y.detach() for y in found), strict=False))
    return named | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


@cache
def clean_results(rule: TokenRule, dtype: torch.dtype, impl: str, *, with_lse: bool, path: str) -> dict[str, Tensor]:
    """As :func:`results`, remembered for each path of the CPU."""
    return results(rule, tensors_of(rule, dtype), impl, with_lse=with_lse)


def in_blocks(seen: Tensor) -> Tensor:
    """Slots ``[.., S]`` as blocks ``[.., N]``: whether any is true."""
    padded = torch.nn.functional.pad(seen, (0, -SLOTS % BLOCK))
    return padded.unflatten(-1, (-1, BLOCK)).any(-1)


def to_shape(x: Tensor, heads: int) -> Tensor:
    """Any over the query heads ``[B, H, ..]`` that share one of ``heads``."""
    return x.unflatten(1, (heads, -1)).any(2)


class Spoiled(NamedTuple):
    """What is overwritten, and which rows ``[B, H, T]`` have a part in it."""

    places: dict[str, Tensor]
    rows: Tensor


def slots_spoiled(name: str, x: Tensors, seen: Tensor, *, by_some: bool) -> Spoiled:
    """Slots that no row sees or, ``by_some``, the one that the fewest rows do."""
    heads = getattr(x, name).shape[1]
    of_rows = seen.sum(2).unflatten(1, (heads, -1)).sum(2)  # [B, h, S]
    chosen = of_rows == 0
    if name == "key_bias":
        # What hides must go on hiding.
        chosen &= x.key_bias != -math.inf
    if by_some:
        few = torch.where(of_rows == 0, 10**6, of_rows).flatten().argmin()
        chosen = (torch.arange(of_rows.numel()) == few).view(of_rows.shape)
    of_head = chosen.repeat_interleave(HEADS // heads, 1).unsqueeze(2)
    return Spoiled({name: chosen}, (seen & of_head).any(-1))


def spoil(name: str, x: Tensors, seen: Tensor, own: Tensor, *, by_some: bool) -> Spoiled:
    """Chooses what to overwrite of an input."""
    if name in ("k", "v", "key_bias", "k_aux"):
        return slots_spoiled(name, x, seen, by_some=by_some)
    blind = ~seen.any(-1)
    nobody = torch.zeros_like(blind)
    if name in ("q", "q_aux", "dout", "dlse"):
        if not by_some:
            return Spoiled({name: blind}, nobody)
        # A row that sees little, beside those that see nothing: what it does not see must not learn of it.
        few = torch.where(blind, SLOTS + 1, seen.sum(-1)).flatten().argmin()
        one = (torch.arange(blind.numel()) == few).view(blind.shape)
        return Spoiled({name: blind | one}, one)
    if name == "gate":
        meets = in_blocks(seen) & ~own  # [B, H, T, N]
        of_block = to_shape(meets.any(2), GROUPS)
        chosen = ~of_block
        if by_some:
            first = of_block.flatten().nonzero()[0]
            chosen = (torch.arange(of_block.numel()) == first).view(of_block.shape)
        of_head = chosen.repeat_interleave(HEADS // GROUPS, 1).unsqueeze(2)
        return Spoiled({name: chosen}, (meets & of_head).any(-1))
    last = torch.arange(PLACES) == PLACES - 1
    return Spoiled({"cos": last, "sin": last}, nobody)


def assert_apart(
    rule: TokenRule, dtype: torch.dtype, impl: str, name: str, value: float, *, by_some: bool, path: str = "any"
) -> None:
    """What has no part in the spoiled places is as if they held numbers."""
    x, (seen, own) = tensors_of(rule, dtype), seen_by(rule)
    places, rows = spoil(name, x, seen, own, by_some=by_some)
    changed = {
        field: getattr(x, field).masked_fill(
            where.view(*where.shape, *[1] * (getattr(x, field).dim() - where.dim())), value
        )
        for field, where in places.items()
    }
    touched = seen & rows.unsqueeze(-1)  # [B, H, T, S]
    slots = touched.any(2)
    gates = (in_blocks(seen) & rows.unsqueeze(-1)).any(2)
    for with_lse in (True, False):
        if name == "dlse" and not with_lse:
            continue
        clean = clean_results(rule, dtype, impl, with_lse=with_lse, path=path)
        found = results(rule, x._replace(**changed), impl, with_lse=with_lse)
        for key, result in found.items():
            if key in ("out", "lse", "dq", "dq_aux"):
                apart = ~rows
            elif key == "dgate":
                apart = ~to_shape(gates, GROUPS)
            else:
                apart = ~to_shape(slots, result.shape[1])
            mine, wanted = (y[apart].double() for y in (result, clean[key]))
            hidden = wanted == -math.inf
            assert torch.equal(mine == -math.inf, hidden), key
            mine, wanted = mine[~hidden], wanted[~hidden]
            assert bool(mine.isfinite().all()), f"{key}: {int((~mine.isfinite()).sum())} numbers spoiled"
            torch.testing.assert_close(mine, wanted, rtol=LIMIT[dtype], atol=LIMIT[dtype])
        if by_some and name in ("k", "v", "k_aux") and math.isnan(value):
            assert bool((~found["out"].isfinite()).any(-1)[rows].all()), "what is seen was lost"


def inputs_of(rule: TokenRule) -> list[str]:
    there = [name for name, x in tensors_of(rule, torch.float32)._asdict().items() if x is not None]
    return [name for name in there if name != "sin"]


CASES = [(rule, name) for rule in RULES for name in inputs_of(RULES[rule])]
every_case = pytest.mark.parametrize(("rule", "name"), CASES, ids=[f"{rule}: {name}" for rule, name in CASES])


@pytest.mark.parametrize("impl", ["reference", "blocked"])
@every_case
def test_what_is_hidden_may_be_no_number(impl: str, rule: str, name: str) -> None:
    kinds = [(torch.float64, math.nan, True), (torch.float32, math.nan, False)]
    if impl == "blocked":
        kinds += [(torch.float32, math.inf, True), (torch.bfloat16, math.nan, False)]
    # Plain autograd multiplies a gradient that is no number with weights of 0: in the reference it is nobody's alone.
    reaches = impl == "blocked" or name != "dout"
    for dtype, value, by_some in kinds:
        assert_apart(RULES[rule], dtype, impl, name, value, by_some=by_some and reaches)


@contextmanager
def from_one_row_on() -> Iterator[None]:
    """Every call that torch's fused kernel can compute in row tiles or chunks goes there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(few_rows, "MOST_ROWS", 0)
        for limit, value in (("LEAST_ROWS", 1), ("LEAST_SLOTS", 0)):
            patch.setattr(flash, limit, value)
        patch.setattr(flash, "MOST_WASTE", {torch.float32: 1e9, torch.bfloat16: 1e9})
        patch.setattr(bf16, "LEAST_BLOCK", 1)
        yield


# A CPU, a dtype, and whether rows read one run of slots each: torch's kernel on row tiles, on chunks, or blocks.
PATHS = {
    "few rows": ("avx2", torch.float32, True),
    "few rows of blocks": ("avx2", torch.float32, False),
    "few rows in half precision": ("avx512 with bf16", torch.bfloat16, True),
    "row tiles": ("avx2", torch.float32, True),
    "row tiles in half precision": ("amx", torch.bfloat16, True),
    "chunks in half precision": ("amx", torch.bfloat16, False),
    "products in half precision": ("avx512 with bf16", torch.bfloat16, False),
    "the other half": ("avx512", torch.float16, False),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rule", ["causal", "window and sink", "rows anywhere, some absent"])
def test_nor_on_any_path_of_any_cpu(rule: str, path: str) -> None:
    cpu, dtype, runs = PATHS[path]
    chosen = replace(RULES[rule], listed=1.0, sink=0) if runs else RULES[rule]
    with answering(cpu), nullcontext() if path.startswith("few") else from_one_row_on():
        for name in ("q", "k", "v", "dout"):
            assert_apart(chosen, dtype, "blocked", name, math.nan, by_some=True, path=path)
