"""Hosts beside the plain Llama: their relatives, other rotations and shapes, and modules that only look alike."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

import attnzoo
from attnzoo import surgery
from tests.attnzoo.surgery.hosts.masks import for_host, padding_mask, window_mask
from tests.attnzoo.surgery.tiny import (
    KINDS,
    VOCAB,
    assert_close,
    assert_untouched,
    calibration,
    convert,
    converted,
    ids,
    logits,
    snapshot,
    tiny,
)

ROUNDED = 1e-4
"""The promise in fp32; these hosts compute norms and rotation in fp32 whatever their weights are."""

TOKENS = 30

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}

ROTATIONS: dict[str, dict[str, Any]] = {
    "base": {"rope_type": "default", "rope_theta": 100.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}

HOSTS: dict[str, PreTrainedConfig] = {
    # A width that is not heads times head width is in all of them.
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"} | {"hidden_size": 64}),
    "qwen3": Qwen3Config(**SIZES),
    **{f"llama-{name}": LlamaConfig(**SIZES, rope_parameters=found) for name, found in ROTATIONS.items()},
}

MERGEABLE = [name for name in HOSTS if name != "qwen3"]


def host(name: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(HOSTS[name]), attn_implementation="sdpa")
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if parameter.dim() == 2:
                    parameter.normal_(std=2 * parameter.shape[-1] ** -0.5)
                else:
                    parameter.normal_(std=0.3).add_("norm" in key)
    return model.eval()


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("padding", [[0, 0], [0, 11]])
def test_relatives_of_the_host_say_the_same_with_mha(name: str, padding: list[int]) -> None:
    model, tokens, mask = host(name), ids(2, TOKENS), padding_mask(padding, TOKENS)
    assert [site.heads for site in surgery.find(model)] == [4, 4]
    expected = logits(model, tokens, attention_mask=mask)[mask.bool()]
    convert(model, "mha")
    assert_close(logits(model, tokens, attention_mask=mask)[mask.bool()], expected, ROUNDED)


@pytest.mark.parametrize("name", HOSTS)
def test_relatives_of_the_host_read_a_window(name: str) -> None:
    model, tokens = host(name), ids(2, TOKENS)
    dense = for_host(window_mask(TOKENS, 9, 2), [0, 0], torch.float32)
    expected = logits(model, tokens, attention_mask=dense)
    convert(model, "mha", window=9, sink=2, block_size=4)
    assert_close(logits(model, tokens), expected, ROUNDED)


@pytest.mark.parametrize("name", MERGEABLE)
def test_a_latent_of_full_rank_rotates_as_the_host_does(name: str) -> None:
    model, tokens, mask = host(name), ids(2, TOKENS), padding_mask([0, 11], TOKENS)
    expected = logits(model, tokens, attention_mask=mask)[mask.bool()]
    convert(model, "lowrank_gqa", method="latent", latent_dim=64, calibration=calibration())
    assert_close(logits(model, tokens, attention_mask=mask)[mask.bool()], expected, ROUNDED)


@pytest.mark.parametrize("name", MERGEABLE)
def test_expanded_heads_merge_again_without_loss(name: str) -> None:
    model, tokens = host(name), ids(2, TOKENS)
    expected = logits(model, tokens)
    convert(model, "lowrank_gqa", method="expand", num_kv_heads=4)
    assert_close(logits(model, tokens), expected, ROUNDED)
    convert(model, "lowrank_gqa", method="commuting", num_kv_heads=2, calibration=calibration())
    assert_close(logits(model, tokens), expected, ROUNDED)


def test_a_host_with_a_window_in_its_configuration_keeps_it() -> None:
    config = MistralConfig(**SIZES, sliding_window=8)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    tokens = ids(2, TOKENS)
    assert [site.window for site in surgery.find(model)] == [8, 8]
    expected = logits(model, tokens)
    report = convert(model, "mha", window=20, sink=4)
    assert_close(logits(model, tokens), expected, ROUNDED)
    report.undo()
    assert torch.equal(logits(model, tokens), expected)


def test_a_host_of_another_family_has_no_sites() -> None:
    config = BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=1, n_head=2)
    assert surgery.find(AutoModelForCausalLM.from_config(config)) == ()


class Wrapped(nn.Module):
    """A linear layer that another library has put its own round."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.inner = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize("role", ["k_proj", "o_proj"])
def test_a_projection_that_is_no_linear_layer_is_refused_by_name(role: str) -> None:
    model = tiny()
    attention = model.model.layers[1].self_attn
    setattr(attention, role, Wrapped(getattr(attention, role)))
    before = snapshot(model)
    with pytest.raises(attnzoo.AttnzooError, match=role) as caught:
        convert(model, "lowrank_gqa", method="mean", num_kv_heads=1)
    assert "\n" not in str(caught.value)
    assert_untouched(model, before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_a_converted_model_is_a_model_of_its_own(kind: str) -> None:
    model, tokens = converted(kind), ids(2, TOKENS)
    said, state = logits(model, tokens), snapshot(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, tokens), said)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    if kind not in ("latent", "replaced"):
        convert(twin, "mha", window=3, sink=1)
    assert torch.equal(logits(model, tokens), said)
    assert_untouched(model, state)


@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_model_survives_pickling(kind: str) -> None:
    model, tokens = converted(kind), ids(2, TOKENS)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), tokens), logits(model, tokens))


@pytest.mark.parametrize("kind", ["mha", "window", "s2"])
def test_a_reading_conversion_adds_no_weight_and_no_module(kind: str) -> None:
    before, after = tiny(), converted(kind)
    assert list(before.state_dict()) == list(after.state_dict())
    assert [name for name, _ in before.named_modules()] == [name for name, _ in after.named_modules()]
    assert all(torch.equal(x, after.state_dict()[name]) for name, x in before.state_dict().items())


def test_two_models_in_one_process_do_not_share_rules() -> None:
    first, second, plain, tokens = tiny(), tiny(), tiny(), ids(2, TOKENS)
    expected = logits(plain, tokens)
    convert(first, "mha", window=9, sink=2)
    convert(second, "mha")
    assert_close(logits(second, tokens), expected, 1e-11)
    assert torch.equal(logits(plain, tokens), expected)
    assert float((logits(first, tokens) - expected).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", ["window", "latent"])
def test_a_converted_model_compiles_and_says_the_same(kind: str) -> None:
    model = converted(kind, layers=1)
    compiled = torch.compile(model, backend="eager")
    tokens = ids(2, 17)
    assert_close(logits(compiled, tokens), logits(model, tokens), 1e-11)
