"""What a layer is as a module, beside its steps: weights that start anew, compute somewhere, and are told about.

Letters: B batch, T tokens, C model width, h heads of one kind, H query heads, G KV heads, D head width, Dv value width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from attnzoo.base.config import AttentionConfig
from attnzoo.base.projections import check_restart, check_slice, computing_device, computing_dtype, heads_held
from attnzoo.reporting.warn import warn_caller
from attnzoo_kernels import traceable
from attnzoo_kernels.errors import UnsupportedError

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@runtime_checkable
class Projector(Protocol):
    """Projects for a layer in the place of modules of the layer's own, such as the modules of a model do."""

    @property
    def source(self) -> nn.Module:
        """Holds all weights that are used, the layer's among them."""

    @property
    def products(self) -> bool:
        """Whether all that is done is the products with the modules of the four names."""

    def module(self, name: str) -> nn.Module | None:
        """The module that does the work of ``q_proj``, ``k_proj``, ``v_proj`` or ``o_proj``, if one alone does."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[B, T, C]`` to q ``[B, H, T, D]``, k ``[B, G, T, D]`` and v ``[B, G, T, Dv]``, not rotated."""

    def output(self, y: Tensor) -> Tensor:
        """``[B, T, H * Dv]`` to ``[B, T, C]``."""


class WeightedModule(nn.Module):
    """A module of projections made by a configuration.

    Attributes:
        config: The configuration; frozen.
        projector: What projects where the layer has no projections of its own; see :meth:`project_by`.
        splits_heads: Whether a layer may hold some of the heads, as under tensor parallelism; sharded parameters (FSDP)
            are no matter.
    """

    splits_heads: ClassVar[bool] = True
    projector: Projector | None = None

    config: AttentionConfig
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Sizes are numbers inside a layer, also while torch.jit traces.
        if "attend" in cls.__dict__:
            cls.attend = traceable(cls.__name__)(cls.__dict__["attend"])  # type: ignore[attr-defined]

    def __prepare_scriptable__(self) -> Self:
        """What torch.jit.script asks for; there is nothing that it could compile."""
        raise UnsupportedError(
            f"torch.jit.script: {type(self).__name__} makes layouts, which are data, and is no TorchScript; "
            "torch.export, torch.compile and torch.jit.trace take it"
        )

    def __init__(self) -> None:
        super().__init__()
        self._cautioned: frozenset[str] = frozenset()

    def caution(self, message: str) -> None:
        """Warns at the caller's line, once for this layer; not from within a graph."""
        if torch.compiler.is_compiling() or message in self._cautioned:
            return
        self._cautioned |= {message}
        warn_caller(message)

    def project_by(self, projector: Projector) -> None:
        """Has something else project, and drops the layer's own projections."""
        for name in PROJECTIONS:
            delattr(self, name)
        self.projector = projector

    def projection(self, name: str) -> nn.Module | None:
        """The module that does a projection's work; ``None`` where no module alone does."""
        if self.projector is not None and name in PROJECTIONS:
            return self.projector.module(name)
        found: nn.Module = getattr(self, name)
        return found

    def product_module(self, name: str) -> nn.Module | None:
        """The module whose call is all that a projection is; ``None`` where there is more to it."""
        return None if self.projector is not None and not self.projector.products else self.projection(name)

    def heads_of(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``[B, h, T, D]`` of tokens ``[B, T, C]``, not rotated.

        Args:
            x: The tokens.
            context: Those that keys and values are made of instead.
        """
        if self.projector is not None and context is None:
            return self.projector.project(x)
        source = x if context is None else context
        q, k, v = (self.some_heads_of(name, source if name != "q_proj" else x) for name in PROJECTIONS[:3])
        return q, k, v

    def some_heads_of(self, name: str, x: Tensor) -> Tensor:
        """What one of the projections alone makes of tokens ``[B, T, C]``: ``[B, h, T, D]``, not rotated."""
        module = self.product_module(name)
        if module is not None:
            return self._split(module(x))
        if self.projector is None:
            raise AssertionError("a layer without projections has a projector")
        return self.projector.project(x)[PROJECTIONS.index(name)]

    def output_of(self, y: Tensor) -> Tensor:
        """The output ``[B, T, C]`` of joined heads ``[B, T, H * Dv]``."""
        out: Tensor = self.o_proj(y) if self.projector is None else self.projector.output(y)
        return out

    def _split(self, x: Tensor) -> Tensor:
        """``[B, T, h * D]`` to ``[B, h, T, D]``."""
        heads: Tensor = x.unflatten(-1, (-1, self.config.head_width)).transpose(1, 2)
        return heads

    def reset_parameters(self) -> None:
        """Starts all weights anew, as building the layer does: the same seed gives the same weights.

        For layers that were built on the meta device and then given memory by ``to_empty``.

        Raises:
            UnsupportedError: If a module that has taken a projection's place cannot start anew; nothing is changed.
        """
        check_restart(self)
        for child in self.children():
            self.restart(child)

    def restart(self, child: nn.Module) -> None:
        """Starts the weights of one of the layer's modules anew, those of modules within it too."""
        for module in child.modules():
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()

    def runs_own(self, step: str, owner: type[nn.Module]) -> bool:
        """Whether a step is still that of a class, overridden neither by a subclass nor on this layer."""
        return step not in vars(self) and getattr(type(self), step) is getattr(owner, step)

    def heads_held(self, name: str, heads: int) -> int:
        """Of a projection's heads, how many are here: all, or a slice of them under tensor parallelism."""
        module = self.projection(name)
        return heads if module is None else heads_held(name, module, heads, self.config)

    def check_slice(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Raises unless the heads that are here, of ``[B, h, T, D]``, are all of them or a slice that fits together.

        Raises:
            UnsupportedError: If the variant cannot hold some of its heads only.
            ShapeError: If keys, values or the output's projection are sliced otherwise than queries.
        """
        held = (q.shape[1], k.shape[1], v.shape[1])
        if held == (self.config.num_heads, self.config.kv_heads, self.config.kv_heads):
            return
        if not self.splits_heads:
            whole = (self.config.num_heads, self.config.kv_heads)
            raise UnsupportedError(
                f"q_proj, k_proj, v_proj: expected all heads, {whole}, got {held}: {self.config.kind} does not run "
                "under tensor parallelism, since weights of its own belong to all heads; shard its parameters (FSDP)"
            )
        check_slice(self.config, held, self.projection("o_proj"), held[0] * v.shape[3])

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the layer computes in without autocast: of its weights, unless these are stored otherwise."""
        return computing_dtype(self._projections(), self.config.dim)

    @property
    def compute_device(self) -> torch.device:
        """Where the layer computes: with its weights, unless these are brought from elsewhere for each call."""
        return computing_device(self._projections())

    def _projections(self) -> list[nn.Module]:
        if self.projector is None:
            return [self.q_proj, *(child for child in self.children() if child is not self.q_proj)]
        known = (self.projector.module(name) for name in PROJECTIONS)
        return [*(module for module in known if module is not None), self.projector.source]

    def used_parameters(self) -> Iterator[nn.Parameter]:
        """All parameters that a call uses."""
        return (self if self.projector is None else self.projector.source).parameters()
