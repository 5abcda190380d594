"""What a family of hosts says about one attention block, and the base of what may stand in a block's place.

Letters: B batch, T query tokens, C model width, H query heads, G KV heads, D head width, Dv value width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

from torch import Tensor, nn

from attnzoo.base.rope import RotaryConfig
from attnzoo.reporting.warn import warn_caller
from attnzoo.surgery.hosts import attention_function
from attnzoo.surgery.hosts.positions import tables_as_given
from attnzoo.surgery.hosts.projections import Projections

ROLES = ("q_proj", "k_proj", "v_proj", "o_proj")
"""What projects, by the names that attnzoo's layers give it."""


HEAD_EDITS = "attnzoo_head_edits"
"""The attribute of a block that holds the edits of its heads that stand; what takes a block's place takes it over."""


class Need(Enum):
    """What a conversion needs of a block: that its reads can be directed, its weights changed, or it be replaced."""

    READING = "reading"
    WEIGHTS = "weights"
    REPLACING = "replacing"


@dataclass(frozen=True, eq=False, kw_only=True)
class AttentionBlock:
    """What a family knows about one attention module; nothing of it is copied.

    It is copied and pickled together with the module: its callables are functions that a file defines, or partials of
    such.

    Attributes:
        heads: Query heads H.
        kv_heads: KV heads G.
        head_dim: Width D of a head's queries and keys.
        value_dim: Width Dv of a head's values.
        width: Width C of the model.
        cached_values: Says how many values the cache holds for each of the host's tokens.
        project: ``[B, T, C]`` to q ``[B, H, T, D]``, k ``[B, G, T, D]`` and v ``[B, G, T, Dv]``: biases and norms after
            projection are done, rotation is not. It looks the module's children up at each call, so that what is put
            in their places later is called.
        output: ``[B, T, H * Dv]`` to ``[B, T, C]``, likewise; the identity where the output's projection is outside
            the module.
        finish: What follows inside the module, such as a residual and a norm: of the module itself, or of who has its
            other children, of its input ``[B, T, C]`` and of that output. ``None`` where nothing does.
        projections: The modules that project, by the names in ``ROLES``; empty where none stand for them. One that
            projects queries, keys and values together stands for each of them.
        split: What takes such a module's output ``[..., n]`` apart into queries ``[..., H * D]``, keys and values, each
            with its heads in order. ``None`` where each has a module of its own.
        weights: Their plain weights by role. Raises ConversionError, naming the role, where none stand for it.
        rotary: How queries and keys are rotated; ``None`` if they are not. Raises ConfigError for a rotation that is
            not known here, which keeps nobody from changing what a block reads.
        rope_type: The host's name for its rotation, or ``None``.
        planes: Which values of a head the host turns against each other: those of its halves, or neighbours; ``None``
            where it rotates nothing.
        scale: The factor on the scores of what ``project`` gives.
        causal: Whether a token reads what came before alone.
        window: Tokens of the block's own sliding window, or ``None``.
        reply: What its parent unpacks.
        reasons: Why a kind of conversion cannot be done here; nothing where it can.
        query_factor: The part of ``scale`` by which the host multiplies queries itself, before its attention function
            has them; see :attr:`asked_scale`.
        dropout: Share of attention weights that the host drops in training.
        products: Whether ``project`` and ``output`` are the products with the four ``projections``, and no more.
        output_dropout: Share of outputs that the block itself drops in training.
        tables: What makes cosines and sines of all planes, twice, ``[B|1, T, Dr]``, of the host's own tables of a call.
        numbers: What the host numbers where its caller gives no positions: slots, padding among them, or each item's
            tokens alone.
        output_path: The path, from the block, of the module that is called with the outputs of all heads
            ``[B, T, H * Dv]``, each head's behind the other's; ``None`` where no module is.
        output_outside: Whether that is a path from the block's parent, since the module stands outside the block.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    width: int
    cached_values: Callable[[], int]
    project: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    output: Callable[[Tensor], Tensor]
    projections: Mapping[str, Any]
    weights: Callable[[], Projections]
    rotary: Callable[[], RotaryConfig | None]
    rope_type: str | None
    scale: float
    causal: bool
    window: int | None
    reply: Literal["pair", "triple", "tensor"]
    reasons: Mapping[Need, tuple[str, ...]]
    split: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]] | None = None
    planes: Literal["halves", "neighbours"] | None = "halves"
    products: bool = False
    query_factor: float = 1.0
    dropout: float = 0.0
    finish: Callable[[Any, Tensor, Tensor], Tensor] | None = None
    output_dropout: float = 0.0
    tables: Callable[[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]] = tables_as_given
    numbers: Literal["slots", "tokens"] = "slots"
    output_path: str | None = "o_proj"
    output_outside: bool = False

    @property
    def asked_scale(self) -> float:
        """The factor on scores that the host asks of its attention function."""
        return self.scale / self.query_factor


@dataclass(frozen=True, eq=False, kw_only=True)
class Family:
    """Models whose attention blocks are called, configured and named alike: all that surgery asks about these blocks.

    Attributes:
        name: Of the family.
        classes: Names of its attention classes, so that nothing is imported before a model is there.
        block: Describes a module of one of them.
        with_weights: Makes a module of the same class with other weights; the original is untouched. ``None`` where
            the classes cannot hold others.
        recognise: Whether a module is one of them, where its class's name alone does not say it.
    """

    name: str
    classes: tuple[str, ...]
    block: Callable[[nn.Module], AttentionBlock]
    with_weights: Callable[[nn.Module, Projections], nn.Module] | None
    recognise: Callable[[nn.Module], bool] | None = None

    def matches(self, module: nn.Module) -> bool:
        """Whether a module is an attention block of this family."""
        return type(module).__name__ in self.classes if self.recognise is None else self.recognise(module)


def no_rotation() -> None:
    """What :attr:`AttentionBlock.rotary` is where positions are learned, and added to a model's input."""


class ReplacementModule(nn.Module):
    """A module of attnzoo's that a host calls as its attention block. It describes itself as families do.

    Attributes:
        family: The name of the family of the block whose place it takes.
        config: The host's configuration, ``None`` where it has none.
        layer_idx: Its index in the host's cache.
        needs_interface: Whether it works by the registered functions alone; else it attends by whatever implementation
            the host is set to, as the host's own blocks do.
    """

    needs_interface = True

    def __init__(self, host: nn.Module, family: str) -> None:
        super().__init__()
        block: Any = host
        self.family = family
        self.config: Any = getattr(block, "config", None)
        if not hasattr(self.config, "_attn_implementation"):
            # The host knows nothing of attention interfaces, and calls the module alone.
            self.needs_interface = False
        # Classes that never have a cache have no place in one.
        self.layer_idx = int(getattr(block, "layer_idx", None) or 0)
        self.is_causal = getattr(block, "is_causal", True) is not False

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        # A process that only loads a pickle has registered nothing yet.
        attention_function.register()

    @abstractmethod
    def block(self) -> AttentionBlock:
        """What a family says about its blocks, of this module."""


LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Kinds of rotation whose frequencies follow the length of a call."""


def warn_of_lengths(block: AttentionBlock) -> None:
    """Warns where a host's frequencies follow the length of a call: those of a replacement do not."""
    if block.rope_type in LENGTH_DEPENDENT:
        warn_caller(
            f"rope_type {block.rope_type!r}: the model changes its frequencies with the length of a call; converted "
            "blocks keep those of the length that it was trained at"
        )
