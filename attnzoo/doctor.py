"""What is installed, what would run on which device and why nothing else, what is known not to go together.

Everything is read without importing triton or transformers: both take seconds, and a doctor must not fall ill itself.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch

from attnzoo.reporting.versions import FLOORS, TESTED, TRANSFORMERS, release, untested_transformers
from attnzoo_kernels import BlockLayout, selftest, why_not
from attnzoo_kernels._triton import tile_table
from attnzoo_kernels.cpu import PATHS
from attnzoo_kernels.runtime import processor

PEERS = ("xformers", "flash-attn")
LEVELS = ("problem", "untested", "note")
IMPLEMENTATIONS = ("reference", "blocked", "triton")
PATH_CALLS = (
    ("long calls in fp32", 1024, torch.float32),
    ("long calls in bf16", 1024, torch.bfloat16),
    ("short calls in fp32", 64, torch.float32),
)
"""Kinds of calls, their tokens and dtypes, for which the paths of the CPU are told."""


@dataclass(frozen=True)
class Environment:
    """What findings go by.

    Attributes:
        versions: By package; ``None`` where it is not installed.
        cuda: The CUDA or ROCm version that torch was built with, or ``None``.
        devices: CUDA or ROCm devices that torch finds.
        interpret: Whether TRITON_INTERPRET is 1.
        interpret_late: Whether it was set after triton was imported.
        cpu_class: The CPU's class.
        cpu_precision: How oneDNN multiplies fp32, for the whole process.
        gpu_precision: How cuBLAS multiplies fp32, for the whole process.
        xformers_build: The CUDA version that xformers was built with, or ``None``.
    """

    versions: dict[str, str | None]
    cuda: str | None
    devices: int
    interpret: bool
    interpret_late: bool
    cpu_class: str
    cpu_precision: str
    gpu_precision: str
    xformers_build: str | None


@dataclass(frozen=True)
class Finding:
    """Something known not to go together, or not known to.

    Attributes:
        level: "problem": wrong or no results, or something that will not run; "untested": nobody has looked whether it
            runs; "note": worth knowing.
        what: What was found.
        remedy: What helps.
    """

    level: str
    what: str
    remedy: str


@dataclass(frozen=True)
class Device:
    """A device and what runs there.

    Attributes:
        name: As torch names it.
        facts: What it is.
        runs: The implementation that "auto" stands for.
        refused: Implementations that do not run, and why.
        paths: Of a CPU, by kind of call: each path of the blocked implementation in the order in which they are asked,
            and why a call of this kind is not for it. The first without a reason computes the call.
    """

    name: str
    facts: dict[str, Any]
    runs: str
    refused: dict[str, tuple[str, ...]]
    paths: dict[str, dict[str, tuple[str, ...]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What the doctor found.

    Attributes:
        versions: By package; ``None`` where it is not installed.
        devices: The CPU first.
        findings: Problems first.
        checks: The self-test.
        seconds: How long each part took.
    """

    versions: dict[str, str | None]
    devices: list[Device]
    findings: list[Finding]
    checks: list[selftest.Check]
    seconds: dict[str, float]

    @property
    def healthy(self) -> bool:
        """Whether every implementation that runs here computes what it should, with versions that were tested."""
        return not self.wrong and not any(finding.level == "untested" for finding in self.findings)

    @property
    def wrong(self) -> bool:
        """Whether an implementation computes what it should not."""
        return not all(check.holds for check in self.checks)

    @property
    def verdict(self) -> str:
        """The report in two words."""
        if self.wrong:
            return "not healthy"
        return "healthy" if self.healthy else "untested versions"

    def to_dict(self) -> dict[str, Any]:
        """Plain data; infinite errors are ``None``, which JSON has a word for."""
        data = {**asdict(self), "healthy": self.healthy}
        for row, check in zip(data["checks"], self.checks, strict=True):
            row["holds"] = check.holds
            row["error"] = check.error if check.problem is None else None
        return data


def versions() -> dict[str, str | None]:
    """Python and the packages that matter, without importing any."""
    found: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "transformers", "numpy", "einops", *PEERS):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    if torch.version.hip is not None and found["triton"] is None:
        try:
            found["triton"] = version("pytorch-triton-rocm")
        except PackageNotFoundError:
            found["triton"] = None
    return found


