"""Whether an implementation computes on this machine what the reference computes in fp64 on a CPU.

The bounds are those of the tests: u is the unit roundoff, S the largest score that the inputs allow, M the largest
value of the result. fp64: ``1e-12 (1 + S) M``. fp32: ``32 u (1 + S) M``, since an error u S of a score becomes a
relative error of a weight. fp16 and bf16: ``4 u M``, for weights and results that are rounded. lse: ``16 u (1 + S)``
with u of fp32.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnzoo_kernels import BlockLayout, Extras, block_sparse_attention_with_lse, why_not

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
CASES = (
    "plain", "window and sink", "positions", "key bias", "auxiliary channels", "landmarks", "gate keys",
    "rotary origins", "decoding",
)  # fmt: skip
"""One call for each switch, and a decoding step. All have ragged tails and two query heads to a KV head."""

Job = tuple[torch.device, str, torch.dtype, str]
"""What is checked: device, implementation, dtype, case."""


@dataclass(frozen=True)
class CaseSizes:
    """Sizes of a call: B, H, G, S (and T, but for decoding), D, Dv, rows and keys of blocks."""

    batch: int = 1
    heads: int = 4
    groups: int = 2
    tokens: int = 45
    width: int = 16
    value_width: int = 16
    block_q: int = 16
    block_k: int = 16


@dataclass(frozen=True)
class CaseInputs:
    """A call, its tensors on one device.

    Attributes:
        q: ``[B, H, T, D]``.
        k: ``[B, G, S, D]``.
        v: ``[B, G, S, Dv]``.
        layout: Which blocks are read.
        causal: As in the call.
        extras: The switches.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    layout: BlockLayout
    causal: bool
    extras: Extras

    def to(self, dtype: torch.dtype, device: torch.device) -> CaseInputs:
        """The same call rounded to a dtype, on a device."""

        def move(x: Any) -> Any:
            return x.to(device, dtype) if isinstance(x, Tensor) else x

        e = self.extras
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        moved = replace(
            e,
            q_pos=None if e.q_pos is None else e.q_pos.to(device),
            key_bias=None if e.key_bias is None else e.key_bias.to(device, wide),
            aux=None if e.aux is None else (move(e.aux[0]), move(e.aux[1])),
            gate=move(e.gate),
            rope=None if e.rope is None else (e.rope[0].to(device, wide), e.rope[1].to(device, wide)),
        )
        return replace(
            self, q=move(self.q), k=move(self.k), v=move(self.v), layout=self.layout.to(device), extras=moved
        )

    @property
    def score(self) -> float:
        """A bound on scores."""
        longest = [float(x.double().norm(dim=-1).max()) for x in (self.q, self.k)]
        most = longest[0] * longest[1]
        if self.extras.aux is not None:
            parts = [float(x.double().norm(dim=-1).max()) for x in self.extras.aux]
            most += parts[0] * parts[1]
        bias = self.extras.key_bias
        added = 0.0 if bias is None else float(bias[bias.isfinite()].abs().max())
        return most / math.sqrt(self.q.shape[3]) + added


