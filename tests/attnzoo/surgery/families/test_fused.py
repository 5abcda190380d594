"""Fused and transposed projections: taken apart, put together again, and what becomes of fewer KV heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import (
    AutoModelForCausalLM,
    Glm4Config,
    GlmConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    Starcoder2Config,
)

import attnzoo
from attnzoo import policies, surgery
from attnzoo.surgery.capture import watched
from attnzoo.surgery.convert import new_cache
from attnzoo.surgery.hosts.attention_function import pattern_of
from attnzoo.surgery.hosts.block import Need
from attnzoo.surgery.hosts.calls import cache_name
from attnzoo.surgery.hosts.families.fused import FusedRows
from attnzoo.surgery.hosts.families.grouped import GroupedAttention
from attnzoo.surgery.hosts.families.known import block_of, weights_of, with_weights
from attnzoo.surgery.hosts.positions import unrotated
from tests.attnzoo.surgery.families.hosts import HOSTS as KNOWN
from tests.attnzoo.surgery.tiny import VOCAB, assert_close, calibration, convert, ids, logits

ROUNDED = 1e-4
"""The promise in fp32: hosts compute norms and rotation in fp32 whatever their weights are."""

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 1,
    "bos_token_id": None,
    "eos_token_id": None,
}
PARTIAL = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}
GLM = {
    "num_key_value_heads": 2,
    "head_dim": 12,
    "intermediate_size": 64,
    "attention_bias": True,
    "rope_parameters": PARTIAL | {"rope_theta": 50.0},
}

HOSTS: dict[str, PreTrainedConfig] = {
    "phi3": Phi3Config(**SIZES, num_key_value_heads=2, intermediate_size=64, rope_parameters=PARTIAL),
    # Older versions rotate a quarter whatever they are told, and write that into the dict that they are given.
    "gpt_neox": GPTNeoXConfig(**{**SIZES, "hidden_size": 64}, intermediate_size=64, rope_parameters=dict(PARTIAL)),
    "gpt2": GPT2Config(**SIZES, scale_attn_by_inverse_layer_idx=True, attn_pdrop=0.0),
    "glm": GlmConfig(**SIZES, **GLM),
    "glm4": Glm4Config(**SIZES, **GLM),
    "opt": OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=48, dropout=0.0),
    "gptj": GPTJConfig(**SIZES, rotary_dim=6),
}
if "GPT-J" not in KNOWN:
    # Earlier versions have no attention function there that could be chosen.
    del HOSTS["gptj"]
MULTI_HEAD = [name for name in ("gpt_neox", "gpt2", "opt", "gptj") if name in HOSTS]


def host(name: str, *, attention: str = "sdpa") -> Any:
    """A host with random weights, biases that are no zeros among them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(HOSTS[name], attn_implementation=attention)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                scale = 2 * 48**-0.5 if parameter.dim() == 2 else 0.3
                parameter.normal_(std=scale).add_("norm" in key or "ln_" in key)
    return model.eval()


def block_in(model: Any) -> Any:
    """The attention block of a model that has one."""
    (site,) = surgery.find(model)
    return model.get_submodule(site.path)


def joined(heads: Tensor) -> Tensor:
    """``[B, h, T, D]`` to ``[B, T, h * D]``."""
    return heads.transpose(1, 2).flatten(2)


def fewer(model: Any, method: str = "mean") -> surgery.ConversionReport:
    text = None if method == "mean" else calibration()
    return convert(model, "lowrank_gqa", method=method, num_kv_heads=2, calibration=text)


