"""What is asked for when layers are measured, and what is found of each.

Letters: B batch, T tokens, C model width, H query heads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnzoo.reporting.choices import check_choice, hint
from attnzoo_kernels.errors import ConfigError

KINDS = ("forward", "step", "decode")
"""A forward pass without a graph; forward and backward of inputs and weights; one more token with a cache."""

BOUND = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference to the reference, over the largest value of each result: a layer's roundings, gradients' too."""


SHORT = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""Other names of dtypes."""


@dataclass(frozen=True)
class CostSetting:
    """What is measured.

    Attributes:
        tokens: T; a decoding step has nearly as many behind it.
        batch: B.
        dim: C.
        num_heads: H.
        num_kv_heads: KV heads; ``None`` means each variant's default, and H for the ten lines of torch.
        dtype: Of inputs and weights.
        device: Where.
        impl: Which implementation of the operation, as a layer's attribute.
        seconds: About how long each figure is measured.

    Raises:
        ConfigError: If a size is below 1, or the dtype is none that layers compute in.
    """

    tokens: int = 2048
    batch: int = 1
    dim: int = 512
    num_heads: int = 8
    num_kv_heads: int | None = None
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    impl: str = "auto"
    seconds: float = 1.0

    def __post_init__(self) -> None:
        for name in ("tokens", "batch", "dim", "num_heads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not self.seconds >= 0:
            raise ConfigError(f"seconds: expected at least 0, got {self.seconds}")
        if self.dtype not in BOUND:
            raise ConfigError(f"dtype: expected one of {', '.join(map(str, BOUND))}, got {self.dtype}")

    def inputs(self, tokens: int) -> Tensor:
        """Normal tokens ``[B, tokens, C]``."""
        generator = torch.Generator("cpu").manual_seed(1)
        normal = torch.randn(self.batch, tokens, self.dim, generator=generator, device="cpu")
        return normal.to(self.device, self.dtype)

    def heads(self) -> dict[str, Any]:
        """Options that every layer gets."""
        own = {} if self.num_kv_heads is None else {"num_kv_heads": self.num_kv_heads}
        return {"dim": self.dim, "num_heads": self.num_heads, **own}


@dataclass
class Cost:
    """What one layer costs.

    Attributes:
        name: As it was asked for.
        density: Visible pairs over those of causal attention, in a forward pass.
        error: Largest difference to the reference over the largest value.
        checked: Tokens on which it was checked.
        problem: Why nothing was measured; no time is given of a layer that is wrong.
        milliseconds: For each of ``KINDS``, the median.
        times_baseline: The same over ten lines of torch in the same rounds, the median of ratios.
    """

    name: str
    density: float | None = None
    error: float | None = None
    checked: int = 0
    problem: str | None = None
    milliseconds: dict[str, float] = field(default_factory=dict)
    times_baseline: dict[str, float] = field(default_factory=dict)


def read_dtype(text: str) -> torch.dtype:
    """A dtype that layers compute in, by its name in torch or a short one.

    Raises:
        ConfigError: If it is another.
    """
    names = {str(dtype).removeprefix("torch."): dtype for dtype in BOUND}
    name = SHORT.get(text, text)
    check_choice("dtype", name, names)
    return names[name]


def read_device(text: str) -> torch.device:
    """A CPU, or a CUDA or ROCm device that is there.

    Raises:
        ConfigError: If it is another, or is not there.
    """
    kind, _, index = text.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise ConfigError(f"device: expected cpu, cuda or cuda:<number>, got {text!r}{hint(text, ('cpu', 'cuda'))}")
    found = torch.cuda.device_count()
    if kind == "cuda" and int(index or 0) >= found:
        here = f"it finds {', '.join(f'cuda:{n}' for n in range(found))}" if found else "it finds no GPU here: use cpu"
        raise ConfigError(f"device: expected one that torch finds, got {text!r}; {here}")
    return torch.device(text)
