"""Read patterns inside transformers models, through its public attention and mask interfaces.

One attention function and one mask function are registered under the name "attnzoo"; what a block reads is a pattern on
its module. A name registered for attention alone would lose every padding mask without a word.

Letters: B batch, T query tokens, S slots of the host's cache, H query heads, G KV heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attnzoo.base.editing.reads import edits_among
from attnzoo.base.evicting.policy import PolicyAttention
from attnzoo.base.layer import AttentionInputs, AttentionLayer
from attnzoo.base.recording import RULE
from attnzoo.reporting.warn import warn_caller
from attnzoo.surgery.hosts.attending import attend_by, attend_densely
from attnzoo.surgery.hosts.caches.evicting_calls import HELD, attend_held, evicting_layer_for
from attnzoo.surgery.hosts.calls import AROUND, CACHE_NAMES, AttentionCall, read_call
from attnzoo.surgery.hosts.geometry import Geometry as Geometry
from attnzoo.surgery.hosts.geometry import geometry_of as geometry_of
from attnzoo.surgery.hosts.geometry import rule_of
from attnzoo.surgery.hosts.positions import tables_as_given
from attnzoo_kernels.errors import ShapeError, UnsupportedError

NAME = "attnzoo"


@dataclass(frozen=True, eq=False)
class ReadPattern:
    """What a block reads. No module, so that no state is added.

    Attributes:
        layer: A layer without weights whose plan is followed.
        evict: Whether caches hold no more than the rule can read, where they are made for the block.
        planes: Which values of a head the host turns against each other, as :class:`AttentionBlock` says it.
        tables: What makes cosines and sines of the host's own tables, likewise.
        keeps_all: Whether caches must keep every slot, because the rule counts from the first.
    """

    layer: AttentionLayer
    evict: bool = True
    planes: Literal["halves", "neighbours"] | None = "halves"
    keeps_all: bool = False
    tables: Callable[[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]] = tables_as_given

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # A process that only loads a pickle has registered nothing yet.
        register()


def set_pattern(module: nn.Module, pattern: ReadPattern | None) -> None:
    """Puts a pattern on a module, or takes it off; with it goes the check that it is followed."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if hook is _prepare_block:
            del module._forward_pre_hooks[key]
            del module._forward_pre_hooks_with_kwargs[key]
    if pattern is None:
        module.__dict__.pop(RULE, None)
    else:
        module.__dict__[RULE] = pattern
        module.register_forward_pre_hook(_prepare_block, with_kwargs=True)


def pattern_of(module: nn.Module) -> ReadPattern | None:
    """The read pattern on a module."""
    pattern = module.__dict__.get(RULE)
    return pattern if isinstance(pattern, ReadPattern) else None


def with_groups(pattern: ReadPattern, groups: int) -> ReadPattern:
    """The same pattern for another number of KV heads."""
    layer = pattern.layer
    if layer.config.kv_heads == groups:
        return pattern
    other: AttentionLayer
    if isinstance(layer, PolicyAttention):
        other = layer.with_kv_heads(groups)
    else:
        with torch.device("meta"):
            other = type(layer)(replace(layer.config, num_kv_heads=groups))
    other.impl = layer.impl
    return replace(pattern, layer=other)


def take_over(new: nn.Module, old: nn.Module, groups: int) -> None:
    """Gives a new block the mode of an old one, and its read pattern where there is one, for so many KV heads."""
    new.train(old.training)
    pattern = pattern_of(old)
    if pattern is not None:
        set_pattern(new, with_groups(pattern, groups))


def register() -> None:
    """Makes the name known to transformers; a second call changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, describe_mask)


def check_implementation(config: Any) -> None:
    """Raises unless a block of this configuration is called through the registered functions.

    Raises:
        UnsupportedError: If another implementation was set, or other functions were registered by the name.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    found = config._attn_implementation
    if found != NAME:
        raise UnsupportedError(
            f"attn_implementation: expected {NAME!r}, which a converted block needs, got {found!r}; go back with "
            f"set_attn_implementation({NAME!r}), or take the conversion back with undo()"
        )
    for what, known, ours in (
        ("attention", ALL_ATTENTION_FUNCTIONS, attend),
        ("mask", ALL_MASK_ATTENTION_FUNCTIONS, describe_mask),
    ):
        if known.get(NAME) is not ours:
            raise UnsupportedError(
                f"attn_implementation: expected attnzoo's own {what} function by the name {NAME!r}, got "
                f"{known.get(NAME)!r}; register that by another name, and attnzoo.surgery's again by convert()"
            )


