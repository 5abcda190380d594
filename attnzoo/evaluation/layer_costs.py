"""What layers cost on this machine beside plain attention on torch's own operation, and whether they compute right.

Letters: B batch, T tokens, C model width, H query heads.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from attnzoo.base.layer import AttentionInputs, AttentionLayer, Plan
from attnzoo.evaluation import timing
from attnzoo.factory import create, read_spec
from attnzoo.reporting.choices import check_choice
from attnzoo.reporting.warn import silent
from attnzoo.variants.mha import MHAAttention
from attnzoo_kernels.errors import ConfigError, UnsupportedError

KINDS = ("forward", "step", "decode")
"""A forward pass without a graph; forward and backward of inputs and weights; one more token with a cache."""

BOUND = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference to the reference, over the largest value of each result: a layer's roundings, gradients' too."""

CHECKED_SCORES = 2**26
"""Scores that the reference may hold at once: longer inputs are checked on their first tokens."""

LEAST_VALUE = 1e-2
"""What counts as the largest value where all are smaller: gradients that cancel are nothing but roundings."""

LEAST = 5
MOST = 100
"""Rounds."""

PLAIN = "plain attention"
SPECS = (
    "mha",
    "mha:window=512,sink=4",
    "s2:local_blocks=4,vert_stride=4",
    "lowrank_gqa",
    "moh",
    "longheads:attention_length=512,chunk_size=64",
    "landmark",
    "rcmha",
)
"""What is measured if nothing is asked for: every variant, at options where it is sparse at 2,048 tokens."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class CostSetting:
    """What is measured.

    Attributes:
        tokens: T; a decoding step has as many in its cache.
        batch: B.
        dim: C.
        num_heads: H.
        num_kv_heads: KV heads; ``None`` means each variant's default, and H for plain attention.
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
        density: Visible pairs over those of plain attention, in a forward pass.
        error: Largest difference to the reference over the largest value.
        checked: Tokens on which it was checked.
        problem: Why nothing was measured; no time is given of a layer that is wrong.
        milliseconds: For each of ``KINDS``, the median.
        times_plain: The same over plain attention in the same rounds, the median of ratios.
    """

    name: str
    density: float | None = None
    error: float | None = None
    checked: int = 0
    problem: str | None = None
    milliseconds: dict[str, float] = field(default_factory=dict)
    times_plain: dict[str, float] = field(default_factory=dict)


class PlainAttention(MHAAttention):
    """Plain attention on ``scaled_dot_product_attention``: what every variant is measured against."""

    def operate(self, inputs: AttentionInputs, plan: Plan) -> Tensor:
        """Torch's own operation: all tokens of one sequence, or one more token."""
        q = inputs.q
        k = inputs.k
        v = inputs.v
        causal = q.shape[2] > 1
        grouped = q.shape[1] != k.shape[1]
        return scaled_dot_product_attention(q, k, v, is_causal=causal, scale=self.config.scale, enable_gqa=grouped)


def read_dtype(text: str) -> torch.dtype:
    """A dtype that layers compute in, by its name in torch.

    Raises:
        ConfigError: If it is another.
    """
    names = {str(dtype).removeprefix("torch."): dtype for dtype in BOUND}
    check_choice("dtype", text, names)
    return names[text]


def read_device(text: str) -> torch.device:
    """A CPU, or a CUDA or ROCm device that is there.

    Raises:
        ConfigError: If it is another, or is not there.
    """
    kind, _, index = text.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise ConfigError(f"device: expected cpu, cuda or cuda:<number>, got {text!r}")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device: expected one that torch finds, got {text!r}; it finds {torch.cuda.device_count()}")
    return torch.device(text)


def build(setting: CostSetting, specs: list[str]) -> dict[str, AttentionLayer]:
    """A layer for each ``variant:option=value,...``; all are built before anything is measured.

    Raises:
        ConfigError: If a spec is wrong, or an option does not fit the setting.
    """
    layers = {}
    for spec in specs:
        variant, options = read_spec(spec)
        with _seeded():
            layers[spec] = create(variant, **{**setting.heads(), **options}, device=setting.device, dtype=setting.dtype)
        config = layers[spec].config
        if config.dim != setting.dim or not config.causal:
            raise ConfigError(f"variants: expected causal layers of dim {setting.dim}, got {spec!r}")
        layers[spec].impl = setting.impl
    return layers


def by_wall(device: torch.device) -> bool:
    """Whether wall time counts: of one thread on a shared machine, the time that it really ran says more."""
    return device.type != "cpu" or torch.get_num_threads() > 1


