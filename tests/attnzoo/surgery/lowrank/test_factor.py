"""Low-rank conversions of whole models: certificates, optimality, and what they are worth beside the baseline."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from attnzoo import surgery
from tests.attnzoo.surgery.hosts.hooks import seen_by_hooks, with_one
from tests.attnzoo.surgery.tiny import (
    WIDTH,
    assert_close,
    calibration,
    convert,
    converted,
    ids,
    logits,
    make_exact,
    tiny,
)

EXACT = 1e-11
TOKENS = 30


def effective(attention: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of keys and values of a latent replacement, as if they were projected at once."""
    up = attention.kv_up.weight.detach()
    bias = None if attention.kv_down.bias is None else up @ attention.kv_down.bias.detach()
    return up @ attention.kv_down.weight.detach(), bias


def both(attention: Any) -> tuple[Tensor, Tensor | None]:
    """The same of a block with keys and values of its own."""
    bias = None if attention.k_proj.bias is None else torch.cat([attention.k_proj.bias, attention.v_proj.bias]).detach()
    return torch.cat([attention.k_proj.weight, attention.v_proj.weight]).detach(), bias


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("heads", "groups"), [(9, 3), (4, 4), (4, 1)])
def test_a_latent_of_full_rank_is_the_identity(heads: int, groups: int, bias: bool) -> None:
    model, tokens = tiny(heads, groups, attention_bias=bias), ids(2, TOKENS)
    expected = logits(model, tokens)
    convert(model, "lowrank_gqa", method="latent", latent_dim=2 * groups * WIDTH, calibration=calibration())
    assert_close(logits(model, tokens), expected, EXACT)


@pytest.mark.parametrize("options", [{"refit": False}, {"refit": False, "gradients": False}])
@pytest.mark.parametrize("groups", [2, 6])
def test_as_many_kv_heads_as_before_are_the_identity(groups: int, options: dict[str, Any]) -> None:
    model, tokens = tiny(6, groups), ids(2, TOKENS)
    expected = logits(model, tokens)
    convert(model, "lowrank_gqa", method="commuting", num_kv_heads=groups, calibration=calibration(), **options)
    assert_close(logits(model, tokens), expected, EXACT)


@pytest.mark.parametrize("bias", [False, True])
def test_a_latent_replacement_computes_what_the_host_computes_with_its_effective_weights(bias: bool) -> None:
    host = tiny(9, 3, attention_bias=bias)
    model, tokens = copy.deepcopy(host), ids(2, TOKENS)
    convert(model, "lowrank_gqa", method="latent", latent_dim=20, calibration=calibration())
    for old, new in zip(host.model.layers, model.model.layers, strict=True):
        weight, constant = effective(new.self_attn)
        with torch.no_grad():
            for linear, rows in zip((old.self_attn.k_proj, old.self_attn.v_proj), weight.chunk(2), strict=True):
                linear.weight.copy_(rows)
            if constant is not None:
                for linear, rows in zip((old.self_attn.k_proj, old.self_attn.v_proj), constant.chunk(2), strict=True):
                    linear.bias.copy_(rows)
    mask = (torch.arange(TOKENS) >= torch.tensor([[0], [11]])).long()
    for padding in (None, mask):
        real = torch.ones_like(tokens) if padding is None else padding
        said = [logits(m, tokens, attention_mask=padding)[real.bool()] for m in (model, host)]
        assert_close(said[0], said[1], EXACT)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gradients", [True, False])
