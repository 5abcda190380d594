"""Measuring with a clock of our own: who runs when, and which figure of the rounds counts."""

from __future__ import annotations

import time

import pytest
import torch

from attnzoo.evaluation import timing
from attnzoo.evaluation.cost_setting import read_device
from attnzoo_kernels.errors import ConfigError


class Clock:
    """A clock that only runs while a contestant does."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now, self.ran = 0.0, list[str]()
        for name in ("perf_counter", "thread_time"):
            patch.setattr(time, name, lambda: self.now)

    def contestant(self, name: str, seconds: list[float]) -> object:
        left = iter(seconds)

        def run() -> None:
            self.ran.append(name)
            self.now += next(left)

        return run


@pytest.mark.parametrize("wall", [True, False])
def test_contestants_take_turns_behind_one_warm_up_each(wall: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    runs = {"a": clock.contestant("a", [9, 1, 2, 3]), "b": clock.contestant("b", [9, 2, 8, 1])}
    found = timing.rounds(runs, wall=wall, seconds=0.0, least=3, most=3)  # type: ignore[arg-type]
    assert clock.ran == ["a", "b"] * 4
    assert found == {"a": [1e3, 2e3, 3e3], "b": [2e3, 8e3, 1e3]}


def test_rounds_end_when_time_is_up_and_there_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    for seconds, least, most, expected in ((0.0, 4, 9, 4), (5.5, 2, 9, 6), (1e9, 2, 7, 7)):
        clock = Clock(monkeypatch)
        run = clock.contestant("a", [1.0] * 20)
        found = timing.rounds({"a": run}, wall=True, seconds=seconds, least=least, most=most)  # type: ignore[dict-item]
        assert len(found["a"]) == expected


def test_the_median_counts_of_times_and_of_ratios_round_by_round(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = {"a": [1.0, 2.0, 30.0], "b": [1.0, 4.0, 10.0]}
    assert timing.middle(rounds) == {"a": 2.0, "b": 4.0}
    assert timing.paired(rounds, "a", "b") == 1.0
    assert timing.paired(rounds, "b", "a") == 1.0
    clock = Clock(monkeypatch)
    run = clock.contestant("a", [9.0, 1.0, 2.0, 60.0])
    assert timing.medians({"a": run}, wall=True, seconds=0.0, least=3, most=3) == {"a": 2e3}  # type: ignore[dict-item]


def test_what_comes_before_a_run_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    runs = {name: clock.contestant(name, [1.0] * 4) for name in "ab"}
    before = {"a": clock.contestant("before a", [50.0] * 4)}
    found = timing.rounds(runs, wall=True, seconds=0.0, least=3, most=3, before=before)  # type: ignore[arg-type]
    assert clock.ran == ["before a", "a", "b"] * 4
    assert found == {"a": [1e3] * 3, "b": [1e3] * 3}


def test_a_device_behind_the_last_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert read_device("cuda:1") == torch.device("cuda:1")
    assert read_device("cuda") == torch.device("cuda")
    assert read_device("cpu") == torch.device("cpu")
    for text in ("cuda:2", "cuda:x", "tpu"):
        with pytest.raises(ConfigError, match="device"):
            read_device(text)
