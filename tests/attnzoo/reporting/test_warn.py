"""What a caller is told beside results: at the caller's line, once, and never what was asked for."""

from __future__ import annotations

import ast
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import attnzoo
from attnzoo.base import registry
from attnzoo.reporting.warn import silent, warn_caller
from attnzoo.surgery.hosts.block import warn_of_lengths
from attnzoo_kernels import dispatch
from tests.attnzoo.cases import CASES, Case, build, tokens

ROOT = Path(attnzoo.__file__).resolve().parent


def heard(work: Callable[[], Any]) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        work()
    return found


class Model(nn.Module):
    """A layer inside a module of the caller's."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor, **more: Any) -> Any:
        return self.layer(x, **more)


class OwnMoH(attnzoo.MoHAttention):
    """A subclass with a constructor of its own."""

    def __init__(self, **options: Any) -> None:
        super().__init__(None, **options)


def padded() -> None:
    layer = Case("mha", "small").layer()
    Model(layer)(tokens(layer, 1, 3), key_padding=torch.ones(1, 3, dtype=torch.bool))


def slow() -> None:
    layer = Case("landmark", "small").layer(block_size=32)
    Model(layer)(tokens(layer, 1, 512))


def stretched() -> None:
    block = SimpleNamespace(rope_type="dynamic")
    warn_of_lengths(block)  # type: ignore[arg-type]


def broken_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_warned", set())
    dispatch._warn_once("a kernel failed")


ISSUED: dict[str, Callable[..., Any]] = {
    "create": lambda: attnzoo.create("moh", dim=16, num_heads=4),
    "class": lambda: attnzoo.MoHAttention(dim=16, num_heads=4),
    "config": lambda: attnzoo.create(attnzoo.get_config("moh", dim=16, num_heads=4)),
    "subclass": lambda: OwnMoH(dim=16, num_heads=4),
    "s2": lambda: attnzoo.create("s2", dim=16, num_heads=2),
    "all padding": padded,
    "slow": slow,
    "dynamic rope": stretched,
    "kernel": broken_kernel,
}


@pytest.mark.parametrize("name", ISSUED)
def test_a_warning_points_at_the_caller(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    work = ISSUED[name]
    found = heard(lambda: work(monkeypatch) if work is broken_kernel else work())
    assert [warning.filename for warning in found] == [__file__]


def test_the_outermost_line_is_blamed_where_all_are_of_libraries() -> None:
    thread = threading.Thread(target=warn_caller, args=("from nowhere",))
    found = heard(lambda: (thread.start(), thread.join()))
    assert [str(warning.message) for warning in found] == ["from nowhere"]


def test_nothing_warns_but_through_the_one_function() -> None:
    kernels = ROOT.parent / "kernels" / "attnzoo_kernels"
    for path in [*ROOT.rglob("*.py"), *kernels.rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            direct = isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "warnings.warn",
                "warn",
                "_warnings.warn",
            )
            assert not direct, f"{path}:{getattr(node, 'lineno', 0)} warns at a line of its own choice"


DO_NOTHING = [
    ("moh", {}, "all 4 heads are active"),
    ("moh", {"shared_heads": 1, "active_heads": 3}, "no head is left out"),
    ("moh", {"shared_heads": 4}, "no gradient"),
    ("moh", {"router": "norm"}, "no head is left out"),
    ("lowrank_gqa", {"num_kv_heads": 4}, "plain attention"),
    ("lowrank_gqa", {"latent_dim": 64}, "nothing is saved"),
    ("s2", {"vert_stride": 1}, "plain attention"),
    ("s2", {"num_dense_heads": 4}, "plain attention"),
    ("rcmha", {"conv_on": (), "rel": None}, "plain attention"),
]


@pytest.mark.parametrize(("name", "options", "said"), DO_NOTHING)
def test_options_that_do_nothing_say_so(name: str, options: dict[str, Any], said: str) -> None:
    found = heard(lambda: attnzoo.create(name, dim=32, num_heads=4, **options))
    assert len(found) == 1
    assert name in str(found[0].message)
    assert said in str(found[0].message)


@pytest.mark.parametrize("name", attnzoo.list_variants())
def test_what_does_something_or_is_asked_for_says_nothing(name: str) -> None:
    dense = {"active_heads": "all"} if name == "moh" else {}
    options = {"vert_stride": 4} if name == "s2" else {}
    assert not heard(lambda: attnzoo.create(name, dim=64, num_heads=8, **options))
    assert not heard(lambda: attnzoo.create(name, dim=32, num_heads=4, **{**options, **dense}))


def test_code_that_knows_better_keeps_it_back_for_itself_alone() -> None:
    def quietly() -> None:
        with silent():
            attnzoo.create("moh", dim=16, num_heads=4)

    assert not heard(quietly)
    assert heard(ISSUED["create"])


def asks_of_each_token(name: str) -> dict[str, Any]:
    """Options at which a variant lets every one of 512 tokens choose, where it can."""
    return {"landmark": {"block_size": 32}, "longheads": {"chunk_size": 32, "attention_length": 128}}.get(name, {})


@pytest.mark.parametrize("name", ["landmark", "longheads"])
def test_a_long_call_that_is_slow_says_once_which_option_is_quicker(name: str) -> None:
    layer = Case(name, "small").layer(**asks_of_each_token(name))
    x = tokens(layer, 1, 512)
    with torch.no_grad():
        assert not heard(lambda: layer(x[:, :511]))
        found = heard(lambda: [layer(x) for _ in range(2)])
        assert len(found) == 1
        assert ("mode='soft'" if name == "landmark" else "select='block'") in str(found[0].message)
        quick = {"mode": "soft"} if name == "landmark" else {"select": "block"}
        other = Case(name, "small").layer(**asks_of_each_token(name), **quick)
        assert not heard(lambda: other(x))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_padding_that_hides_everything_is_told_once(case: Case) -> None:
    layer = case.layer()
    x, everything = tokens(layer, 2, 5), torch.ones(2, 5, dtype=torch.bool)
    one_item = torch.tensor([[True], [False]]).expand(2, 5)
    assert not heard(lambda: layer(x, key_padding=one_item))
    assert not heard(lambda: layer(x[:0], key_padding=everything[:0]))
    found = heard(lambda: [layer(x, key_padding=everything) for _ in range(2)])
    assert len(found) == 1
    assert "key_padding" in str(found[0].message)
    assert "~mask" in str(found[0].message)


def test_a_variant_of_a_user_tells_in_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "variants", dict(registry.variants))

    class Told(attnzoo.MHAConfig):
        @property
        def cautions(self) -> tuple[str, ...]:
            return ("told: once",)

    class ToldAttention(attnzoo.MHAAttention, name="told_for_this_test"):
        config_class = Told

    found = heard(lambda: ToldAttention(dim=16, num_heads=2))
    assert [(str(warning.message), warning.filename) for warning in found] == [("told: once", __file__)]


def test_the_laws_build_without_noise() -> None:
    assert not heard(lambda: [build(case.config()) for case in CASES])
