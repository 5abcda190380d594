"""What a layer is as a module, beside its steps: weights that start anew, compute somewhere, and are told about."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from attnzoo.base.config import AttentionConfig
from attnzoo.base.projections import check_restart, check_slice, computing_device, computing_dtype, heads_held
from attnzoo.reporting.warn import warn_caller
from attnzoo_kernels import traceable
from attnzoo_kernels.errors import UnsupportedError


class WeightedModule(nn.Module):
    """A module of projections made by a configuration.

    Attributes:
        config: The configuration; frozen.
        splits_heads: Whether a layer may hold some of the heads, as under tensor parallelism; sharded parameters (FSDP)
            are no matter.
    """

    splits_heads: ClassVar[bool] = True

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
        return heads_held(name, getattr(self, name), heads, self.config)

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
        check_slice(self.config, held, self.o_proj, held[0] * v.shape[3])

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the layer computes in without autocast: of its weights, unless these are stored otherwise."""
        return computing_dtype(self._projections(), self.config.dim)

    @property
    def compute_device(self) -> torch.device:
        """Where the layer computes: with its weights, unless these are brought from elsewhere for each call."""
        return computing_device(self._projections())

    def _projections(self) -> list[nn.Module]:
        return [self.q_proj, *(child for child in self.children() if child is not self.q_proj)]