def environment() -> Environment:
    """What findings go by, here and now."""
    settings = cast("Any", torch.backends)
    return Environment(
        versions=versions(),
        cuda=torch.version.cuda or torch.version.hip,
        devices=torch.cuda.device_count() if torch.cuda.is_available() else 0,
        interpret=os.environ.get("TRITON_INTERPRET") == "1",
        interpret_late=any("after triton was imported" in reason for reason in _reasons("triton", torch.device("cpu"))),
        cpu_class=processor.cpu_class(),
        cpu_precision=settings.mkldnn.matmul.fp32_precision,
        gpu_precision=settings.cuda.matmul.fp32_precision,
        xformers_build=_xformers_build(),
    )


def _xformers_build() -> str | None:
    """The CUDA version in xformers' own note, such as "12.8"; importing it would import triton."""
    spec = find_spec("xformers")
    if spec is None or spec.origin is None:
        return None
    note = Path(spec.origin).parent / "cpp_lib.json"
    if not note.is_file():
        return None
    built = json.loads(note.read_text("utf-8")).get("version", {}).get("cuda")
    return f"{built // 100}.{built % 100}" if isinstance(built, int) else None


def findings(env: Environment) -> list[Finding]:
    """What is known not to go together, problems first."""
    found = [*_old(env), *_new(env), *_interpreter(env), *_precision(env), *_builds(env)]
    return sorted(found, key=lambda finding: LEVELS.index(finding.level))


def _old(env: Environment) -> list[Finding]:
    found = []
    for name, floor in FLOORS.items():
        have = env.versions.get(name)
        if have is None:
            if name in ("numpy", "einops"):
                found.append(Finding("problem", f"{name} is not installed", f"pip install '{name}>={floor}'"))
            continue
        if release(have) < release(floor):
            found.append(Finding("problem", f"{name} {have} is older than {floor}", f"pip install '{name}>={floor}'"))
        elif release(have)[:2] != release(TESTED[name])[:2] and not (name == "transformers" and _new(env)):
            tested = TESTED[name]
            word = "older" if release(have) < release(tested) else "newer"
            found.append(
                Finding("note", f"{name} {have} is {word} than {tested}, which the tests run with", "none needed")
            )
    return found


def _new(env: Environment) -> list[Finding]:
    """Versions that came after the tests; of other packages than transformers no call of theirs is taken over."""
    have = env.versions.get("transformers")
    news = untested_transformers(have)
    if have is None or news is None or release(have) < release(FLOORS["transformers"]):
        return []
    tested = f"{TRANSFORMERS[0]},<={TRANSFORMERS[-1]}"
    return [Finding("untested", news, f"pip install 'transformers>={tested}', or compare a converted model's logits")]


def _interpreter(env: Environment) -> list[Finding]:
    if not env.interpret:
        return []
    found = []
    triton, numpy = (env.versions.get(name) for name in ("triton", "numpy"))
    if env.interpret_late:
        found.append(
            Finding("problem", "TRITON_INTERPRET was set after triton was imported", "set it before Python starts")
        )
    if triton and numpy and release(triton) < (3, 7) and release(numpy) >= (2, 4):
        found.append(
            Finding(
                "problem",
                f"the interpreter of triton {triton} cannot count loops with numpy {numpy}",
                "pip install 'numpy<2.4', or a newer triton",
            )
        )
    if env.devices:
        found.append(
            Finding(
                "problem",
                "TRITON_INTERPRET=1 on a machine with a GPU: kernels run in Python, thousands of times slower",
                "unset TRITON_INTERPRET",
            )
        )
    if triton:
        found.append(
            Finding(
                "note",
                f"the interpreter of triton {triton} computes bf16 wrongly; attnzoo's kernels compute it in fp32 there",
                "none needed here; kernels of others need the same care",
            )
        )
    return found


def _precision(env: Environment) -> list[Finding]:
    found = []
    if env.cpu_class == "amx" and env.cpu_precision == "bf16":
        found.append(
            Finding(
                "problem",
                "this CPU has AMX and oneDNN's fp32_precision is bf16: fp32 products are rounded to bf16",
                "torch.backends.mkldnn.matmul.fp32_precision = 'none'",
            )
        )
    if env.cpu_class != "amx" and env.cpu_precision == "tf32":
        found.append(
            Finding(
                "note",
                "oneDNN's fp32_precision is tf32 for the whole process",
                "torch.backends.mkldnn.matmul.fp32_precision = 'none'",
            )
        )
    if env.devices and env.gpu_precision == "tf32":
        found.append(
            Finding(
                "note",
                "fp32 products on the GPU are rounded to tf32, and attnzoo's kernels follow: errors of 1e-3",
                "torch.backends.cuda.matmul.fp32_precision = 'ieee'",
            )
        )
    return found


