"""The doctor: what it reads, what it knows to be bad, and that a wrong implementation is found out."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from attnzoo import doctor
from attnzoo.cli import doctor_view, main
from attnzoo_kernels import selftest
from attnzoo_kernels.cpu import blocked
from attnzoo_kernels.spec.call import Call

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
GOOD = doctor.Environment(
    versions={"python": "3.11.7", **doctor.TESTED, "xformers": None, "flash-attn": None},
    cuda=None,
    devices=0,
    interpret=False,
    interpret_late=False,
    cpu_class="avx2",
    cpu_precision="none",
    gpu_precision="none",
    xformers_build=None,
)


def with_versions(**changed: str | None) -> dict[str, str | None]:
    return {**GOOD.versions, **changed}


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "old torch": ({"versions": with_versions(torch="2.10.1+cpu")}, "problem", "torch 2.10.1+cpu is older than 2.11"),
    "old transformers": ({"versions": with_versions(transformers="5.3.0")}, "problem", "transformers 5.3.0"),
    "transformers older than tested": ({"versions": with_versions(transformers="5.17.0")}, "note", "5.24.0"),
    "transformers newer than tested": (
        {"versions": with_versions(transformers="5.25.0")},
        "untested",
        "transformers 5.25.0 is outside what was tested, 5.4.0 to 5.24.0",
    ),
    "torch newer than tested": ({"versions": with_versions(torch="2.14.0+cpu")}, "note", "newer than 2.13.0"),
    "no numpy": ({"versions": with_versions(numpy=None)}, "problem", "numpy is not installed"),
    "interpreter and numpy": (
        {"interpret": True, "versions": with_versions(triton="3.6.0", numpy="2.4.0")},
        "problem",
        "cannot count loops with numpy 2.4.0",
    ),
    "bf16 in the interpreter": ({"interpret": True}, "note", "bf16"),
    "set late": ({"interpret": True, "interpret_late": True}, "problem", "after triton was imported"),
    "interpreter on a GPU": ({"interpret": True, "devices": 1, "cuda": "13.0"}, "problem", "thousands of times slower"),
    "AMX rounds": ({"cpu_class": "amx", "cpu_precision": "bf16"}, "problem", "rounded to bf16"),
    "tf32 on the CPU": ({"cpu_precision": "tf32"}, "note", "tf32"),
    "tf32 on the GPU": ({"devices": 1, "cuda": "13.0", "gpu_precision": "tf32"}, "note", "tf32"),
    "xformers without operators": (
        {"versions": with_versions(xformers="0.0.35"), "xformers_build": "12.8"},
        "note",
        "built for CUDA 12.8, has no operators",
    ),
    "a GPU and no triton": (
        {"devices": 2, "cuda": "13.0", "versions": with_versions(triton=None)},
        "problem",
        "triton",
    ),
    "CUDA and no device": ({"cuda": "13.0"}, "note", "finds no device"),
}


@pytest.mark.parametrize("name", BAD)
def test_each_bad_combination_is_known(name: str) -> None:
    changes, level, text = BAD[name]
    found = doctor.findings(replace(GOOD, **changes))
    hits = [finding for finding in found if text in finding.what]
    assert [finding.level for finding in hits] == [level], found
    assert hits[0].remedy


def test_a_good_machine_has_no_findings() -> None:
    assert doctor.findings(GOOD) == []
    fine = replace(GOOD, interpret=True, versions=with_versions(triton="3.6.0", numpy="2.3.5"))
    assert all(finding.level == "note" for finding in doctor.findings(fine))


def test_problems_come_first() -> None:
    found = doctor.findings(replace(GOOD, cuda="13.0", versions=with_versions(numpy=None)))
    assert [finding.level for finding in found] == ["problem", "note"]


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("2.13.0+cpu", (2, 13, 0)), ("3.6.0", (3, 6, 0)), ("2.13.0a0+git1f2", (2, 13, 0)), ("9", (9,))],
)
def test_versions_are_read(text: str, numbers: tuple[int, ...]) -> None:
    assert doctor.release(text) == numbers


def test_floors_are_those_of_the_project_and_tested_versions_those_of_the_suite() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(x for extra in project["optional-dependencies"].values() for x in extra)]
    floors = dict(text.split(">=") for text in wanted if ">=" in text)
    assert all(floors[name] == floor for name, floor in doctor.FLOORS.items())
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in pins if "==" in line)
    assert all(pinned[name] == tested for name, tested in doctor.TESTED.items())


def test_the_environment_is_that_of_this_process() -> None:
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    inherited = torch.backends.mkldnn.fp32_precision  # type: ignore[attr-defined]
    # What is only inherited must not become a setting of its own.
    before = "none" if settings.fp32_precision == inherited else settings.fp32_precision
    settings.fp32_precision = "tf32"
    try:
        env = doctor.environment()
    finally:
        settings.fp32_precision = before
    assert env.versions["torch"] == torch.__version__
    assert env.versions["flash-attn"] is None or env.versions["flash-attn"][0].isdigit()
    assert env.cpu_precision == "tf32"
    assert doctor.devices()[0].facts["class"] == env.cpu_class


def test_a_gpu_is_described_with_its_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    chip = SimpleNamespace(name="H", major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: chip)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (3 << 30, 80 << 30))
    monkeypatch.setattr(
        doctor, "_reasons", lambda impl, place: ("why",) if place.type == "cpu" and impl == "triton" else ()
    )
    doctor.tile_table.architecture_of.cache_clear()
    try:
        cpu, gpu = doctor.devices()
        chip.major = 42
        doctor.tile_table.architecture_of.cache_clear()
        assert "GPU" not in doctor._gpu_facts(0)["tiles"]
    finally:
        doctor.tile_table.architecture_of.cache_clear()
    assert (cpu.runs, cpu.refused) == ("blocked", {"triton": ("why",)})
    assert (gpu.name, gpu.runs, gpu.refused, gpu.paths) == ("cuda:0", "triton", {}, {})
    assert gpu.facts == {
        "model": "H", "capability": "9.0", "processors": 132, "memory GiB": 80.0, "free GiB": 3.0, "tiles": "sm_90"
    }  # fmt: skip
    monkeypatch.setattr(doctor, "_reasons", lambda impl, place: ("no driver",) if impl == "triton" else ())
    assert [device.runs for device in doctor.devices()] == ["blocked", "blocked"]


def test_the_paths_of_the_cpu_are_told_with_their_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    cpu = doctor.devices()[0]
    assert list(cpu.paths) == [what for what, _, _ in doctor.PATH_CALLS]
    assert all(list(reasons) == ["few_rows", "flash", "bf16", "key_major", "blocked"] for reasons in cpu.paths.values())
    assert cpu.paths["long calls in fp32"]["flash"] == ()
    assert "64 queries" in " ".join(cpu.paths["short calls in fp32"]["flash"])
    assert doctor_view._path_line(cpu.paths["long calls in fp32"]).startswith("flash runs; not few_rows: ")
    assert doctor_view._path_line(cpu.paths["short calls in fp32"]) == "few_rows runs"
    assert doctor_view._path_line({"flash": ("flash: no",), "blocked": ()}) == "blocked runs; not flash: no"


def run_cases(monkeypatch: pytest.MonkeyPatch, *cases: str) -> list[selftest.Check]:
    monkeypatch.setattr(selftest, "CASES", cases)
    return list(selftest.run([CPU], lambda *_: None))


def test_every_case_and_dtype_holds_here(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, int, int]] = []
    monkeypatch.setattr(selftest, "dtypes_of", lambda impl, device: () if impl == "triton" else selftest.UNIT)
    checks = list(selftest.run([CPU], lambda *news: told.append(news)))
    assert len(checks) == 2 * 4 * len(selftest.CASES)
    assert [check for check in checks if not check.holds] == []
    assert [done for _, done, _ in told] == list(range(told[0][2]))


def scaled(by: float) -> Callable[..., Any]:
    real = blocked.forward

    def wrong(call: Call, *, need_lse: bool) -> tuple[Tensor, Tensor]:
        out, lse = real(call, need_lse=need_lse)
        return out * by, lse

    return wrong


def leaking(call: Call, *, need_lse: bool) -> tuple[Tensor, Tensor]:
    """One pair too many: each row also reads one key of the future."""
    out, lse = blocked_forward(call, need_lse=need_lse)
    return out + 1e-3 * call.v[:, :1, -1:].to(out.dtype), lse


blocked_forward = blocked.forward


def no_gradient(*arguments: Any) -> tuple[Tensor | None, ...]:
    found = list(blocked_backward(*arguments))
    return (found[0], found[1], found[2] * 1.1 if found[2] is not None else None, *found[3:])


blocked_backward = blocked.backward


def failing(*_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    raise RuntimeError("no such thing\nand more")


WRONG: dict[str, tuple[str, Callable[..., Any], str]] = {
    "scaled": ("forward", scaled(1 + 1e-5), "out"),
    "leaking": ("forward", leaking, "out"),
    "gradient": ("backward", no_gradient, "dv"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_implementation_is_found_out(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    function, planted, quantity = WRONG[name]
    monkeypatch.setattr(blocked, function, planted)
    checks = run_cases(monkeypatch, "plain", "key bias")
    wrong = [check for check in checks if not check.holds]
    assert {check.impl for check in wrong} == {"blocked"}
    assert {check.quantity for check in wrong} == {quantity}
    assert {check.dtype for check in wrong} >= {"float64"}


def test_what_raises_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "forward", failing)
    wrong = [check for check in run_cases(monkeypatch, "plain") if not check.holds]
    assert {check.impl for check in wrong} == {"blocked"}
    assert {check.problem for check in wrong} == {"RuntimeError: no such thing"}


def test_nan_and_other_empty_rows_are_no_small_errors() -> None:
    truth = {"lse": torch.tensor([0.0, -math.inf])}
    for other in ([math.nan, -math.inf], [0.0, 0.0], [-math.inf, -math.inf]):
        fields = selftest.compare({"lse": torch.tensor(other)}, truth, torch.float32, 1.0)
        assert "lse" in fields["problem"]
    assert "problem" not in selftest.compare(truth, truth, torch.float32, 1.0)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["attnzoo", "doctor", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0), capsys.readouterr().out

    return run


def test_json_has_a_stable_shape(monkeypatch: pytest.MonkeyPatch, command: Callable[..., tuple[int, str]]) -> None:
    monkeypatch.setattr(selftest, "CASES", ("plain",))
    code, out = command("--json")
    data = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert code == 0
    assert set(data) == {"versions", "devices", "findings", "checks", "seconds", "healthy"}
    assert {"python", "torch", "triton", "transformers", "numpy"} <= set(data["versions"])
    assert data["devices"][0]["name"] == "cpu"
    assert set(data["devices"][0]) == {"name", "facts", "runs", "refused", "paths"}
    assert {"class", "features", "threads"} <= set(data["devices"][0]["facts"])
    assert {check["impl"] for check in data["checks"]} >= {"reference", "blocked"}
    assert all(check["holds"] and check["error"] <= check["limit"] for check in data["checks"])
    assert set(data["seconds"]) == {"looking", "self-test"}


def test_a_failure_is_exit_code_one_in_both_forms(
    monkeypatch: pytest.MonkeyPatch, command: Callable[..., tuple[int, str]]
) -> None:
    monkeypatch.setattr(selftest, "CASES", ("plain",))
    monkeypatch.setattr(blocked, "forward", failing)
    code, out = command("--json")
    assert code == 1
    data = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert data["healthy"] is False
    assert any(check["problem"] == "RuntimeError: no such thing" and check["error"] is None for check in data["checks"])
    code, out = command()
    assert code == 1
    assert "wrong: blocked on cpu, float64, plain: RuntimeError: no such thing" in out
    assert "not healthy" in out


def test_a_version_that_nobody_has_tested_is_not_called_healthy(
    monkeypatch: pytest.MonkeyPatch, command: Callable[..., tuple[int, str]]
) -> None:
    newer = replace(GOOD, versions=with_versions(transformers="5.25.0"))
    monkeypatch.setattr(doctor, "environment", lambda: newer)
    code, out = command("--no-test")
    assert code == 0
    assert "transformers 5.25.0 is outside what was tested" in out
    assert "healthy" not in out
    assert json.loads(command("--no-test", "--json")[1])["healthy"] is False


def test_without_the_self_test_it_only_looks(command: Callable[..., tuple[int, str]]) -> None:
    code, out = command("--no-test")
    assert code == 0
    assert "blocked runs" in out
    assert "self-test against" not in out
