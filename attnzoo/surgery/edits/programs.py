"""Models that are compiled already: their programs do not look for hooks that come later."""

from __future__ import annotations

import torch
from torch import nn

from attnzoo_kernels.errors import UnsupportedError


def refuse_compiled(model: nn.Module) -> None:
    """Raises where a model, or a part of it, has been given to ``torch.compile``.

    Raises:
        UnsupportedError: If so.
    """
    compiled = torch._dynamo.eval_frame.OptimizedModule
    for path, module in model.named_modules():
        if isinstance(module, compiled) or getattr(module, "_compiled_call_impl", None) is not None:
            raise UnsupportedError(
                f"model: {path or type(module).__name__} is compiled, and its program does not look for what is put "
                "round its modules later; edit the model that was compiled, uncompiled, or fold the edits"
            )