def test_rows_in_the_order_of_roles_and_of_heads_are_told_apart() -> None:
    numbers = torch.arange(18)
    q, k, v = FusedRows(heads=3, kv_heads=3, head_dim=2, order="heads").split(numbers)
    assert (q.tolist(), k.tolist()) == ([0, 1, 6, 7, 12, 13], [2, 3, 8, 9, 14, 15])
    assert v.tolist() == [4, 5, 10, 11, 16, 17]
    q, k, v = FusedRows(heads=5, kv_heads=2, head_dim=2, order="roles").split(numbers)
    assert (q.tolist(), k.tolist(), v.tolist()) == (list(range(10)), list(range(10, 14)), list(range(14, 18)))
    for order, kv_heads, heads in (("heads", 3, 3), ("roles", 2, 5)):
        rows = FusedRows(heads=heads, kv_heads=kv_heads, head_dim=2, order=order)  # type: ignore[arg-type]
        assert torch.equal(rows.fuse(*rows.split(numbers)), numbers)


@pytest.mark.parametrize("name", HOSTS)
def test_weights_by_role_are_what_the_block_projects_by(name: str) -> None:
    attention = block_in(host(name))
    block = block_of(attention)
    p = block.weights()
    x = torch.randn(2, 5, p.q.shape[1], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        q, k, v = (joined(heads) for heads in block.project(x))
        # Where queries are scaled before their products, the factor on scores is another.
        assert_close(q * block.scale, linear(x, p.q, p.q_bias) * p.scale, 1e-6)
        assert_close(k, linear(x, p.k, p.k_bias), 1e-6)
        assert_close(v, linear(x, p.v, p.v_bias), 1e-6)
        assert_close(block.output(x), linear(x, p.o, p.o_bias), 1e-6)


@pytest.mark.parametrize("name", HOSTS)
def test_weights_taken_apart_and_put_together_are_the_same_to_the_bit(name: str) -> None:
    attention = block_in(host(name))
    before = attention.state_dict()
    again = with_weights(attention, weights_of(attention))
    assert type(again) is type(attention)
    after = again.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], x) and after[key].is_contiguous() for key, x in before.items())
    assert all(after[key].data_ptr() != x.data_ptr() for key, x in before.items())


@pytest.mark.parametrize("kind", ["mha", "latent", "moh"])
@pytest.mark.parametrize("name", HOSTS)
def test_conversions_that_change_nothing_say_the_same_beside_padding(name: str, kind: str) -> None:
    model = host(name)
    tokens = ids(2, 20)
    masks = torch.ones(2, 2, 20, dtype=torch.int64)
    masks[0, 1, :7] = 0
    masks[1, 1, 12:] = 0
    expected = [logits(model, tokens, attention_mask=mask)[mask.bool()] for mask in masks]
    (site,) = surgery.find(model)
    if kind == "latent":
        width = 2 * site.kv_heads * site.head_dim
        convert(model, "lowrank_gqa", method="latent", latent_dim=width, calibration=calibration())
    else:
        convert(model, kind)
    for mask, said in zip(masks, expected, strict=True):
        assert_close(logits(model, tokens, attention_mask=mask)[mask.bool()], said, ROUNDED)


def test_fewer_kv_heads_of_phi3_are_an_ordinary_checkpoint(tmp_path: Path) -> None:
    model = host("phi3")
    convert(model, "lowrank_gqa", method="commuting", num_kv_heads=1, calibration=calibration())
    assert model.config.num_key_value_heads == 1
    surgery.save(model, tmp_path / "phi3")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "phi3").eval()
    assert torch.equal(logits(plain, ids(2, 20)), logits(model, ids(2, 20)))


@pytest.mark.parametrize("name", MULTI_HEAD)
def test_fewer_kv_heads_where_no_setting_holds_them_are_a_block_of_ours(name: str, tmp_path: Path) -> None:
    model = host(name)
    tokens = ids(2, 20)
    expected = logits(model, tokens)
    report = fewer(model, "commuting")
    assert report.cache_bytes[1] * 2 == report.cache_bytes[0]
    assert isinstance(block_in(model), GroupedAttention)
    # It attends by whatever the host is set to.
    assert model.config._attn_implementation == "sdpa"
    said = logits(model, tokens)
    model.set_attn_implementation("eager")
    assert_close(logits(model, tokens), said, ROUNDED)
    model.set_attn_implementation("sdpa")
    surgery.save(model, tmp_path / name)
    with pytest.raises(ValueError, match="attnzoo"):
        AutoModelForCausalLM.from_pretrained(tmp_path / name)
    assert torch.equal(logits(surgery.load(tmp_path / name)[0], tokens), said)
    report.undo()
    assert torch.equal(logits(model, tokens), expected)


