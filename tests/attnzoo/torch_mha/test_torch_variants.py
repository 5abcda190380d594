"""Variants inside torch's multi-head attention: attnzoo's own layers, and by name what they cannot honour."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnzoo

BATCH, TOKENS, WIDTH, HEADS = 2, 12, 16, 2
S2 = {"block_size": 2, "local_blocks": 1, "vert_stride": 2}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "s2": ("s2", S2),
    "window": ("mha", {"window": 3, "sink": 1}),
    "rotary": ("mha", {"rotary": attnzoo.RotaryConfig()}),
    "moh": ("moh", {"shared_heads": 0, "active_heads": 1}),
    "rcmha": ("rcmha", {}),
}
CAUSAL_ALONE = ("longheads", {"chunk_size": 4, "attention_length": 16})


def module_of(name: str, **options: Any) -> attnzoo.MultiheadAttention:
    """A module, batch first."""
    variant, own = VARIANTS[name]
    return attnzoo.MultiheadAttention(WIDTH, HEADS, batch_first=True, variant=variant, **own, **options)


def layer_of(module: attnzoo.MultiheadAttention, *, causal: bool) -> attnzoo.AttentionLayer:
    """attnzoo's own layer with a module's weights."""
    layer = attnzoo.create(module.layer.config, causal=causal)
    with torch.no_grad():
        weights = zip(module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3), strict=True)
        for projection, (weight, bias) in zip((layer.q_proj, layer.k_proj, layer.v_proj), weights, strict=True):
            projection.weight.copy_(weight)
            projection.bias.copy_(bias)
        layer.o_proj.load_state_dict(module.out_proj.state_dict())
    layer.load_state_dict(module.layer.state_dict(), strict=False)
    return layer


def padding() -> Tensor:
    """True at the end of one item."""
    found = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    found[1, -4:] = True
    return found


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_inside_is_attnzoos_own_layer(name: str) -> None:
    module = module_of(name)
    nn.init.normal_(module.in_proj_bias)
    x = torch.randn(BATCH, TOKENS, WIDTH)
    square = nn.Transformer.generate_square_subsequent_mask(TOKENS)
    hidden = padding()
    floats = torch.zeros(BATCH, TOKENS).masked_fill(hidden, -torch.inf)
    for call, causal, pad in (
        ({}, False, None),
        ({"attn_mask": torch.zeros(TOKENS, TOKENS)}, False, None),
        ({"key_padding_mask": hidden}, False, hidden),
        ({"attn_mask": square}, True, None),
        ({"attn_mask": square.isinf().expand(BATCH * HEADS, -1, -1)}, True, None),
        ({"is_causal": True, "key_padding_mask": floats}, True, hidden),
    ):
        if causal and name == "rcmha":
            # Its convolutions have other weights then.
            with pytest.raises(attnzoo.UnsupportedError, match=r"is_causal: expected False .* build it with causal"):
                module(x, x, x, need_weights=False, **call)
            continue
        expected = layer_of(module, causal=causal)(x, None, pad)
        out, weights = module(x, x, x, need_weights=False, **call)
        assert weights is None
        torch.testing.assert_close(out, expected)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", VARIANTS)
def test_state_travels_and_training_reaches_it(name: str) -> None:
    module = module_of(name)
    x = torch.randn(BATCH, TOKENS, WIDTH)
    own = set(dict(nn.MultiheadAttention(WIDTH, HEADS).state_dict()))
    assert {key for key in module.state_dict() if not key.startswith("layer.")} == own
    module(x, x, x, need_weights=False)[0].sum().backward()
    assert module.in_proj_weight.grad is not None
    calls: tuple[dict[str, Any], ...] = ({},) if name == "rcmha" else ({}, {"is_causal": True})
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        for call in calls:
            out = module(x, x, x, need_weights=False, **call)[0]
            assert torch.equal(twin(x, x, x, need_weights=False, **call)[0], out)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(0.5)
        twin.double()
        wide = x.double()
        for call in calls:
            # The layers of both causalities follow their module.
            assert twin(wide, wide, wide, need_weights=False, **call)[0].dtype == torch.float64
    assert module.eval().layer.training is False


@pytest.mark.parametrize("name", ["plain", pytest.param("s2", marks=pytest.mark.slow)])
def test_a_variant_compiles(name: str) -> None:
    torch.compiler.reset()
    module = module_of(name) if name in VARIANTS else attnzoo.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    x = torch.randn(BATCH, TOKENS, WIDTH)
    hidden = padding().float().masked_fill(padding(), -torch.inf)
    for call in ({"is_causal": True}, {"key_padding_mask": hidden}):
        expected = module(x, x, x, need_weights=False, **call)[0]
        torch.testing.assert_close(compiled(x, x, x, need_weights=False, **call)[0], expected)


def test_values_may_be_of_other_tokens() -> None:
    # As in DETR, whose queries and keys have positions added and whose values have none.
    for name in ("s2", "window"):
        module = module_of(name)
        x, value = torch.randn(2, BATCH, TOKENS, WIDTH).unbind()
        hidden = padding().flip(1)
        for call in ({}, {"key_padding_mask": hidden}, {"is_causal": True}):
            given = {**call, "need_weights": False}
            same = module(x, x, x, **given)[0]
            torch.testing.assert_close(module(x, x, x.clone(), **given)[0], same)
            # The output is linear in the values.
            bias = module(x, x, torch.zeros_like(x), **given)[0]
            mixed = module(x, x, 2 * x + value, **given)[0]
            torch.testing.assert_close(mixed, 2 * same + module(x, x, value, **given)[0] - 2 * bias)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_convolutions_are_for_one_causality() -> None:
    module = attnzoo.MultiheadAttention(WIDTH, HEADS, batch_first=True, variant="rcmha", causal=True)
    x = torch.randn(BATCH, TOKENS, WIDTH)
    out = module(x, x, x, need_weights=False, is_causal=True)[0]
    torch.testing.assert_close(out, layer_of(module, causal=True)(x))
    with pytest.raises(attnzoo.UnsupportedError, match="is_causal: expected True"):
        module(x, x, x, need_weights=False)


def test_plain_and_routed_heads_read_other_tokens() -> None:
    x = torch.randn(BATCH, 5, WIDTH)
    other = torch.randn(BATCH, TOKENS, WIDTH)
    module = module_of("moh")
    expected = layer_of(module, causal=False)(x, None, padding(), context=other)
    out = module(x, other, other, key_padding_mask=padding(), need_weights=False)[0]
    torch.testing.assert_close(out, expected)


def test_plans_are_recorded_whatever_a_call_is() -> None:
    for name, more in (("s2", {}), ("plain", {})):
        module = module_of(name) if name in VARIANTS else attnzoo.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        x = torch.randn(BATCH, TOKENS, WIDTH)
        with attnzoo.record(module) as recording:
            module(x, x, x, need_weights=False, **more)
            module(x, x, x, need_weights=False, is_causal=True)
        (plans,) = recording.plans.values()
        assert [plan.causal for plan in plans] == [False, True]
        assert (plans[0].density == 1.0) == (name == "plain")


def test_the_implementation_named_is_the_one_that_runs() -> None:
    module = module_of("s2")
    module.layer.impl = "quickest"
    x = torch.randn(BATCH, TOKENS, WIDTH)
    for call in ({}, {"is_causal": True}):
        with pytest.raises(ValueError, match="impl: expected"):
            module(x, x, x, need_weights=False, **call)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "weights": ("s2", {"need_weights": True}, "need_weights: expected False, got True: 's2'"),
    "scores": ("s2", {"attn_mask": torch.ones(TOKENS, TOKENS)}, "attn_mask: expected None, a mask that hides nothing"),
    "pairs": ("window", {"attn_mask": torch.eye(TOKENS).bool()}, "attn_mask: expected None"),
    "moved": ("moh", {"key_padding_mask": torch.ones(BATCH, TOKENS)}, "key_padding_mask: expected bool, or 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_variant_cannot_honour_is_refused_by_name(name: str) -> None:
    variant, call, message = REFUSED[name]
    module = module_of(variant)
    x = torch.randn(BATCH, TOKENS, WIDTH)
    with pytest.raises(attnzoo.UnsupportedError, match=message):
        module(x, x, x, **{"need_weights": False, **call})


def test_other_tokens_and_dropout_and_causality_are_refused_by_name() -> None:
    x, y = torch.randn(2, BATCH, TOKENS, WIDTH).unbind()
    for name in ("s2", "window"):
        with pytest.raises(attnzoo.UnsupportedError, match="key: expected the query's own tokens"):
            module_of(name)(x, y, y, need_weights=False)
    with pytest.raises(attnzoo.UnsupportedError, match="value: expected the keys' own tokens"):
        module_of("rcmha")(x, x, y, need_weights=False)
    with pytest.raises(attnzoo.UnsupportedError, match="keys and values must be of the same tokens for 'moh'"):
        module_of("moh")(x, y, y.clone(), need_weights=False)
    dropping = module_of("s2", dropout=0.1)
    with pytest.raises(attnzoo.UnsupportedError, match=r"dropout: expected 0 in training, got 0.1: 's2'"):
        dropping(x, x, x, need_weights=False)
    assert dropping.eval()(x, x, x, need_weights=False)[0].shape == x.shape
    variant, own = CAUSAL_ALONE
    causal = attnzoo.MultiheadAttention(WIDTH, HEADS, batch_first=True, variant=variant, **own)
    assert causal(x, x, x, need_weights=False, is_causal=True)[0].shape == x.shape
    with pytest.raises(
        attnzoo.UnsupportedError, match="is_causal: expected True, or the causal mask, with 'longheads'"
    ):
        causal(x, x, x, need_weights=False)
    ahead = attnzoo.MultiheadAttention(WIDTH, HEADS, batch_first=True, variant="s2", **{**S2, "local_blocks": (1, 2)})
    with pytest.raises(attnzoo.UnsupportedError, match="is_causal: expected False with these options of 's2'"):
        ahead(x, x, x, need_weights=False, is_causal=True)


def test_constructions_that_a_variant_cannot_have_are_refused_by_name() -> None:
    for name, value in (("kdim", 8), ("vdim", 8), ("add_bias_kv", True), ("add_zero_attn", True)):
        with pytest.raises(attnzoo.UnsupportedError, match=f"{name}: expected .*only plain attention"):
            module_of("s2", **{name: value})
    with pytest.raises(attnzoo.UnsupportedError, match="variant: expected one with torch's projections"):
        attnzoo.MultiheadAttention(WIDTH, HEADS, variant="lowrank_gqa", latent_dim=8)
    with pytest.raises(attnzoo.ConfigError, match="num_kv_heads: expected one of options of 'mha' here"):
        attnzoo.MultiheadAttention(WIDTH, HEADS, num_kv_heads=1)
