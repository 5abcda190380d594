"""Policies saved and loaded: alone, and with the models that they are on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import attnzoo
from attnzoo import policies, surgery
from attnzoo.surgery.files import BESIDE
from attnzoo.surgery.hosts.attention_function import pattern_of
from tests import child
from tests.attnzoo.surgery.tiny import convert, ids, logits, tiny

FULL = torch.tensor([[True, False], [False, True]])
EXAMPLES: dict[str, Any] = {
    "streaming": policies.Streaming(sink=8, window=16, block=8, slack=8),
    "duo": policies.Duo(FULL, sink=4, window=8, block=4),
}


def plain(**more: Any) -> Any:
    """A model that loading makes again, which knows the host's own norms alone."""
    return tiny(dtype=torch.float32, **more)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_policy_comes_back_from_its_folder(name: str, tmp_path: Path) -> None:
    policy = EXAMPLES[name]
    folder = policies.save(policy, tmp_path / "policy")
    again = policies.load(folder)
    assert again.equals(policy)
    assert repr(again) == repr(policy)
    # It is replaced by another, whole.
    policies.save(policies.Streaming(sink=0, window=8, block=8), folder)
    assert not policies.load(folder).equals(policy)
    assert sorted(path.name for path in folder.iterdir()) == ["attnzoo_policy.json"]


def test_what_is_no_policy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(attnzoo.ConfigError, match=r"policy: expected one of .*, got str"):
        policies.save("duo", tmp_path)  # type: ignore[arg-type]
    with pytest.raises(attnzoo.ConfigError, match="expected a policy that attnzoo has saved"):
        policies.load(tmp_path)
    (tmp_path / "attnzoo_policy.json").write_text('{"format": 1, "settings": {"policy": "none"}, "weights": []}')
    with pytest.raises(attnzoo.ConfigError, match=r"policy: expected one of .*duo.*, got 'none'"):
        policies.load(tmp_path)
    (tmp_path / "attnzoo_policy.json").write_text('{"format": 2}')
    with pytest.raises(attnzoo.ConfigError, match="expected format 1"):
        policies.load(tmp_path)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_model_is_saved_with_its_policy(adapter: bool, tmp_path: Path) -> None:
    model = plain()
    report = surgery.convert(model, "policy", policy=EXAMPLES["duo"])
    expected = logits(model, ids(2, 40))
    surgery.save(model, tmp_path / "model", adapter_only=adapter)
    assert not (tmp_path / "model" / BESIDE).exists()
    again, _ = surgery.load(tmp_path / "model", base=plain() if adapter else None)
    assert torch.equal(logits(again, ids(2, 40)), expected)
    for site in surgery.find(again):
        pattern: Any = pattern_of(again.get_submodule(site.path))
        assert pattern.layer.policy.full.tolist() == [FULL[site.layer].tolist()]
    report.undo()
    assert not torch.equal(logits(model, ids(2, 40)), expected)


def test_weights_of_a_policy_lie_beside_the_model_s(tmp_path: Path) -> None:
    model = plain(layers=2)
    heads = [policies.RetainingHead((6 + 2 + 2) * 16, 2, hidden=8) for _ in range(2)]
    policy = policies.Locret(heads, budget=40, local=8)
    surgery.convert(model, "policy", policy=policy)
    surgery.save(model, tmp_path / "model")
    held = load_file(tmp_path / "model" / BESIDE)
    assert {name.rpartition(".self_attn")[0] for name in held} == {"model.layers.0", "model.layers.1"}
    again, _ = surgery.load(tmp_path / "model")
    for site in surgery.find(again):
        pattern: Any = pattern_of(again.get_submodule(site.path))
        assert pattern.layer.policy.equals(policy.of_layer(site.layer))
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    found, other = (each.generate(ids(2, 60), **options) for each in (model, again))
    assert found.sequences.tolist() == other.sequences.tolist()
    assert found.past_key_values.layers[0].memory.held_rows <= 2 * 2 * 46
    assert policies.load(policies.save(policy, tmp_path / "policy")).equals(policy)


@pytest.mark.slow
def test_a_model_with_a_policy_is_loaded_in_a_fresh_process(tmp_path: Path) -> None:
    model = plain()
    surgery.convert(model, "policy", policy=EXAMPLES["streaming"])
    tokens = ids(1, 50)
    expected = model.generate(tokens, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, 50:].tolist()
    surgery.save(model, tmp_path / "model")
    code = (
        "import torch; from attnzoo import surgery; "
        f"model, _ = surgery.load({str(tmp_path / 'model')!r}); tokens = torch.tensor({tokens.tolist()}); "
        "options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, return_dict_in_generate=True); "
        "out = model.generate(tokens, **options); "
        "print(out.sequences[0, 50:].tolist(), type(out.past_key_values.layers[0]).__name__)"
    )
    assert f"{expected} EvictingCacheLayer" in child.run(code)


def test_heads_are_merged_under_a_policy_that_fits_what_is_left(tmp_path: Path) -> None:
    model = plain()
    surgery.convert(model, "policy", policy=EXAMPLES["duo"])
    with pytest.raises(attnzoo.ConfigError, match=r"full: expected \[1, 1\], .*got \[1, 2\]"):
        convert(model, "lowrank_gqa", method="mean", num_kv_heads=1)
    other = plain()
    surgery.convert(other, "policy", policy=EXAMPLES["streaming"])
    convert(other, "lowrank_gqa", method="mean", num_kv_heads=1)
    with torch.no_grad():
        cache = other(ids(1, 90), use_cache=True).past_key_values
    assert cache.layers[0].memory.held_rows == 90 - 64