@silent()
def measure(setting: CostSetting, specs: list[str], progress: Progress) -> list[Cost]:
    """What each layer costs; plain attention comes first.

    Raises:
        ConfigError: Before anything is measured, if a spec is wrong.
    """
    layers = build(setting, specs)
    with _seeded():
        plain = PlainAttention(**setting.heads(), device=setting.device, dtype=setting.dtype)
    costs = []
    runs_of_plain = {kind: list[float]() for kind in KINDS}
    total = len(layers) * (1 + len(KINDS))
    for row, (name, layer) in enumerate(layers.items()):
        done = row * (1 + len(KINDS))
        progress(f"{name}: check", done, total)
        cost = check(name, layer, setting)
        costs.append(cost)
        for step, kind in enumerate(KINDS if cost.problem is None else ()):
            progress(f"{name}: {kind}", done + 1 + step, total)
            contestants = {name: prepare(kind, layer, setting) for name, layer in (("this", layer), ("plain", plain))}
            found = timing.rounds(
                contestants, wall=by_wall(setting.device), seconds=setting.seconds, least=LEAST, most=MOST
            )
            cost.milliseconds[kind] = statistics.median(found["this"])
            cost.times_plain[kind] = timing.paired(found, "this", "plain")
            runs_of_plain[kind] += found["plain"]
    own = {kind: statistics.median(runs) for kind, runs in runs_of_plain.items() if runs}
    return [Cost(PLAIN, density=1.0, milliseconds=own, times_plain=dict.fromkeys(own, 1.0)), *costs]


def check(name: str, layer: AttentionLayer, setting: CostSetting) -> Cost:
    """Density and error of a layer, and the problem where it differs from the reference implementation.

    Training, gradients, a forward pass and a decoding step, with the same weights, inputs and cache.
    """
    each = setting.batch * layer.config.num_heads
    tokens = min(setting.tokens, max(2, int((CHECKED_SCORES / each) ** 0.5)))
    try:
        found, wanted = (_results(layer, impl, setting, tokens) for impl in (setting.impl, "reference"))
    except UnsupportedError as error:
        return Cost(name, problem=str(error))
    errors = {what: _difference(found[what], wanted[what]) for what in wanted}
    worst = max(errors, key=lambda what: errors[what])
    bound = BOUND[setting.dtype]
    problem = None
    if errors[worst] > bound:
        problem = f"wrong: {worst} is off by {errors[worst]:.1e} of the largest value, {bound:.0e} is right"
    with torch.no_grad():
        density = layer.eval().attend(setting.inputs(setting.tokens)).plan.density
    return Cost(name=name, density=density, error=errors[worst], checked=tokens, problem=problem)


def _results(layer: AttentionLayer, impl: str, setting: CostSetting, tokens: int) -> dict[str, Tensor]:
    """Everything that a layer computes, by name; what a decoding step finds in its cache does not depend on impl."""
    x = setting.inputs(tokens)
    cache = layer.new_cache(setting.batch, tokens, device=setting.device, dtype=setting.dtype)
    with torch.no_grad():
        layer.eval()(x[:, : tokens - 1], cache=cache)
    layer.impl = impl
    try:
        with torch.no_grad():
            found = {"decode": layer(x[:, tokens - 1 :], cache=cache), "forward": layer(x)}
        out, gradients = _train(layer.train(), x.requires_grad_())
    finally:
        layer.impl = setting.impl
    names = ("x", *(name for name, _ in _weights(layer)))
    gradients_by_name = {f"gradient of {name}": value for name, value in zip(names, gradients, strict=True)}
    return {**found, "training": out.detach(), **gradients_by_name}


def _train(layer: AttentionLayer, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The output, and gradients of x and all weights, those of an auxiliary loss included."""
    result = layer.attend(x)
    leaves = [x, *(weight for _, weight in _weights(layer))]
    ends = [result.out]
    weights = [torch.ones_like(result.out)]
    aux = result.plan.aux_loss
    if aux is not None and aux.requires_grad:
        ends = [*ends, aux]
        weights = [*weights, torch.ones_like(aux)]
    return result.out, torch.autograd.grad(ends, leaves, weights, materialize_grads=True, allow_unused=True)


def _weights(layer: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, weight) for name, weight in layer.named_parameters() if weight.requires_grad]


def _difference(found: Tensor, wanted: Tensor) -> float:
    """The largest difference over the largest value; infinite where it is no number."""
    worst = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=LEAST_VALUE))
    return math.inf if math.isnan(worst) else worst


def prepare(kind: str, layer: AttentionLayer, setting: CostSetting) -> Callable[[], Any]:
    """One of ``KINDS`` to be timed; what it returns is done when it returns."""
    x = setting.inputs(setting.tokens)
    if kind == "step":
        x.requires_grad_()
        layer.train()
        return _until_done(lambda: _train(layer, x), setting.device)
    layer.eval()
    if kind == "forward":
        return _until_done(lambda: layer(x), setting.device, grad=False)
    cache = layer.new_cache(setting.batch, setting.tokens + MOST + 2, device=setting.device, dtype=setting.dtype)
    with torch.no_grad():
        layer(x, cache=cache)
    return _until_done(lambda: layer(x[:, :1], cache=cache), setting.device, grad=False)


def _until_done(run: Callable[[], Any], device: torch.device, *, grad: bool = True) -> Callable[[], Any]:
    def finish() -> Any:
        with torch.set_grad_enabled(grad):
            found = run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return found

    return finish


@contextmanager
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
