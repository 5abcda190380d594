"""Streaming and Duo: what they hold by place, which heads are chosen, and the published folders of gates."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnzoo
from attnzoo.cache.policies.duo import GATES, SETTINGS, read_gates, top_heads, write_gates
from attnzoo.cache.policies.known import Duo, Streaming, policy_from

PUBLISHED = {
    "Llama-2-7B-32K-Instruct": (32, 32, 0.75),
    "Llama-3-8B-Instruct-Gradient-1048k": (32, 8, 0.5),
    "Llama-3-8B-Instruct-Gradient-4194k": (32, 8, 0.5),
    "Meta-Llama-3.1-8B-Instruct": (32, 8, 0.5),
    "Mistral-7B-Instruct-v0.2": (32, 8, 0.5),
    "Mistral-7B-Instruct-v0.3": (32, 8, 0.5),
}
"""The six models with published gates: layers, KV heads, and the share of heads that streams as shipped."""


class KindsOfScore:
    """Scores by kind, and nothing else."""

    def __init__(self, **kinds: Tensor) -> None:
        self.kinds = kinds

    def kv(self, kind: str) -> Tensor:
        return self.kinds[kind]


def scores(**kinds: Tensor) -> Any:
    return KindsOfScore(**kinds)


def published(folder: Path, layers: int, heads: int, **config: Any) -> Tensor:
    """A folder in the published format with gates on the grid of bfloat16, many of them equal."""
    generator = torch.Generator().manual_seed(layers * heads)
    gates = (torch.rand(layers, heads, generator=generator) * 64).round().div(64).to(torch.bfloat16).double()
    sizes = {"sink_size": 128, "recent_size": 256, "deploy_sink_size": None, "deploy_recent_size": None}
    (folder / SETTINGS).write_text(json.dumps({"model": "x", **sizes, **config}))
    write_gates(folder, gates)
    return gates


def test_tokens_are_blocks_and_the_own_block_comes_on_top() -> None:
    policy = Streaming()
    assert (policy.sink_blocks, policy.near_blocks) == (1, 5)
    assert "sink=64, window=256, block=64: 1 sink and 5 near blocks" in repr(policy)
    assert Streaming.of_blocks(2, 3, block=16).equals(Streaming(sink=32, window=32, block=16))
    assert policy.retention(2).full == (False, False)
    assert policy.is_static
    for settings, words in (
        ({"window": 100}, "window: expected a multiple of block 64, such as 64 or 128, got 100"),
        ({"sink": 5}, "sink: expected a multiple of block 64, such as 0 or 64, got 5"),
        ({"block": 0}, "block: expected an int >= 1, got 0"),
        ({"slack": -1}, "slack: expected an int >= 0, got -1"),
        ({"window": 64.0}, "window: expected an int >= 0"),
    ):
        with pytest.raises(attnzoo.ConfigError, match=words):
            Streaming(**settings)


def test_settings_make_the_policy_again() -> None:
    policy = Duo(torch.tensor([[True, False, True], [False, False, False]]), sink=16, window=32, block=16, slack=4)
    again = policy_from(json.loads(json.dumps(policy.settings())))
    assert again.equals(policy)
    assert not Duo(~policy.full, sink=16, window=32, block=16, slack=4).equals(policy)
    assert policy.of_layer(0).retention(3).full == (True, False, True)
    with pytest.raises(attnzoo.ConfigError, match="full: expected a row for layer 2, got 2 rows"):
        policy.of_layer(2)
    with pytest.raises(attnzoo.ConfigError, match=r"full: expected \[1, 3\], .*got \[2, 3\]"):
        policy.retention(3)
    with pytest.raises(attnzoo.ConfigError, match=r"full: expected \[2, 4\], .*got \[2, 3\]"):
        policy.check(2, 4)
    for full in (torch.ones(2, 2), [[True], [True, False]], torch.ones(2, 0, dtype=torch.bool), "full"):
        with pytest.raises(attnzoo.ConfigError, match=r"full: expected bool \[L, G\]"):
            Duo(full)  # type: ignore[arg-type]


def test_equal_scores_are_taken_by_layer_and_head() -> None:
    values = torch.tensor([[1.0, 2.0, 1.0], [2.0, 1.0, 2.0]])
    assert top_heads(values, 4).tolist() == [[True, True, False], [True, False, True]]
    taken = torch.tensor([[False, True, False], [False, False, False]])
    assert top_heads(values, 2, taken).tolist() == [[False, True, False], [True, False, True]]
    with pytest.raises(attnzoo.ConfigError, match="scores: expected finite numbers"):
        top_heads(values.fill_(torch.nan), 1)


def test_most_heads_are_chosen_by_induction_and_one_in_seven_by_echo() -> None:
    induction = torch.arange(90.0).view(30, 3)
    echo = -induction
    policy = Duo.from_scores(scores(induction=induction, echo=echo), sink=16, window=32, block=16)
    expected = torch.zeros(90, dtype=torch.bool)
    expected[-19:] = True
    expected[:3] = True
    assert policy.full.flatten().tolist() == expected.tolist()
    assert policy.window == 32
    # A head that both choose is counted once.
    both = Duo.from_scores(scores(induction=induction, echo=induction))
    assert int(both.full.sum()) == 22
    one = Duo.from_scores(scores(retrieval=induction), keep=0.1, kinds={"retrieval": 1})
    assert one.full.flatten().nonzero().flatten().tolist() == list(range(81, 90))
    for keep in (-0.1, 1.5, True):
        with pytest.raises(attnzoo.ConfigError, match="keep: expected a share from 0 to 1"):
            Duo.from_scores(scores(), keep)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_folder_gives_the_count_that_its_sparsity_says(name: str, tmp_path: Path) -> None:
    layers, heads, sparsity = PUBLISHED[name]
    gates = published(tmp_path, layers, heads)
    policy = Duo.load(tmp_path, sparsity)
    assert (policy.sink_blocks, policy.near_blocks) == (2, 5)
    count = int(policy.full.sum())
    # As many as reach the quantile where no two gates are equal.
    apart = torch.arange(gates.numel(), dtype=torch.float64)
    assert count == int((apart >= apart.quantile(sparsity)).sum()) == round((1 - sparsity) * gates.numel())
    # The chosen are the largest, and of equal ones the first.
    least = gates[policy.full].min()
    assert bool((gates[~policy.full] <= least).all())
    ties = policy.full.flatten()[gates.flatten() == least].tolist()
    assert ties == sorted(ties, reverse=True)
    # Which heads have which gates does not change how many there are.
    write_gates(tmp_path, gates.flip(0).roll(3, 1))
    assert int(Duo.load(tmp_path, sparsity).full.sum()) == count
    assert int(Duo.load(tmp_path, 1).full.sum()) == 0
    assert bool(Duo.load(tmp_path, 0).full.all())


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    policy = Duo(torch.rand(5, 4) > 0.5, sink=32, window=64, block=32)
    again = Duo.load(policy.save(tmp_path / "gates"), block=32)
    assert again.equals(policy)
    assert Duo.load(tmp_path / "gates", window=96, block=32).window == 96
    first = (tmp_path / "gates" / GATES).read_text().splitlines()[0].split("\t")
    assert [len(word) for word in first] == [24] * 4


def test_a_folder_that_is_none_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(attnzoo.ConfigError, match=f"{SETTINGS}: expected the JSON beside"):
        Duo.load(tmp_path)
    gates = published(tmp_path, 3, 4)
    for value in (math.nan, math.inf):
        write_gates(tmp_path, gates.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(value).double()))
        with pytest.raises(attnzoo.ConfigError, match=r"expected finite gates, got .* in line 2"):
            read_gates(tmp_path)
    for text, words in (
        ("1\t0\n1\n", "expected as many gates in each line"),
        ("", "got no line"),
        ("1\tx\n", "expected a table of gates"),
    ):
        (tmp_path / GATES).write_text(text)
        with pytest.raises(attnzoo.ConfigError, match=words):
            Duo.load(tmp_path)
    published(tmp_path, 3, 4, deploy_sink_size=100)
    with pytest.warns(UserWarning, match="sink_size of 100 tokens becomes 128, whole blocks of 64"):
        assert Duo.load(tmp_path).sink == 128
    published(tmp_path, 3, 4, recent_size="far")
    with pytest.raises(attnzoo.ConfigError, match="recent_size: expected a number of tokens, got 'far'"):
        Duo.load(tmp_path)
    published(tmp_path, 3, 4)
    # Gates beyond their range are clipped.
    write_gates(tmp_path, gates * 3 - 1)
    assert read_gates(tmp_path).aminmax()[0] >= 0
    with pytest.raises(attnzoo.ConfigError, match="sparsity: expected a share from 0 to 1, got 2"):
        Duo.load(tmp_path, 2)
