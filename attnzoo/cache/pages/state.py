"""What a cache of pages holds as tensors and plain numbers: its rows, head by head, whatever pages they lie in.

Names: ``row.<name>`` are what rows have ``[B, G, R, ...]``, ``lost.<name>`` what compensation rows stand for,
``queries`` the last queries, ``rows`` and ``progress.<name>`` counts; ``policy`` the policy's settings.

Letters: B batch, G KV heads, R rows of the head that holds most.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnzoo.cache.pages.apply import Lost
from attnzoo.cache.pages.held import HeldRows
from attnzoo.cache.pages.records import Progress
from attnzoo.cache.pages.rows import gathered, grouped, laid
from attnzoo.cache.pages.seen import query_ring
from attnzoo.cache.pages.store import PER_PAGE
from attnzoo.cache.state import TokenCounts, check_header, counts_of, header_of, read_counts
from attnzoo_kernels.errors import ConfigError, ShapeError

LOST = ("k", "v", "mass", "moment")
PROGRESS = ("tokens", "since", "longer", "chosen")


def state_of(cache: HeldRows, config: Any) -> dict[str, Any]:
    """The state of a cache: copies, contiguous, and numbers and words that JSON can hold."""
    rows, counts = gathered(cache.pool)
    state = header_of("PagedCache", config, cache.batch, cache.max_length)
    state |= counts_of(TokenCounts(cache.length, cache.bound, None if cache.length is not None else cache.lengths))
    state["policy"] = cache.policy.settings()
    state["weighed"] = cache.pool.weighed
    state["rows"] = counts.clone()
    state |= {f"row.{name}": _copy(x) for name, x in rows.items()}
    if cache.lost is not None:
        state |= {f"lost.{name}": _copy(x) for name, x in zip(LOST, cache.lost.tensors, strict=True)}
    for name in PROGRESS:
        value = getattr(cache.progress, name)
        state[f"progress.{name}"] = _copy(value) if isinstance(value, Tensor) else value
    queries = cache.last_queries
    if queries is not None:
        state["queries"] = _copy(queries.last(queries.history, cache.offset))
        state["scale"] = cache.scale
    return state


def _copy(x: Tensor) -> Tensor:
    return x.detach().clone(memory_format=torch.contiguous_format)


def load_state(cache: HeldRows, config: Any, state: Mapping[str, Any]) -> None:
    """Holds what :func:`state_of` gave, instead of what is held.

    Raises:
        TypeError: If ``state`` is no mapping.
        ConfigError: If it is of another kind of cache, of a layer of another configuration or of another policy.
        ShapeError: If batch, room, names, shapes or dtypes do not fit. Nothing is changed then.
    """
    check_header(state, header_of("PagedCache", config, cache.batch, cache.max_length))
    own = json.loads(json.dumps(cache.policy.settings()))
    given = json.loads(json.dumps(state.get("policy")))
    if own != given:
        raise ConfigError(f"policy: expected the state of {own}, got that of {given}")
    read_counts(state, cache.batch, cache.max_length, cache.device)
    counts = _read_rows(cache, state)
    rows = {name.removeprefix("row."): x for name, x in state.items() if name.startswith("row.")}
    progress = Progress(**{name: state[f"progress.{name}"] for name in PROGRESS})
    tokens = torch.as_tensor(progress.tokens, device="cpu").expand(cache.batch)
    held = [counts[:, head] if ring is None else tokens for head, ring in enumerate(cache.block_rings)]
    with torch.inference_mode(False), torch.no_grad():
        like = cache.pool
        if "row.mass" in state and "mass" not in like.tensors:
            like = like.with_sidecar("mass", state["row.mass"].new_empty(0, like.page, state["row.mass"].shape[3]))
        placed = {name: x.to(like.tensors[name].device) for name, x in rows.items()}
        pool = laid(placed, grouped(torch.stack(held, 1), cache.block_rings, like.page), like, cache.batch)
        pool.weighed = state["weighed"]
        lost = [state[f"lost.{name}"].to(cache.device, copy=True) for name in LOST if f"lost.{name}" in state]
        queries = None
        if "queries" in state:
            last = state["queries"].to(cache.device)
            queries = query_ring(cache.policy, last)
            offset = progress.tokens if isinstance(progress.tokens, int) else progress.tokens.to(cache.device)
            queries.load(last, offset, max(0, int(tokens.min()) - last.shape[2]) if tokens.numel() else 0)
    cache.take_over(pool, progress, Lost(*lost) if lost else None)
    cache.last_queries = queries
    cache.scale = state.get("scale", 1.0)


def _read_rows(cache: HeldRows, state: Mapping[str, Any]) -> Tensor:
    """How many rows a state says that each head has.

    Raises:
        ShapeError: If these, or the rows' shapes and dtypes, do not fit.
    """
    counts = state.get("rows")
    size = [cache.batch, cache.pool.heads]
    if not isinstance(counts, Tensor) or counts.dtype != torch.int64 or list(counts.shape) != size:
        raise ShapeError(f"rows: expected int64 {size}, got {counts}")
    most = int(counts.max()) if counts.numel() else 0
    names = {name for name in cache.pool.tensors if name not in PER_PAGE}
    found = {name.removeprefix("row.") for name in state if name.startswith("row.")}
    if found - {"mass"} != names - {"mass"} or ("mass" in found and not cache.counts_mass):
        raise ShapeError(f"state: expected rows with {sorted(names)}, got {sorted(found)}")
    for name in found:
        x = state[f"row.{name}"]
        like = cache.pool.tensors.get(name)
        shape = [*size, most, *(x.shape[3:] if like is None else like.shape[2:])]
        if list(x.shape) != shape or (like is not None and x.dtype != like.dtype):
            raise ShapeError(f"row.{name}: expected {shape}, got {x.dtype} {list(x.shape)}")
    missing = [f"progress.{name}" for name in PROGRESS if f"progress.{name}" not in state]
    if missing:
        raise ShapeError(f"state: expected {', '.join(missing)}, got none")
    return counts.cpu()
