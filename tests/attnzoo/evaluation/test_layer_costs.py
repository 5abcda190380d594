"""What layers cost: no time without correctness, the same inputs for both, and errors before anything runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import attnzoo
from attnzoo.cli import main
from attnzoo.evaluation import layer_checks, layer_costs, timing
from attnzoo.evaluation.cost_setting import BOUND, KINDS, Cost, CostSetting
from attnzoo.evaluation.layer_costs import BASELINE, IN_MIDST, measure
from attnzoo.evaluation.ten_lines import TenLines
from attnzoo.reporting.warn import silent
from attnzoo_kernels.cpu import few_rows
from attnzoo_kernels.errors import ConfigError

SMALL = CostSetting(tokens=40, dim=32, num_heads=4, seconds=0.0)


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_costs, "LEAST", 2)
    monkeypatch.setattr(layer_costs, "MOST", 3)


def quiet(*_: object) -> None:
    pass


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: object) -> tuple[int, str, str]:
        sizes = ("--tokens", 40, "--dim", 32, "--heads", 4, "--seconds", 0)
        monkeypatch.setattr(sys, "argv", ["attnzoo", "bench", *map(str, (*sizes, *arguments))])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        code = end.value.code
        return (code if isinstance(code, int) else int(code is not None)), *capsys.readouterr()

    return call


def test_every_variant_is_measured_and_right() -> None:
    assert {spec.partition(":")[0] for spec in layer_costs.SPECS} == set(attnzoo.list_variants())
    found = measure(SMALL, list(layer_costs.SPECS), quiet)
    assert [cost.name for cost in found] == [BASELINE, *layer_costs.SPECS]
    for cost in found:
        assert cost.problem is None
        assert set(cost.milliseconds) == set(cost.times_baseline) == set(KINDS)
        assert min(*cost.milliseconds.values(), *cost.times_baseline.values()) > 0
    assert all(cost.checked == 40 and cost.error is not None and cost.error < 1e-4 for cost in found)


@pytest.mark.parametrize("dtype", list(BOUND), ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 33])
def test_any_length_and_dtype(dtype: torch.dtype, tokens: int) -> None:
    setting = CostSetting(tokens=tokens, batch=2, dim=32, num_heads=4, num_kv_heads=2, dtype=dtype, seconds=0.0)
    _, *found = measure(setting, ["mha:window=7", "moh:shared_heads=2,active_heads=1"], quiet)
    assert [cost.problem for cost in found] == [None, None]


def test_density_is_that_of_the_whole_length_even_where_the_check_is_shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_checks, "CHECKED_SCORES", 4 * 20**2)
    cost = layer_costs.check("x", layer_costs.build(SMALL, ["mha:window=10"])["mha:window=10"], SMALL)
    assert cost.checked == 20
    assert cost.density == pytest.approx((10 * 11 / 2 + 30 * 10) / (40 * 41 / 2))


def spoil(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    right = getattr(few_rows, name)

    def wrong(*args: Any, **kwargs: Any) -> Any:
        first, *others = right(*args, **kwargs)
        return (first * 1.01, *others)

    monkeypatch.setattr(few_rows, name, wrong)


@pytest.mark.parametrize(("part", "what"), [("forward", "forward|training|decode|gradient"), ("backward", "gradient")])
def test_no_time_is_given_of_a_layer_that_is_wrong(
    monkeypatch: pytest.MonkeyPatch, bench: Callable[..., tuple[int, str, str]], part: str, what: str
) -> None:
    spoil(monkeypatch, part)
    code, out, _ = bench("--variants", "mha:window=7", "--json")
    assert code == 1
    (_, layer) = json.loads(out)["layers"]
    assert layer["problem"].startswith("wrong: ")
    assert any(name in layer["problem"] for name in what.split("|"))
    assert layer["milliseconds"] == layer["times_baseline"] == {}
    code, out, _ = bench("--variants", "mha:window=7")
    assert (code, "mha:window=7: wrong: " in out) == (1, True)


def test_nothing_that_is_no_number_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    right = few_rows.forward
    monkeypatch.setattr(few_rows, "forward", lambda *a, **k: tuple(x * torch.nan for x in right(*a, **k)))
    (cost,) = measure(SMALL, ["mha:window=7"], quiet)[1:]
    assert cost.error == float("inf")
    assert cost.problem is not None


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_ten_lines_of_torch_are_mha_forward_and_decoding(groups: int) -> None:
    options = {"dim": 32, "num_heads": 4, "num_kv_heads": groups}
    layer = attnzoo.create("mha", **options).double()
    plain = TenLines(**options, most=9, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    torch.testing.assert_close(plain(x), layer(x))
    cache = layer.new_cache(2, 9, dtype=torch.float64)
    buffers = plain.new_cache(2, 9)
    done = 0
    with torch.no_grad():
        for part in x.split([6, 1, 1, 1], 1):
            torch.testing.assert_close(plain(part, buffers, done), layer(part, cache=cache))
            done += part.shape[1]


def test_ten_lines_of_torch_carry_nothing_of_ours() -> None:
    source = Path(sys.modules[TenLines.__module__].__file__ or "").read_text(encoding="utf-8")
    imported = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert not [line for line in imported if "attnzoo" in line]
    assert "raise" not in source
    assert TenLines.__mro__[1] is torch.nn.Module


def test_nothing_is_timed_beside_a_baseline_that_is_wrong(
    monkeypatch: pytest.MonkeyPatch, bench: Callable[..., tuple[int, str, str]]
) -> None:
    right = TenLines.forward
    monkeypatch.setattr(TenLines, "forward", lambda *a: right(*a) * 1.01)
    code, out, _ = bench("--variants", "mha", "--json")
    assert code == 1
    baseline, layer = json.loads(out)["layers"]
    assert baseline["name"] == BASELINE
    assert baseline["problem"].startswith("wrong: ")
    assert layer["problem"] is None
    assert baseline["milliseconds"] == layer["milliseconds"] == {}


@pytest.mark.parametrize("spec", layer_costs.SPECS)
def test_a_decoding_step_is_the_same_one_each_time(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = replace(SMALL, tokens=100)
    with silent():
        (layer,) = layer_costs.build(setting, [spec]).values()
    forgotten: list[int] = []
    held: list[int | None] = []
    attend = layer.attend

    def spy(x: torch.Tensor, *others: Any, **more: Any) -> Any:
        held.append(others[2].length)
        return attend(x, *others, **more)

    monkeypatch.setattr(layer, "attend", spy)
    monkeypatch.setattr(layer_costs, "clear_memory", lambda: forgotten.append(len(held)))
    step = layer_costs.prepare("decode", layer, setting)
    assert step.before is not None
    for _ in range(3):
        step.before()
        step.run()
    slots = 100 - IN_MIDST
    # In turns the step before, not timed, and the one that is; in the midst of any block.
    assert held == [slots - 1, slots] * 3
    assert 0 < slots % 32 < 31
    # Nothing is kept of an earlier round.
    assert forgotten == [0, 2, 4]


def test_a_step_of_ten_lines_writes_and_reads_the_same_slots_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = replace(SMALL, tokens=100)
    baseline = layer_costs.build_baseline(setting)
    starts: list[int] = []
    forward = baseline.forward

    def spy(x: torch.Tensor, cache: torch.Tensor, start: int) -> torch.Tensor:
        starts.append(start)
        return forward(x, cache, start)

    monkeypatch.setattr(baseline, "forward", spy)
    step = layer_costs.prepare("decode", baseline, setting)
    assert step.before is not None
    step.before()
    first = step.run()
    step.before()
    assert torch.equal(step.run(), first)
    assert starts == [99 - IN_MIDST, 100 - IN_MIDST] * 2


@pytest.mark.parametrize("spec", [*layer_costs.SPECS, "lowrank_gqa:latent_dim=16", "rcmha:conv_pos=pre_proj"])
def test_a_cache_is_filled_as_a_prefill_fills_it(spec: str) -> None:
    setting = replace(SMALL, tokens=100, batch=2)
    with silent():
        (layer,) = layer_costs.build(setting, [spec]).values()
    filled, computed = (layer.new_cache(2, 110) for _ in range(2))
    layer_costs.fill(filled, layer.streams(), 100, setting)
    with torch.no_grad():
        layer.eval()(setting.inputs(100), cache=computed)
    ours, theirs = filled.state_dict(), computed.state_dict()
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        if isinstance(value, torch.Tensor):
            assert ours[name].shape == value.shape, name
            assert ours[name].is_floating_point() or torch.equal(ours[name], value), name
            assert ours[name].count_nonzero() > 0.9 * value.numel() - 1, name
        else:
            assert ours[name] == value, name
    with torch.no_grad():
        assert layer(setting.inputs(1), cache=filled).isfinite().all()


def test_auxiliary_losses_are_trained_too() -> None:
    setting = replace(SMALL, dtype=torch.float64)
    (layer,) = layer_costs.build(setting, ["moh:shared_heads=1,active_heads=1"]).values()
    x = setting.inputs(40).requires_grad_()
    _, gradients = layer_checks.train(layer, x)
    leaves = [x, *layer.parameters()]
    result = layer.attend(x)
    parts = [
        torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
        for loss in (result.out.sum(), result.plan.aux_loss)
    ]
    for found, of_out, of_aux in zip(gradients, *parts, strict=True):
        torch.testing.assert_close(found, of_out + of_aux)
    assert max(float(of_aux.abs().max()) for of_aux in parts[1]) > 1e-3


def test_contestants_take_turns() -> None:
    order: list[str] = []
    found = timing.rounds(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, wall=True, seconds=0, least=3
    )
    assert order == ["a", "b"] * 4  # the first turn warms up
    assert {name: len(times) for name, times in found.items()} == {"a": 3, "b": 3}
    assert timing.paired({"a": [1.0, 8.0, 3.0], "b": [1.0, 2.0, 1.0]}, "a", "b") == 3.0


def test_json_and_files_have_a_stable_shape(bench: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    code, out, _ = bench("--variants", "mha", "--json", "--out", tmp_path / "a" / "b", "--threads", 1)
    data = json.loads(out)
    assert code == 0
    assert {"cpu", "class", "threads", "torch", "dtype", "tokens", "dim", "num_heads"} <= set(data["about"])
    assert [set(layer) for layer in data["layers"]] == [set(Cost.__dataclass_fields__)] * 2
    assert json.loads((tmp_path / "a" / "b.json").read_text()) == data
    assert "| mha | 1.000 |" in (tmp_path / "a" / "b.md").read_text()
    assert (tmp_path / "a" / "b.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--dtype", "int8"), "dtype: expected one of float64"),
        (("--device", "tpu"), "device: expected cpu, cuda"),
        (("--device", "cuda:99"), "device: expected one that torch finds"),
        (("--variants", "mha:dim=64"), "variants: expected causal layers of dim 32"),
        (("--variants", "mha:causal=false"), "variants: expected causal layers"),
        (("--variants", "nope"), "nope"),
        (("--variants", "mha:window"), "variants: expected mha:name=value"),
        (("--tokens", 0), "tokens: expected at least 1"),
        (("--seconds", "nan"), "seconds: expected at least 0"),
        (("--heads", 5), "num_heads: expected a divisor"),
        (("--threads", 0), "threads: expected at least 1"),
    ],
)
def test_bad_calls_are_one_line_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch,
    bench: Callable[..., tuple[int, str, str]],
    arguments: tuple[object, ...],
    named: str,
) -> None:
    monkeypatch.setattr(layer_costs, "check", lambda *_: pytest.fail("measured"))
    code, _, err = bench(*arguments)
    assert code == 2
    assert named in err
    assert len(err.strip().splitlines()) == 1


def test_what_an_implementation_cannot_do_is_its_row(
    monkeypatch: pytest.MonkeyPatch, bench: Callable[..., tuple[int, str, str]]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    code, out, _ = bench("--variants", "mha", "--impl", "triton", "--json")
    (_, layer) = json.loads(out)["layers"]
    assert code == 1
    assert "triton" in layer["problem"]
    assert layer["milliseconds"] == {}


def test_sizes_are_checked() -> None:
    with pytest.raises(ConfigError, match="batch: expected at least 1, got 0"):
        CostSetting(batch=0)
    with pytest.raises(ConfigError, match="dtype"):
        CostSetting(dtype=torch.int32)
