"""A decoding step of a layer: one token of each item, without a plan, a layout, or a trip through the operation.

A step is quick where all items share their length, on a CPU, and nobody wants a gradient, a record or an
implementation by name. It stands for the steps of a layer's call (``begin``, ``project``, ... ``combine``) and says the
same. A variant joins by one of two hooks, in the body of the class whose steps they stand for:

- ``row_slots(held, device)``: which slots the row reads, where that follows from their number alone;
- ``attend_row(row)``: all of it, from the row's token to the heads' outputs, where more is needed.

A class that overrides one of a call's steps without a hook of its own is never quick; it has its steps run.

Letters: B batch, C model width, H query heads, G KV heads, D head width, Dv value width, n slots of a buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.functional import linear

from attnzoo.base.caching import CachingModule
from attnzoo.base.decoding.compiled import compute_hidden
from attnzoo.base.decoding.rotation import rotate_row, row_rotation
from attnzoo.base.editing.reads import ReadEditor
from attnzoo.base.projections import are_products, is_distributed
from attnzoo.base.recording import Recording
from attnzoo.base.weights import PROJECTIONS
from attnzoo.cache.kv_cache import KVCache
from attnzoo_kernels import Slots, attend_slots
from attnzoo_kernels.runtime.plain import is_readable

HOOKS = frozenset({"row_slots", "attend_row"})
STEPS = frozenset({
    "attend", "begin", "project", "remember", "rotate", "rotate_rows", "attention_inputs", "plan", "plan_call",
    "operate", "combine", "check_slice", "_attend", "_run",
})  # fmt: skip
"""What a quick step stands for."""
COMPUTED = (torch.float32, torch.float64, torch.bfloat16)


class TokenRow(NamedTuple):
    """One token of each item, all of which hold equally many.

    Attributes:
        x: Tokens ``[B, 1, C]``.
        cache: What earlier calls remembered, with room for the token.
        position: Tokens held before this one, which is its slot and its position.
    """

    x: Tensor
    cache: KVCache
    position: int


class DecodingModule(CachingModule):
    """A layer that may do decoding steps the quick way."""

    impl: str
    recordings: tuple[Recording, ...]
    read_editors: tuple[ReadEditor, ...] = ()
    """Who edits what heads read, the outermost first."""
    row_options: str | None = None
    """The configuration as compiled steps hand it on; ``None`` where it cannot be told in plain values."""
    compiles_rows: ClassVar[bool] = False
    """Whether a compiled step makes no plan: a class that says so has a ``compiled_row`` that fits its hooks. That of
    every layer reads the runs of :meth:`row_slots`, which can be traced then."""

    _stands_for: ClassVar[tuple[tuple[str, Callable[..., Any]], ...] | None] = None
    """The steps that the class's hooks stand for, as they were when it was made; ``None`` where they stand for none."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not HOOKS.isdisjoint(vars(cls)) and "compiles_rows" not in vars(cls):
            # A compiled step that is inherited may say something else than new hooks.
            cls.compiles_rows = False
        cls._stands_for = tuple((name, getattr(cls, name)) for name in STEPS) if _has_hooks(cls) else None

    def why_no_read_edits(self) -> str | None:
        """Why nobody can edit what heads read; ``None`` where that can be done."""
        return None

    @property
    def tokens_per_landmark(self) -> int | None:
        """Of how many tokens the last takes no position; ``None`` where each token takes one."""
        return None

    def counted_positions(self, slots: Tensor) -> Tensor:
        """The positions that a layer gives to the tokens at slots of an item by itself, integers as they are."""
        every = self.tokens_per_landmark
        return slots if every is None else slots - torch.div(slots + 1, every, rounding_mode="floor")

    def row_slots(self, held: int, device: torch.device) -> Slots | None:
        """What the last of ``held`` tokens reads; ``None`` where that is not known beforehand.

        Args:
            held: Tokens of each item, the row's own the last.
            device: Where lists of slots lie.
        """
        return None

    def known_slots(self, held: int, device: torch.device) -> Slots | None:
        """What the last of ``held`` tokens reads, for somebody else's queries, keys and values on a CPU.

        ``None`` where a plan has to be made: what is read is not known beforehand, or somebody wants to see the plan.

        Args:
            held: Tokens of each item, the row's own the last.
            device: Where lists of slots lie.
        """
        if is_watched() or self._is_asked_for_steps():
            return None
        return self.row_slots(held, device)

    def attend_row(self, row: TokenRow) -> Tensor | None:
        """The heads' outputs ``[B, H, 1, Dv]`` for a row, whose keys and values are written to the cache.

        ``None`` where the call's steps have to be run; nothing is written then, and no module called.
        """
        slots = self.row_slots(row.position + 1, row.x.device)
        if slots is None:
            return None
        q, k, v = self.project_row(row)
        seen = row.cache.write_row({"k": k, "v": v})
        return attend_slots(q, seen["k"], seen["v"], slots, scale=self.row_scale)

    def project_row(self, row: TokenRow) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries ``[B, H, 1, D]`` and keys ``[B, G, 1, D]``, and values ``[B, G, 1, Dv]``."""
        both, v = self.heads_of_row(row)
        q, k = self.rotate_row(row, both).tensor_split((self.config.num_heads,), 1)
        return q, k, v

    def heads_of_row(self, row: TokenRow) -> tuple[Tensor, Tensor]:
        """Queries before keys ``[B, H + G, 1, D]``, not rotated, and values ``[B, G, 1, Dv]``."""
        if self.projector is not None and not self.projector.products:
            q, k, v = self.projector.project(row.x)
            return torch.cat((q, k), 1), v
        # Of one token, heads lie one behind the other, as rows do.
        size = (row.x.shape[0], -1, 1, self.config.head_width)
        both = torch.cat((self.product("q_proj", row.x), self.product("k_proj", row.x)), -1).view(size)
        return both, self.product("v_proj", row.x).view(size)

    def product(self, name: str, x: Tensor) -> Tensor:
        """What a projection of :meth:`row_projections` makes of x: a product, as a quick step knows by now."""
        module = self._modules[name] if self.projector is None else self.projector.module(name)
        held = cast(nn.Module, module)._parameters
        return linear(x, cast(Tensor, held["weight"]), held["bias"])

    def row_output(self, out: Tensor) -> Tensor:
        """The output ``[B, 1, C]`` of a row's heads ``[B, H, 1, Dv]``."""
        joined = out.reshape(out.shape[0], 1, -1)
        if self.projector is not None and not self.projector.products:
            return self.projector.output(joined)
        return self.product("o_proj", joined)

    def rotate_row(self, row: TokenRow, x: Tensor) -> Tensor:
        """Rotates heads ``[B, h, 1, D]`` of a row by its position."""
        rotary = self.config.rotary
        if rotary is None:
            return x
        return rotate_row(x, row_rotation(rotary, self.config.head_width, row.position, x), rotary.interleaved)

    @property
    def row_scale(self) -> float:
        """The factor on scores."""
        scale = self.config.scale
        return float(self.config.head_width**-0.5 if scale is None else scale)

    def row_projections(self) -> tuple[tuple[nn.Module, int], ...]:
        """The projections that a quick step calls, each with the features that it has where all heads are here."""
        config = self.config
        groups = config.kv_heads * config.head_width
        rows = {
            "q_proj": config.num_heads * config.head_width,
            "k_proj": groups,
            "v_proj": groups,
            "o_proj": config.dim,
        }
        if self.projector is not None:
            return tuple((cast(nn.Module, self.projector.module(name)), count) for name, count in rows.items())
        held = cast(dict[str, nn.Module], self._modules)
        return tuple((held[name], count) for name, count in rows.items())

    def decode_row(self, x: Tensor, cache: KVCache) -> Tensor | None:
        """The output of a decoding step ``[B, 1, C]``, the quick way; ``None`` where the call's steps have to be run.

        Args:
            x: Tokens ``[B, T, C]``.
            cache: The call's cache.
        """
        if not (is_readable(x) and isinstance(cache, KVCache) and self._may_be_quick(x)):
            return None
        if not cache.takes_row((self._identity, self.config), x):
            return None
        with cache.all_or_nothing():
            out = self.attend_row(TokenRow(x, cache, cache.bound))
            if out is None:
                return None
            return self.row_output(out)

    def may_compile_row(self, x: Tensor, cache: KVCache) -> bool:
        """Whether a call that is being compiled, one token on a CPU beside a cache, may leave its plan away."""
        if not torch.compiler.is_compiling() or torch.compiler.is_exporting() or not isinstance(cache, KVCache):
            return False
        if x.dim() != 3 or x.shape[1] != 1 or x.device.type != "cpu" or cache.length is None:
            return False
        if self._stands_for is None or not self.compiles_rows or self.recordings or self.impl != "auto":
            return False
        if self.read_editors:
            return False
        return not torch.is_grad_enabled() and x.dtype in COMPUTED

    def may_hide_row(self, cache: KVCache) -> bool:
        """Whether a compiled step may call :meth:`hidden_row`."""
        return self.row_options is not None and not cache.offloads and not torch.is_autocast_enabled("cpu")

    def hidden_row(self, name: str, tensors: Sequence[Tensor], held: int, *numbers: float) -> Tensor:
        """What a compiled step looks up ``[B, H, 1, Dv]``: :func:`attnzoo.base.decoding.compiled.compute_hidden`."""
        options = self.row_options or ""
        return compute_hidden(name, tensors, held, width=self.config.head_width, options=options, numbers=numbers)

    def read_runs(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention ``[B, H, 1, Dv]`` of a row to what :meth:`row_slots` says; k and v hold what may be read."""
        slots = self.row_slots(k.shape[2], q.device)
        if slots is None:
            raise AssertionError("a class whose rows compile knows what they read")
        return attend_slots(q, k, v, slots, scale=self.row_scale)

    def _may_be_quick(self, x: Tensor) -> bool:
        """Whether nothing about a call on a CPU, or about this layer, asks for the call's steps."""
        if x.dim() != 3 or x.shape[1] != 1 or x.shape[2] != self.config.dim or x.dtype not in COMPUTED:
            return False
        if self._is_asked_for_steps():
            return False
        if torch.is_autocast_enabled("cpu") or is_watched():
            return False
        if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.used_parameters())):
            return False
        if self.projector is not None and not self.projector.products:
            # What is called, not multiplied by, may be anything, but for all heads.
            parts = (self.projector.module(name) for name in PROJECTIONS)
            return not any(part is not None and is_distributed(part) for part in parts)
        return are_products(self.row_projections(), x)

    def _is_asked_for_steps(self) -> bool:
        """Whether somebody wants a record, an edit or an implementation by name, or has replaced a step."""
        is_wanted = bool(self.recordings or self.read_editors) or self.impl != "auto"
        return is_wanted or not self._has_steps_stood_for()

    def _has_steps_stood_for(self) -> bool:
        """Whether the steps are still those of the class, replaced neither on it nor on this layer."""
        known = self._stands_for
        if known is None or not STEPS.isdisjoint(vars(self)):
            return False
        cls = type(self)
        return all(getattr(cls, name) is step for name, step in known)


def sink_window_slots(held: int, window: int | None, sink: int, device: torch.device) -> Slots:
    """The slots of a window and its sink that the last of ``held`` tokens reads; all where there is no window."""
    if window is None or held <= window:
        return Slots(((0, held),))
    return Slots.of_runs(((0, min(sink, held - window)), (held - window, held)), device)


def is_watched() -> bool:
    """Whether something looks at every operation: a mode that counts or fakes them, or forward-mode derivatives."""
    return torch._C._len_torch_dispatch_stack() > 0 or forward_ad._current_level >= 0


def _has_hooks(cls: type) -> bool:
    """Whether the first class that has a hook comes no later than the first that overrides a step."""
    for base in cls.__mro__:
        if not HOOKS.isdisjoint(vars(base)):
            return base is not DecodingModule
        if not STEPS.isdisjoint(vars(base)):
            return False
    return False