@pytest.mark.parametrize("name", MULTI_HEAD)
def test_heads_that_are_repeated_merge_without_loss(name: str) -> None:
    model = host(name)
    attention = block_in(model)
    p = weights_of(attention)
    twice: dict[str, Tensor] = {}
    for role in ("k", "v") if p.k_bias is None else ("k", "v", "k_bias", "v_bias"):
        heads = getattr(p, role).detach().unflatten(0, (4, -1)).clone()
        heads[1::2] = heads[::2]
        twice[role] = heads.flatten(0, 1)
    with torch.no_grad():
        for role, x in twice.items():
            getattr(p, role).copy_(x) if name != "gpt_neox" else None
        if name == "gpt_neox":
            rows = FusedRows(heads=4, kv_heads=4, head_dim=p.q.shape[0] // 4, order="heads")
            fused = attention.query_key_value
            fused.weight.copy_(rows.fuse(p.q.T, twice["k"].T, twice["v"].T).T)
            fused.bias.copy_(rows.fuse(p.q_bias, twice["k_bias"], twice["v_bias"]))  # type: ignore[arg-type]
    tokens = ids(2, 20)
    expected = logits(model, tokens)
    convert(model, "lowrank_gqa", method="commuting", num_kv_heads=2, calibration=calibration(), refit=False)
    assert_close(logits(model, tokens), expected, ROUNDED)


@pytest.mark.parametrize("name", MULTI_HEAD)
def test_a_block_of_fewer_heads_is_read_and_merged_again_as_the_hosts_own(name: str) -> None:
    model = host(name)
    tokens = ids(2, 24)
    fewer(model)
    said = logits(model, tokens)
    convert(model, "mha")
    assert_close(logits(model, tokens), said, ROUNDED)
    convert(model, "mha", window=5, sink=1, block_size=4)
    cache = new_cache(model)
    logits(model, tokens, **{cache_name(type(model).forward): cache})
    assert type(cache.layers[0]).__name__ == "EvictingCacheLayer"
    convert(model, "lowrank_gqa", method="mean", num_kv_heads=1)
    assert block_of(block_in(model)).kv_heads == 1
    assert pattern_of(block_in(model)) is not None


@pytest.mark.parametrize("name", HOSTS)
def test_queries_and_keys_are_turned_back_as_the_host_has_turned_them(name: str) -> None:
    model = host(name)
    attention = block_in(model)
    seen: list[Any] = []
    rotation: list[Any] = []
    handle = attention.register_forward_pre_hook(
        lambda module, args, kwargs: rotation.append(kwargs.get("position_embeddings")), with_kwargs=True
    )
    with watched(model, lambda site, call: seen.append(call), unrotated=True):
        logits(model, ids(2, 9))
    handle.remove()
    (call,) = seen
    neighbours = dict.fromkeys(("glm", "glm4", "gptj"), "neighbours")
    planes = {"phi3": "halves", "gpt_neox": "halves", **neighbours}.get(name)
    assert block_of(attention).planes == planes
    tables = None if planes is None else block_of(attention).tables(rotation[0])
    for x, expected in zip((call.q, call.k), call.unrotated, strict=True):
        back = x if tables is None else unrotated(x, *tables, interleaved=planes == "neighbours")
        assert_close(back, expected, 1e-5)


@pytest.mark.parametrize("name", [name for name in ("glm", "gptj") if name in HOSTS])
def test_a_retaining_policy_is_shown_what_is_not_rotated(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = host(name)
    seen: list[Any] = []
    with watched(model, lambda site, call: seen.append(call), unrotated=True):
        logits(model, ids(2, 9))
    shown: list[tuple[Tensor, Tensor]] = []
    own = policies.Locret.scores_of

    def note(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
        shown.append((q, k))
        return own(self, q, k, v)

    monkeypatch.setattr(policies.Locret, "scores_of", note)
    kv_heads = block_of(block_in(model)).kv_heads
    head = policies.RetainingHead.of_weights(torch.ones(3, (4 + 2 * kv_heads) * 12), torch.ones(kv_heads, 3))
    with policies.applied(model, policies.Locret([head], budget=9, local=3)):
        logits(model, ids(2, 9))
    ((q, k),) = shown
    for x, expected in zip((q, k), seen[0].unrotated, strict=True):
        assert_close(x, expected, 1e-5)


@pytest.mark.parametrize("name", HOSTS)
def test_a_policy_that_scores_rows_works(name: str) -> None:
    model = host(name)
    tokens = ids(1, 40)
    mask = torch.ones_like(tokens)
    expected = model.generate(tokens, attention_mask=mask, max_new_tokens=4, do_sample=False)
    with policies.applied(model, policies.SnapKV(budget=64)):
        found = model.generate(tokens, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert torch.equal(found, expected)


def test_what_gpt2_drops_in_training_is_dropped_or_refused() -> None:
    model = host("gpt2")
    attention = block_in(model)
    attention.attn_dropout.p = 0.1
    convert(model, "mha")
    with pytest.raises(attnzoo.UnsupportedError, match=r"dropout: expected 0, got 0\.1"):
        model.train()(ids(1, 5))
    model.eval()
    convert(model, "lowrank_gqa", method="latent", latent_dim=20, calibration=calibration())
    latent = block_in(model).train()
    with pytest.raises(attnzoo.UnsupportedError, match=r"dropout: expected 0, got 0\.1"):
        model(ids(1, 5))
    latent.drops = 0.0
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dropped = latent.block().output(torch.ones(1, 50, 48))
    assert 0.02 < float((dropped == 0).double().mean()) < 0.25


def test_what_starcoder2_drops_of_its_outputs_is_dropped_by_what_replaces_it() -> None:
    config = Starcoder2Config(**SIZES, num_key_value_heads=2, intermediate_size=64, residual_dropout=0.1)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert block_of(block_in(model)).output_dropout == 0.1
    expected = logits(model, ids(1, 9))
    convert(model, "lowrank_gqa", method="latent", latent_dim=48, calibration=calibration())
    assert_close(logits(model, ids(1, 9)), expected, ROUNDED)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dropped = block_in(model).train().block().output(torch.ones(1, 50, 48))
    assert 0.02 < float((dropped == 0).double().mean()) < 0.25


def test_landmarks_take_no_position_of_a_host_that_numbers_tokens_by_its_mask() -> None:
    model = host("opt")
    tokens = ids(2, 20)
    mask = torch.ones_like(tokens)
    mask[1, :7] = 0
    expected = logits(model, tokens, attention_mask=mask)[mask.bool()]
    convert(model, "landmark", block_size=6)
    assert_close(logits(model, tokens, attention_mask=mask)[mask.bool()], expected, ROUNDED)


def test_cross_attention_is_refused_by_name() -> None:
    config = GPT2Config(**SIZES, add_cross_attention=True)
    model = AutoModelForCausalLM.from_config(config)
    for site in surgery.find(model):
        reasons = block_of(model.get_submodule(site.path)).reasons
        assert all("cross-attention" in " ".join(reasons[need]) for need in Need)
    with pytest.raises(attnzoo.UnsupportedError, match="cross-attention"):
        surgery.convert(model, "mha", window=4, sink=1)


@pytest.mark.parametrize("name", MULTI_HEAD)
def test_blocks_come_back_in_the_dtype_that_the_model_was_moved_to(name: str) -> None:
    model = host(name)
    report = fewer(model)
    model.double()
    report.undo()
    assert {x.dtype for x in block_in(model).parameters()} == {torch.float64}