def make(name: str, sizes: CaseSizes = CaseSizes()) -> CaseInputs:
    """The inputs of a case, fp64 on the CPU."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    tokens = sizes.tokens
    heads = sizes.heads
    groups = sizes.groups
    block_k = sizes.block_k
    rows = 1 if name == "decoding" else tokens
    block_q = min(sizes.block_q, rows)
    q = normal(sizes.batch, heads, rows, sizes.width)
    k = normal(sizes.batch, groups, tokens, sizes.width)
    v = normal(sizes.batch, groups, tokens, sizes.value_width)
    blocks = -(-tokens // block_k)
    keep = torch.rand(1, groups, -(-rows // block_q), blocks, generator=generator, device="cpu") < 0.7
    # Rows that read everything, and rows that do not, some perhaps nothing.
    keep[:, 0] = True
    keep[:, -1, -1, 0] = False
    layout = BlockLayout.from_mask(keep, block_q, block_k, rows, tokens)
    bias = normal(1, 1, tokens)
    bias[..., ::7] = -math.inf
    q_pos = torch.arange(rows, dtype=torch.int32, device="cpu").view(1, 1, -1) - 2
    made: dict[str, Callable[[], Extras]] = {
        "plain": Extras,
        "decoding": Extras,
        "window and sink": lambda: Extras(window=max(2, tokens // 5), sink=3),
        "positions": lambda: Extras(q_pos=q_pos.clamp(min=-1)),
        "key bias": lambda: Extras(key_bias=bias),
        "auxiliary channels": lambda: Extras(
            aux=(normal(sizes.batch, heads, rows, 8), normal(sizes.batch, groups, tokens, 8))
        ),
        "landmarks": lambda: Extras(gate="last", gate_mix=0.5),
        "gate keys": lambda: Extras(gate=normal(sizes.batch, groups, blocks, sizes.width)),
        "rotary origins": lambda: Extras(rope=_tables(blocks, sizes.width // 2)),
    }
    if name == "rotary origins":
        lists = (layout.start, layout.count, layout.col, layout.col.clone())
        layout = BlockLayout(block_q, block_k, rows, tokens, *lists)
    return CaseInputs(q, k, v, layout, True, made[name]())


def _tables(blocks: int, planes: int) -> tuple[Tensor, Tensor]:
    block = torch.arange(blocks, dtype=torch.float64, device="cpu").unsqueeze(1)
    angle = block * torch.linspace(0.3, 1.0, planes, device="cpu")
    return angle.cos(), angle.sin()


def solve(given: CaseInputs, impl: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Results and gradients of a call, fp64 on the CPU, by name; what comes in from above is rounded to ``dtype``."""
    names = ["q", "k", "v"]
    # detach keeps strides that clone would tidy up.
    leaves = [x.detach().requires_grad_() for x in (given.q, given.k, given.v)]
    e = given.extras

    def leaf(name: str, x: Tensor) -> Tensor:
        names.append(name)
        leaves.append(x.detach().requires_grad_())
        return leaves[-1]

    if e.key_bias is not None:
        e = replace(e, key_bias=leaf("key_bias", e.key_bias))
    if e.aux is not None:
        e = replace(e, aux=(leaf("q_aux", e.aux[0]), leaf("k_aux", e.aux[1])))
    if isinstance(e.gate, Tensor):
        e = replace(e, gate=leaf("gate", e.gate))
    out, lse = block_sparse_attention_with_lse(
        leaves[0], leaves[1], leaves[2], given.layout, causal=given.causal, extras=e, impl=impl
    )
    weights = torch.linspace(-1, 2, out.numel(), dtype=torch.float64, device=out.device).view_as(out)
    pull = torch.linspace(1, -1, lse.numel(), dtype=torch.float64, device=lse.device).view_as(lse)
    loss = (out.double() * weights.to(dtype)).sum() + (torch.where(lse.isfinite(), lse, 0.0) * pull).sum()
    gradients = torch.autograd.grad(loss, leaves)
    found = {"out": out, "lse": lse, **{f"d{name}": x for name, x in zip(names, gradients, strict=True)}}
    return {name: x.detach().to("cpu", torch.float64) for name, x in found.items()}


@dataclass(frozen=True)
class Check:
    """What one case showed.

    Attributes:
        device: Where.
        impl: Which implementation.
        dtype: Of the inputs.
        case: Which call.
        quantity: The result or gradient that is worst against its bound.
        error: Its largest error.
        limit: Its bound.
        problem: What went wrong otherwise: an exception, or other empty rows.
        seconds: How long it took.
    """

    device: str
    impl: str
    dtype: str
    case: str
    quantity: str = ""
    error: float = math.inf
    limit: float = 0.0
    problem: str | None = None
    seconds: float = 0.0

    @property
    def holds(self) -> bool:
        """Whether everything is within its bound."""
        return self.problem is None and self.error <= self.limit


