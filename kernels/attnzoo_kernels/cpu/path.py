"""What a path of the CPU is: one way to compute calls, which says which calls are not for it."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from attnzoo_kernels.spec.call import Call

Gradients = tuple[Tensor | None, ...]
"""Of q, k, v, key_bias, q_aux, k_aux and the gate's keys, each ``None`` where it is not wanted."""


class CPUPath(ABC):
    """One way to compute calls on CPUs.

    Paths are asked in order, in two steps. First ``reasons`` and ``backward_reasons``, which read metadata alone: they
    are sentences for people, and none of them means that the call is of the path's kind. Then the path itself, which
    may still give up with ``None`` at what only values say: lists that it cannot or should not follow, or a result
    that is not finite, which something hidden may have spoiled. The next path then computes the call.

    Attributes:
        name: What tests, benches and the doctor call it.
    """

    name: str

    @abstractmethod
    def reasons(self, call: Call, *, need_lse: bool = False) -> tuple[str, ...]:
        """Why a forward is not computed here; empty if it is. Reads metadata alone."""

    @abstractmethod
    def forward(self, call: Call, *, need_lse: bool) -> tuple[Tensor, Tensor] | None:
        """Out ``[B, H, T, Dv]`` and lse ``[B, H, T]`` (empty where not needed), or ``None`` where it gives up."""

    def declines(self, call: Call) -> bool:
        """Whether the path gives up at the lists of a call without reasons. Reads values: for reports alone."""
        return False

    def keeps_results(self, call: Call) -> bool:
        """Whether its backward wants what the forward found."""
        return False

    def backward_reasons(self, call: Call, *, dlse: bool = False) -> tuple[str, ...]:
        """Why a backward is not computed here; empty if it is. ``dlse``: whether lse has a gradient."""
        return (f"{self.name}: it has no backward of its own",)

    def backward(
        self,
        call: Call,
        results: tuple[Tensor | None, Tensor | None],
        *,
        dout: Tensor | None,
        dlse: Tensor | None,
        need: list[bool],
    ) -> Gradients | None:
        """Gradients, or ``None`` where it gives up.

        Args:
            call: The call.
            results: Out and lse of the forward, by whatever path; ``None`` where they were not kept.
            dout: Gradient of out, or ``None`` for zeros.
            dlse: Gradient of lse, or ``None`` for zeros.
            need: Which gradients are wanted.
        """
        return None


class FromResultsPath(CPUPath):
    """A path whose backward reads what the forward found, and gives gradients of q, k and v alone."""

    def backward(
        self,
        call: Call,
        results: tuple[Tensor | None, Tensor | None],
        *,
        dout: Tensor | None,
        dlse: Tensor | None,
        need: list[bool],
    ) -> Gradients | None:
        """As :meth:`gradients`; ``None`` too where results were not kept, or where out has no gradient."""
        out, lse = results
        if out is None or lse is None or dout is None:
            return None
        grads = self.gradients(call, (out, lse), dout)
        return None if grads is None else wanted(grads, need)

    @abstractmethod
    def gradients(
        self, call: Call, results: tuple[Tensor, Tensor], dout: Tensor
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Gradients of q, k and v from that of out, or ``None`` where it gives up."""


def wanted(grads: tuple[Tensor, Tensor, Tensor], need: list[bool]) -> Gradients:
    """Gradients of q, k and v as a path gives them: those that are needed, and none of anything else."""
    return (*(grad if needed else None for grad, needed in zip(grads, need, strict=False)), *[None] * 4)