def _builds(env: Environment) -> list[Finding]:
    found = []
    xformers, triton = (env.versions.get(name) for name in ("xformers", "triton"))
    if xformers and env.cuda is None:
        built = f", built for CUDA {env.xformers_build}," if env.xformers_build else ""
        found.append(
            Finding(
                "note", f"xformers {xformers}{built} has no operators for this torch: none run on CPUs", "none needed"
            )
        )
    if env.devices and triton is None:
        found.append(
            Finding("problem", "there is a GPU and no triton: calls run on the blocked path", "pip install triton")
        )
    if env.cuda is not None and not env.devices:
        found.append(
            Finding("note", f"torch was built for CUDA or ROCm {env.cuda} and finds no device", "look at the driver")
        )
    return found


def _reasons(impl: str, device: torch.device) -> tuple[str, ...]:
    """Why an implementation cannot run a small call in fp32 on a device."""
    given = selftest.make("plain").to(torch.float32, device)
    return why_not(impl, given.q, given.k, given.v, given.layout)


def _device(name: str, facts: dict[str, Any]) -> Device:
    place = torch.device(name)
    reasons = {impl: _reasons(impl, place) for impl in IMPLEMENTATIONS}
    # As dispatch.choose: never the interpreter unasked.
    runs = "triton" if place.type == "cuda" and not reasons["triton"] else "blocked"
    return Device(name, facts, runs, {impl: why for impl, why in reasons.items() if why})


def _paths() -> dict[str, dict[str, tuple[str, ...]]]:
    """Which path of the CPU takes dense calls of some kinds, and why others do not; from metadata alone."""
    found = {}
    for what, tokens, dtype in PATH_CALLS:
        q, k, v = (torch.empty(1, 1, tokens, 64, dtype=dtype, device="cpu") for _ in range(3))
        layout = BlockLayout.dense(64, 64, tokens, tokens, device="cpu")
        found[what] = {path.name: why_not(f"blocked/{path.name}", q, k, v, layout) for path in PATHS}
    return found


def devices() -> list[Device]:
    """The CPU, and each CUDA or ROCm device."""
    found = [replace(_device("cpu", _cpu_facts()), paths=_paths())]
    if torch.cuda.is_available():
        found += [_device(f"cuda:{i}", _gpu_facts(i)) for i in range(torch.cuda.device_count())]
    return found


def _cpu_facts() -> dict[str, Any]:
    cpu = cast("Any", torch.cpu)
    features = {
        "avx2": cpu._is_avx2_supported(),
        "avx512": cpu._is_avx512_supported(),
        "avx512_bf16": cpu._is_avx512_bf16_supported(),
        "amx": cpu._is_amx_tile_supported(),
    }
    return {
        "model": cpu_model(),
        "class": processor.cpu_class(),
        "features": [name for name, there in features.items() if there],
        "threads": torch.get_num_threads(),
    }


def cpu_model() -> str:
    """The CPU's name, as the system gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _gpu_facts(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    architecture = tile_table.architecture_of(index)
    known = json.loads(files("attnzoo_kernels._triton").joinpath("tiles.json").read_text("utf-8"))
    return {
        "model": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count,
        "memory GiB": round(total / 2**30, 1),
        "free GiB": round(free / 2**30, 1),
        "tiles": architecture if architecture in known else f"default (none for {architecture})",
    }


def diagnose(*, test: bool = True, progress: Callable[[str, int, int], None] = lambda *_: None) -> Report:
    """Looks at everything.

    Args:
        test: Whether to run the self-test.
        progress: Called with (what, done, total).
    """
    begin = time.perf_counter()
    env = environment()
    found = devices()
    looked = time.perf_counter()
    checks = list(selftest.run([torch.device(x.name) for x in found], progress)) if test else []
    seconds = {"looking": looked - begin, "self-test": time.perf_counter() - looked}
    return Report(env.versions, found, findings(env), checks, seconds)
