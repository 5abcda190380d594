"""Looking at a model's heads while it runs: their outputs, and what attention makes them of.

Letters: B batch, T query tokens, R rows that are asked for, S key slots, H query heads, G KV heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attnzoo.cache.replay import is_replay
from attnzoo.heads.causal.patterns import pattern_and_lse
from attnzoo.heads.causal.seen import SeenHeads, SeenLayers
from attnzoo.heads.decoder import last_norm
from attnzoo.reporting.choices import check_choice
from attnzoo.surgery.capture import watched
from attnzoo.surgery.edits.calls import Calls, last_rows, watch_calls
from attnzoo.surgery.edits.outputs import heads_of, input_of, with_input
from attnzoo.surgery.edits.places import HeadSite, check_sites
from attnzoo.surgery.edits.programs import refuse_compiled
from attnzoo.surgery.hosts.calls import AttentionCall
from attnzoo.surgery.hosts.families.known import WITHOUT_TRANSFORMERS
from attnzoo.surgery.hosts.site import Site
from attnzoo_kernels.errors import ConfigError, ShapeError, UnsupportedError

WHAT = ("z", "q", "k", "v", "q_unrotated", "k_unrotated", "lse", "pattern")
Rows = Literal["all", "last"] | Tensor


@contextmanager
def capture(
    model: Any,
    what: Sequence[str] = ("z",),
    layers: Sequence[int] | None = None,
    rows: Rows = "all",
    to: torch.device | str | None = None,
    *,
    sites: Sequence[HeadSite] | None = None,
) -> Iterator[SeenHeads]:
    """Looks at the heads of a model while the block runs; the model computes the same.

    Outputs of heads ("z") are looked at where they go, under any implementation of attention, and with the edits of
    contexts round this one. All else is looked at through the model's attention interface, by which the model attends
    meanwhile.

    Args:
        model: As for :func:`attnzoo.heads.edited`.
        what: "z", outputs of heads ``[B, R, H, D]``; "q" ``[B, R, H, D]``, "k" and "v" ``[B, S, G, D]``, as attention
            has them, and "q_unrotated", "k_unrotated" ``[B, T, G, D]``; "lse" ``[B, R, H]``, the logarithms of the sums
            of exponentials of scores; "pattern" ``[B, R, H, S]``, the weights. The last two are in fp32 at least.
        layers: Which; all by default.
        rows: "all"; "last", the last token of each item that is no padding; or int64 ``[R]`` or ``[B, R]``, rows of
            each call.
        to: Where what is seen is kept; where it is by default.
        sites: What :func:`attnzoo.heads.sites` gave for a model of no known family: "z" alone can be seen then.

    Yields:
        What is seen: ``seen["z"][layer]``. Where gradients are wanted these tensors are those of the model's own graph,
        so that ``torch.autograd.grad(metric, seen["z"][layer])`` is the gradient (of rows "all", kept in place).

    Raises:
        ConfigError: If no block is known, or an argument is none of these.
        UnsupportedError: If a block hands the outputs of its heads to no module, or the model is compiled, or attention
            cannot be looked at in a block (attnzoo's own layers, replacements, models outside of transformers).
    """
    names = _checked_names(what)
    _check_rows(rows)
    places = _chosen(check_sites(model, sites), layers)
    refuse_compiled(model)
    seen = SeenHeads(names)
    with ExitStack() as restored:
        calls: dict[int, Calls] = {}
        if not isinstance(rows, Tensor) and rows == "last":
            calls, removals = watch_calls(model, places)
            for remove in removals:
                restored.callback(remove)
        look = _Look(seen, rows, calls, to)
        if "z" in names:
            for place in places:
                hook = _SeeOutputs(look, place)
                module: nn.Module = model.get_submodule(place.o_proj)
                restored.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            norm = last_norm(model, places[-1].path)
            if norm is not None:
                see_stream = _SeeStream(look, places[-1].layer)
                restored.callback(model.get_submodule(norm).register_forward_pre_hook(see_stream).remove)
        if set(names) - {"z"}:
            chosen = [_attending(place) for place in places]
            unrotated = any(name.endswith("unrotated") for name in names)
            restored.enter_context(watched(model, look.attention, sites=chosen, unrotated=unrotated))
        yield seen


class _Look:
    """Keeps the rows that are asked for."""

    def __init__(self, seen: SeenHeads, rows: Rows, calls: dict[int, Calls], to: Any) -> None:
        self.seen = seen
        self.rows = rows
        self._calls = calls
        self._to = to

    def keep(self, name: str, layer: int, x: Tensor, rows: Tensor | None) -> None:
        """Some rows of ``x [B, T, ...]``, or all of them."""
        self.add(self.seen[name], layer, _rows_of(x, rows))

    def add(self, found: SeenLayers, layer: int, x: Tensor) -> None:
        """Keeps it where it shall be."""
        found.add(layer, x if self._to is None else x.to(self._to))

    def rows_of(self, layer: int, like: Tensor) -> Tensor | None:
        """The rows of a call that are asked for, int64 ``[B, R]``; ``None`` for all of ``like [B, T, ...]``."""
        if not isinstance(self.rows, Tensor):
            return None if self.rows == "all" else last_rows(self._calls[layer], like).unsqueeze(1)
        batch, tokens = like.shape[:2]
        rows = self.rows.to(like.device)
        if rows.dim() == 2 and rows.shape[0] != batch:
            raise ShapeError(f"rows: expected those of {batch} items, got {list(rows.shape)}")
        if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < tokens:
            raise ShapeError(f"rows: expected rows from 0 to {tokens - 1} of this call, got {rows.tolist()}")
        return rows.expand(batch, -1)

    def attention(self, site: Site, call: AttentionCall) -> None:
        """What a call of a block's attention has."""
        if is_replay():
            return
        queries = call.q.transpose(1, 2)  # [B, T, H, D]
        rows = self.rows_of(site.layer, queries)
        found: dict[str, Callable[[], Tensor]] = {
            "k": lambda: call.k.transpose(1, 2),
            "v": lambda: call.v.transpose(1, 2),
        }
        for name, make in found.items():
            if name in self.seen:
                self.keep(name, site.layer, make(), None)
        if "q" in self.seen:
            self.keep("q", site.layer, queries, rows)
        if call.unrotated is not None:
            q, k = call.unrotated
            if "q_unrotated" in self.seen:
                self.keep("q_unrotated", site.layer, q.transpose(1, 2), rows)
            if "k_unrotated" in self.seen:
                self.keep("k_unrotated", site.layer, k.transpose(1, 2), None)
        if "pattern" in self.seen or "lse" in self.seen:
            pattern, lse = pattern_and_lse(site, call, rows)
            for name, x in (("pattern", pattern), ("lse", lse)):
                if name in self.seen:
                    self.keep(name, site.layer, x, None)


class _SeeOutputs:
    """Looks at what an output's projection is called with; a forward pre-hook."""

    def __init__(self, look: _Look, place: HeadSite) -> None:
        self._look = look
        self._place = place

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if is_replay():
            # What activation checkpointing computes once more has been seen.
            return None
        joined = input_of(self._place, args, kwargs)
        z = heads_of(self._place, joined)
        self._look.keep("z", self._place.layer, z, self._look.rows_of(self._place.layer, z))
        # Gradients of what is seen need it to lie on the way to the output.
        return with_input(z.flatten(-2), args, kwargs) if z.requires_grad else None


class _SeeStream:
    """Looks at what the norm behind the layers is called with; a forward pre-hook."""

    def __init__(self, look: _Look, layer: int) -> None:
        self._look = look
        self._layer = layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if is_replay() or not args:
            return
        x: Tensor = args[0]
        rows = self._look.rows_of(self._layer, x)
        self._look.add(self._look.seen.stream, self._layer + 1, _rows_of(x, rows))


def _rows_of(x: Tensor, rows: Tensor | None) -> Tensor:
    """Some rows of ``x [B, T, ...]``, or all of them."""
    if rows is None:
        return x
    index = rows.view(*rows.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
    return x.gather(1, index)


def _checked_names(what: Any) -> tuple[str, ...]:
    names = (what,) if isinstance(what, str) else tuple(what)
    for name in names:
        check_choice("what", name, WHAT)
    if not names:
        raise ConfigError(f"what: expected some of {', '.join(WHAT)}, got none")
    return names


def _check_rows(rows: Any) -> None:
    if not isinstance(rows, Tensor):
        check_choice("rows", rows, ("all", "last"))
    elif rows.dtype != torch.int64 or rows.dim() not in (1, 2):
        raise ShapeError(f"rows: expected int64 [R] or [B, R], got {rows.dtype} {list(rows.shape)}")


def _chosen(places: Sequence[HeadSite], layers: Sequence[int] | None) -> list[HeadSite]:
    if layers is None:
        return list(places)
    by_layer = {place.layer: place for place in places}
    odd = [layer for layer in layers if layer not in by_layer]
    if odd:
        raise ConfigError(f"layers: expected some of {', '.join(map(str, by_layer))}, got {odd[0]}")
    return [by_layer[layer] for layer in layers]


def _attending(place: HeadSite) -> Site:
    """A block whose attention the host calls.

    Raises:
        UnsupportedError: If it attends by itself.
    """
    if place.site is None or place.site.host in WITHOUT_TRANSFORMERS:
        reason = "a block that attends by itself, and not through transformers' attention interface"
        raise UnsupportedError(f"what: only 'z' can be seen at {place.path}, {reason}")
    return place.site