def compare(found: dict[str, Tensor], truth: dict[str, Tensor], dtype: torch.dtype, score: float) -> dict[str, Any]:
    """The fields of a check: the worst quantity, its error and limit, and what else is wrong."""
    worst: dict[str, Any] = {"quantity": "", "error": 0.0, "limit": 0.0}
    ratio = -1.0
    for name, true in truth.items():
        mine = found[name]
        if not torch.equal(mine == -math.inf, true == -math.inf) or bool(mine.isnan().any()):
            return {**worst, "quantity": name, "problem": f"{name}: NaN, or -inf for other rows than the empty ones"}
        error = float((mine - true)[true.isfinite()].abs().max())
        limit = _limit(name, float(true[true.isfinite()].abs().max()), dtype, score)
        if error / limit > ratio:
            ratio = error / limit
            worst = {"quantity": name, "error": error, "limit": limit}
    return worst


def _limit(name: str, largest: float, dtype: torch.dtype, score: float) -> float:
    if dtype == torch.float64:
        return 1e-12 * (1 + score) * (1.0 if name == "lse" else largest)
    if name == "lse":
        return 16 * UNIT[torch.float32] * (1 + score)
    return (32 * (1 + score) if dtype == torch.float32 else 4) * UNIT[dtype] * largest


def dtypes_of(impl: str, device: torch.device) -> tuple[torch.dtype, ...]:
    """What an implementation is tried in on a device."""
    if impl == "triton":
        # The interpreter takes ten milliseconds for a tile, whatever the dtype: one must do, and fp64 shows most.
        return (torch.float64,) if device.type == "cpu" else (torch.float32, torch.float16, torch.bfloat16)
    return (torch.float64, torch.float32, torch.bfloat16) if device.type == "cpu" else (torch.float32, torch.bfloat16)


def jobs(devices: list[torch.device]) -> list[Job]:
    """Everything that is checked on some devices, as far as it runs there."""
    return [
        (device, impl, dtype, case)
        for device in devices
        for impl in ("reference", "blocked", "triton")
        for dtype in dtypes_of(impl, device)
        for case in CASES
    ]


def run(devices: list[torch.device], progress: Callable[[str, int, int], None]) -> Iterator[Check]:
    """Checks each implementation on each device, as far as it runs there.

    Args:
        devices: Where.
        progress: Called with (what, done, total).
    """
    yield from run_jobs(jobs(devices), progress)


def run_jobs(chosen: Sequence[Job], progress: Callable[[str, int, int], None] = lambda *_: None) -> Iterator[Check]:
    """Checks what :func:`jobs` lists, or some of it; nothing comes of a job that does not run."""
    truths: dict[tuple[torch.dtype, str], dict[str, Tensor]] = {}
    cpu = torch.device("cpu")
    for done, (device, impl, dtype, case) in enumerate(chosen):
        progress(f"{impl} on {device}", done, len(chosen))
        given = make(case).to(dtype, device)
        if why_not(impl, given.q, given.k, given.v, given.layout, causal=given.causal, extras=given.extras):
            continue
        if (dtype, case) not in truths:
            truths[dtype, case] = solve(make(case).to(dtype, cpu).to(torch.float64, cpu), "reference", dtype)
        yield _check((device, impl, dtype, case), given, truths[dtype, case])


def _check(of: tuple[torch.device, str, torch.dtype, str], given: CaseInputs, truth: dict[str, Tensor]) -> Check:
    device, impl, dtype, case = of
    begin = time.perf_counter()
    named = (str(device), impl, str(dtype).removeprefix("torch."), case)
    try:
        fields = compare(solve(given, impl, dtype), truth, dtype, given.score)
    except Exception as error:  # whatever it is, it is what was asked for: reported, and the exit code is 1
        lines = str(error).strip().splitlines() or [""]
        fields = {"problem": f"{type(error).__name__}: {lines[0]}"}
    return Check(*named, **fields, seconds=time.perf_counter() - begin)