def test_no_other_latent_of_this_rank_loses_less_on_the_calibration_text(gradients: bool, bias: bool) -> None:
    # Oracle: rows of inputs and gradients, weighted as published, and the singular values of X W G^T.
    model = tiny(6, 2, attention_bias=bias)
    before, text = copy.deepcopy(model), [{"input_ids": x} for x in calibration()]
    report = convert(model, "lowrank_gqa", method="latent", latent_dim=20, calibration=text, gradients=gradients)
    for layer, entry in enumerate(report.sites):
        path = f"model.layers.{layer}.self_attn"
        seen = seen_by_hooks(before, text, path)
        x, first = with_one(seen["x"], bias), with_one(seen["first"], bias)
        old, new = (
            _augmented(*parts) for parts in (both(before.get_submodule(path)), effective(model.get_submodule(path)))
        )
        if gradients:
            weight = seen["g"].square().sum(1, keepdim=True)
            heavy = (x * weight.sqrt()) * (x.square().sum() / (x.square() * weight).sum()).sqrt()
            rows, reads = torch.cat([heavy, x]), seen["g"]
        else:
            # Position 0 counts a tenth more; keys and values weigh the same.
            rows = torch.cat([x / len(x) ** 0.5, first * (0.1 / len(first)) ** 0.5])
            energy = (rows @ old.T).square().sum(0).view(2, -1).sum(1)
            reads = torch.diag(energy.rsqrt().repeat_interleave(old.shape[0] // 2))
        values = torch.linalg.svdvals(rows @ old.T @ reads.T).square()
        lost = float((rows @ (old - new).T @ reads.T).square().sum())
        # The statistics are sums of fp32 products, and the moment has a ridge of 1e-6.
        assert lost <= float(values[20:].sum()) * (1 + 1e-3)
        assert entry.kept == pytest.approx(float(values[:20].sum() / values.sum()), abs=1e-4)


def _augmented(weight: Tensor, bias: Tensor | None) -> Tensor:
    return weight if bias is None else torch.cat([weight, bias.unsqueeze(1)], 1)


@pytest.mark.parametrize("kind", ["commuting", "mean", "expand"])
@pytest.mark.parametrize("bias", [False, True])
def test_merged_heads_are_an_ordinary_grouped_model(kind: str, bias: bool) -> None:
    model, tokens = converted(kind, attention_bias=bias), ids(2, TOKENS)
    assert model.config.num_key_value_heads == (6 if kind == "expand" else 1)
    plain: Any = LlamaForCausalLM(copy.deepcopy(model.config))
    make_exact(plain)
    plain.double().eval().load_state_dict(model.state_dict())
    assert torch.equal(logits(plain, tokens), logits(model, tokens))


def test_the_mean_is_the_mean_of_neighbours_and_leaves_queries_and_outputs() -> None:
    model = tiny(8, 4, attention_bias=True)
    before = copy.deepcopy(model)
    convert(model, "lowrank_gqa", method="mean", num_kv_heads=2)
    for old, new in zip(before.model.layers, model.model.layers, strict=True):
        for name in ("k_proj", "v_proj"):
            for kind in ("weight", "bias"):
                x = getattr(getattr(old.self_attn, name), kind).unflatten(0, (2, 2, WIDTH)).mean(1).flatten(0, 1)
                torch.testing.assert_close(getattr(getattr(new.self_attn, name), kind), x, rtol=0, atol=1e-15)
        for name in ("q_proj", "o_proj"):
            assert torch.equal(getattr(old.self_attn, name).weight, getattr(new.self_attn, name).weight)


def noisy_copies(noise: float, *, seed: int = 0) -> Any:
    """A model whose nine KV heads are three, each thrice with a little noise, in an order that is not theirs."""
    model = tiny(9, 3, seed=seed)
    convert(model, "lowrank_gqa", method="expand", num_kv_heads=9)
    generator = torch.Generator().manual_seed(seed)
    for block in model.model.layers:
        rows = (torch.randperm(9, generator=generator)[:, None] * WIDTH + torch.arange(WIDTH)).flatten()
        attention = block.self_attn
        with torch.no_grad():
            for name in ("q_proj", "k_proj", "v_proj"):
                weight = getattr(attention, name).weight
                weight.copy_(weight[rows])
                if name != "q_proj":
                    size = noise * float(weight.std())
                    weight.add_(size * torch.randn(weight.shape, generator=generator, dtype=torch.float64))
            attention.o_proj.weight.copy_(attention.o_proj.weight[:, rows])
    return model


@pytest.mark.parametrize("refit", [True, False])
def test_nearly_redundant_heads_merge_at_a_small_price_where_the_mean_ruins_them(refit: bool) -> None:
    tokens, error = ids(4, TOKENS, seed=50), {}
    expected = logits(noisy_copies(0.02), tokens)
    for method, options in (("mean", {}), ("commuting", {"calibration": calibration(3, 4, 40), "refit": refit})):
        model = noisy_copies(0.02)
        convert(model, "lowrank_gqa", method=method, num_kv_heads=3, **options)
        error[method] = float((logits(model, tokens) - expected).norm() / expected.norm())
    # Noise of 2 % in keys and values may show, but not be multiplied; the mean mixes heads that are unrelated.
    assert error["commuting"] < 0.1
    assert error["commuting"] < error["mean"] / 5


def test_more_values_keep_more_and_lose_less_on_the_calibration_text() -> None:
    text = calibration()
    tokens = torch.cat(text)
    expected, kept, error = logits(tiny(), tokens), [], []
    for rank in (8, 16, 32, 48, 64):
        model = tiny()
        report = convert(model, "lowrank_gqa", method="latent", latent_dim=rank, calibration=text)
        kept.append(min(site.kept or 0.0 for site in report.sites))
        error.append(float((logits(model, tokens) - expected).norm()))
    assert kept == sorted(kept)
    assert kept[-1] == 1
    assert error == sorted(error, reverse=True)


def test_the_same_text_gives_the_same_weights_and_a_text_twice_counts_once() -> None:
    for options in ({"method": "latent", "latent_dim": 20}, {"method": "commuting", "num_kv_heads": 1}):
        once, again, twice = tiny(), tiny(), tiny()
        for model, text in ((once, calibration()), (again, calibration()), (twice, calibration() * 2)):
            convert(model, "lowrank_gqa", calibration=text, **options)
        for name, x in once.state_dict().items():
            assert torch.equal(x, again.state_dict()[name]), name
        tokens = ids(2, TOKENS)
        assert_close(logits(twice, tokens), logits(once, tokens), 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["latent", "commuting"])
def test_conversion_of_low_precision_models_is_finite_and_keeps_the_dtype(kind: str, dtype: torch.dtype) -> None:
    model, tokens = tiny(dtype=dtype), ids(2, TOKENS)
    options: dict[str, Any] = {"latent_dim": 60} if kind == "latent" else {"num_kv_heads": 1}
    report = convert(model, "lowrank_gqa", method=kind, calibration=calibration(), **options)
    assert all(x.dtype == dtype for x in model.state_dict().values())
    found = logits(model, tokens)
    assert found.dtype == dtype
    assert bool(found.isfinite().all())
    exact = tiny()
    there = convert(exact, "lowrank_gqa", method=kind, calibration=calibration(), **options)
    for ours, theirs in zip(report.sites, there.sites, strict=True):
        assert ours.kept == pytest.approx(theirs.kept, abs=0.05)


def test_only_chosen_layers_shrink_and_the_host_decodes_with_different_heads_per_layer() -> None:
    model = tiny(layers=3)
    convert(
        model, "lowrank_gqa", method="commuting", num_kv_heads=1, calibration=calibration(), where=lambda s: s.layer > 0
    )
    assert [site.kv_heads for site in surgery.find(model)] == [2, 1, 1]
    tokens = ids(2, TOKENS)
    with torch.no_grad():
        cache = model(tokens[:, :20], use_cache=True).past_key_values
        late = model(tokens[:, 20:], past_key_values=cache).logits
    assert_close(late, logits(model, tokens)[:, 20:], EXACT)


def test_a_model_with_tied_embeddings_stays_tied() -> None:
    model = converted("commuting", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