def _prepare_block(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Before a block's call: it is called by the functions here, and its memory evicts, or grows without copying."""
    check_implementation(module.config)
    pattern = pattern_of(module)
    for name in CACHE_NAMES:
        cache = kwargs.get(name)
        if cache is None:
            continue
        held = None
        if pattern is not None and not getattr(module, "needs_interface", False):
            # A replacement that follows a pattern remembers in a way of its own.
            held = evicting_layer_for(module, pattern, cache, (args, kwargs))
        if held is not None:
            return args, {**kwargs, HELD: held}
        index: Any = module.layer_idx
        let_grow(cache, index, keeps_all=pattern is not None and pattern.keeps_all)
    if pattern is not None and all(kwargs.get(name) is None for name in CACHE_NAMES):
        _warn_without_cache(pattern)
    return None


def _warn_without_cache(pattern: ReadPattern) -> None:
    """Warns of a call in which a policy says nothing, because nothing is remembered."""
    policy = pattern.layer.policy if isinstance(pattern.layer, PolicyAttention) else None
    if policy is not None and (policy.compacts or policy.reads_pages) and not torch.compiler.is_compiling():
        warn_caller(
            f"use_cache: expected a cache, whose rows {policy.name!r} chooses, got none: such a call reads everything, "
            "as without the policy"
        )


def let_grow(cache: Any, index: int, *, keeps_all: bool = False) -> None:
    """Makes an empty plain layer of a host's cache one that copies nothing when a token is added.

    Args:
        cache: The host's cache.
        index: Which of its layers.
        keeps_all: Whether one that slides becomes such a layer too.
    """
    # Importing the host's library is for callers who have one of its caches.
    from attnzoo.surgery.hosts.caches import growing

    growing.let_grow(cache, index, keeps_all=keeps_all)


@dataclass(frozen=True, eq=False)
class Switched:
    """What the configurations of a model and of its blocks, which may be others, said before."""

    model: str
    blocks: list[tuple[Any, str]]


def switch(model: Any, blocks: Sequence[Any]) -> Switched:
    """Makes a model and some of its blocks use the registered functions, and returns what they used before."""
    register()
    before: str = model.config._attn_implementation
    if before != NAME:
        model.set_attn_implementation(NAME)
    others = {id(block.config): block.config for block in blocks if block.config is not model.config}
    changed = [(config, config._attn_implementation) for config in others.values()]
    for config, _ in changed:
        config._attn_implementation = NAME
    return Switched(before, changed)


def switch_back(model: Any, switched: Switched) -> None:
    """Makes a model use what it used before."""
    for config, before in switched.blocks:
        config._attn_implementation = before
    # Where an earlier conversion, maybe of another model with this configuration, has switched, its undo switches back.
    if switched.model == NAME and not any(needs_interface(module) for module in model.modules()):
        return
    if model.config._attn_implementation != switched.model:
        model.set_attn_implementation(switched.model)


def needs_interface(module: nn.Module) -> bool:
    """Whether a module is called through the registered functions, and wrong through others."""
    return pattern_of(module) is not None or getattr(module, "needs_interface", False)


def describe_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Any = None,
    **kwargs: Any,
) -> Geometry:
    """The mask function: no mask is made, only what the attention function needs to know.

    Raises:
        UnsupportedError: If the host asks for another rule than causality, a sliding window and padding.
    """
    if isinstance(attention_mask, Geometry):
        return attention_mask
    causal, window = rule_of(mask_function)
    if kv_offset and window is None:
        raise UnsupportedError(f"kv_offset: expected a cache that keeps every slot, got one that begins at {kv_offset}")
    # The host advances its counter in place before attention runs.
    first = q_offset.clone() if isinstance(q_offset, Tensor) else q_offset
    if isinstance(first, Tensor) and not torch.compiler.is_compiling():
        first = int(first)
    real = attention_mask
    if real is not None and not torch.compiler.is_compiling() and bool(real.all()):
        real = None
    return Geometry(first, real, causal=causal, window=window)


def first_slot(geometry: Any, cache: Any, layer: int) -> int | Tensor:
    """The slot of a call's first token, asked before the cache is updated."""
    if isinstance(geometry, Geometry):
        return geometry.first
    if cache is None:
        return 0
    held = cache.get_seq_length(layer)
    return held.clone() if isinstance(held, Tensor) else int(held)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function: rotated q ``[B, H, T, D]``, k, v ``[B, G, S, D]`` to ``([B, T, H, D], None)``.

    Raises:
        UnsupportedError: If the host asks for something that cannot be honoured.
    """
    if dropout:
        raise UnsupportedError(f"dropout: expected 0, got {dropout}; attention dropout is not offered")
    held = kwargs.pop(HELD, None)
    window = kwargs.pop("sliding_window", None)
    causal = getattr(module, "is_causal", True) is not False
    if read_call(kwargs, causal=causal).cache is not None:
        raise UnsupportedError("cache: expected one that the block has read, got one that it hands on")
    geometry = geometry_of(attention_mask, query.shape[2], key.shape[2], causal=causal, window=window)
    answer = partial(_answer, module, scaling, held)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    call = AttentionCall(query, key, value, geometry=geometry, scale=scale, answer=answer, held=held is not None)
    around = module.__dict__.get(AROUND)
    out = answer(call) if around is None else around(call)
    return out.transpose(1, 2).contiguous(), None


def _answer(module: nn.Module, scale: float | None, held: Any, call: AttentionCall) -> Tensor:
    """What a block's attention gives ``[B, H, T, D]``."""
    pattern = pattern_of(module)
    geometry = call.geometry
    q = call.q
    k = call.k
    v = call.v
    if pattern is None and geometry.real is None and torch.compiler.is_compiling():
        return attend_densely(q, k, v, geometry, scale)
    if held is not None:
        if isinstance(geometry.first, Tensor) or geometry.first != held.seen:
            raise ShapeError(
                f"attention_mask: expected one whose queries begin at slot {held.seen}, got {geometry.first}"
            )
        return attend_held(held, AttentionInputs(q, k, v, edits=edits_among(call.edits, q)), geometry.real)
    return attend_by(None if pattern is None else pattern.layer, q, k, v, geometry, scale, call.edits)
