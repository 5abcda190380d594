"""Scores by weights alone, against the formulas written out, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnzoo import heads
from attnzoo.heads.decoder import NormWeights, decoder_parts
from attnzoo_kernels.errors import ConfigError, UnsupportedError
from tests.attnzoo.surgery.families.hosts import HOSTS
from tests.attnzoo.surgery.tiny import assert_untouched, snapshot, tiny

CLASSES = {"one": [5, 9, 14, 3, 22, 40], "other": [7, 8, 30]}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny()


def plain_share(model: Any, layer: int, head: int, step: int) -> float:
    """The share of tokens whose word ``step`` behind one head scores highest in its class, token by token."""
    inner = model.model
    block = inner.layers[layer].self_attn
    value = block.v_proj.weight[(head // 3) * 16 : (head // 3 + 1) * 16]
    output = block.o_proj.weight[:, head * 16 : (head + 1) * 16]
    hits, asked = 0, 0
    for tokens in CLASSES.values():
        for place in range(len(tokens) - step):
            x = inner.embed_tokens.weight[tokens[place]]
            x = x + inner.layers[0].mlp(inner.layers[0].post_attention_layernorm(x))
            written = output @ (value @ inner.layers[layer].input_layernorm(x))
            scores = [float(model.lm_head.weight[word] @ (inner.norm.weight * written)) for word in tokens]
            hits += scores.index(max(scores)) == place + step
            asked += 1
    return hits / asked


@pytest.mark.parametrize(("kind", "step"), [("copying", 0), ("successor", 1)])
def test_shares_are_those_of_the_formula(model: Any, kind: str, step: int) -> None:
    with torch.no_grad():
        for norm in (model.model.norm, model.model.layers[0].input_layernorm, model.model.layers[1].input_layernorm):
            norm.weight.copy_(torch.linspace(0.2, 2.0, 96, dtype=torch.float64))
        expected = [[plain_share(model, layer, head, step) for head in range(6)] for layer in range(2)]
    found = getattr(heads.scores, kind)(model, CLASSES)
    assert torch.equal(found[kind], torch.tensor(expected, dtype=torch.float64))
    assert found.about["asked"] == 9 - 2 * step
    assert found[kind].std() > 0


def test_an_embedding_that_is_its_own_unembedding_is_copied_by_a_head_that_passes_it_on() -> None:
    model = tiny(6, 6)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.get_input_embeddings().weight)
        model.model.layers[0].mlp.down_proj.weight.zero_()
        block = model.model.layers[1].self_attn
        # An orthogonal projection on 16 of the stream's values, and back.
        block.o_proj.weight[:, 32:48] = block.v_proj.weight[32:48].copy_(torch.eye(96, dtype=torch.float64)[:16]).T
    found = heads.scores.copying(model, count=20)["copying"]
    assert float(found[1, 2]) > 0.9
    assert float(found[1, 2]) == float(found.max())


def turned(x: Tensor, place: int) -> Tensor:
    """Rows ``[D, C]`` of queries' weights at a place."""
    angle = place * 10000.0 ** -(torch.arange(8, dtype=torch.float64) / 8)
    a, b = x[:8], x[8:]
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin])


def test_composition_is_that_of_whole_matrices_at_each_distance(model: Any) -> None:
    one, two = (layer.self_attn for layer in model.model.layers)
    reads, gain = (layer.input_layernorm.weight for layer in model.model.layers)
    written = one.o_proj.weight[:, 64:80] @ one.v_proj.weight[16:32] * reads
    query, key = two.q_proj.weight[16:32] * gain, two.k_proj.weight[:16] * gain
    value = two.o_proj.weight[:, 16:32] @ two.v_proj.weight[:16] * gain
    for kind in ("qk", "k", "v"):
        expected = []
        for place in range(65):
            product = turned(query, place).T @ key
            reading = {"qk": product.T, "k": product, "v": value}[kind]
            expected.append((reading @ written).norm() / reading.norm() / written.norm())
        found = heads.scores.composition(model, (0, 4), [(1, 1), (1, 5)], kind)  # type: ignore[arg-type]
        assert found.at_zero.shape == found.mean.shape == (1, 2)
        torch.testing.assert_close(found.at_zero[0, 0], expected[0])
        torch.testing.assert_close(found.mean[0, 0], torch.stack(expected).mean())


@pytest.mark.parametrize("name", ["GPT-2", "GPT-NeoX", "Gemma 2", "OPT", "Granite"])
def test_other_families_say_what_they_copy_and_stay_as_they_are(name: str) -> None:
    host = HOSTS[name].make()
    before = snapshot(host)
    found = heads.scores.copying(host, count=20)["copying"]
    assert found.shape == (2, 4)
    assert decoder_parts(host).last.centred == (name in ("GPT-2", "GPT-NeoX", "OPT"))
    assert_untouched(host, before)


def test_norms_are_read_as_products_in_their_own_dtype() -> None:
    for made in (nn.LayerNorm(12), nn.RMSNorm(12, eps=1e-5), nn.LayerNorm(12, bias=False).bfloat16()):
        with torch.no_grad():
            made.weight.copy_(torch.linspace(-1, 2, 12))
            if getattr(made, "bias", None) is not None:
                made.bias.copy_(torch.linspace(3, 1, 12))
        x = torch.randn(3, 12, generator=torch.Generator().manual_seed(0)).to(made.weight.dtype)
        wide = made.weight.dtype == torch.float32
        found = NormWeights.of("norm", made, 12).apply(x.float())
        torch.testing.assert_close(found, made(x).float(), **({} if wide else {"atol": 0.05, "rtol": 0.02}))
    with pytest.raises(UnsupportedError, match=r"norm: expected a norm by a root mean square.*Linear"):
        NormWeights.of("norm", nn.Linear(12, 12), 12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "classes: expected tokens by the name"),
        ({"a": [1]}, "at least two tokens of 'a'"),
        ({"a": [1, 1]}, "each once"),
        ({"a": [1, 61]}, "below 61"),
    ],
)
def test_classes_that_are_none_are_refused(model: Any, arguments: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        heads.scores.successor(model, arguments)


def test_what_has_no_such_weights_is_refused_by_name(model: Any) -> None:
    with pytest.raises(ConfigError, match="kind: expected one of qk, k, v"):
        heads.scores.composition(model, (0, 0), (1, 0), "q")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="b: expected heads of layers behind"):
        heads.scores.composition(model, (1, 0), (1, 1))
    with pytest.raises(ConfigError, match="b: expected heads below 6"):
        heads.scores.composition(model, (0, 0), (1, 6))
    qwen = HOSTS["Qwen3"].make()
    with pytest.raises(UnsupportedError, match="whose q_norm no product of weights stands for"):
        heads.scores.composition(qwen, (0, 0), (1, 0))
    assert heads.scores.composition(qwen, (0, 0), (1, 0), "v").mean.shape == (1, 1)
    with pytest.raises(UnsupportedError, match=r"expected a decoder with an unembedding, got .*LlamaModel"):
        heads.scores.copying(model.model)
    packed = tiny()
    packed.model.layers[1].self_attn.v_proj = nn.Sequential(packed.model.layers[1].self_attn.v_proj)
    packed.model.layers[1].self_attn.v_proj.out_features = 32
    with pytest.raises(UnsupportedError, match=r"layers.1.self_attn: expected plain weights, but v_proj"):
        heads.scores.copying(packed, count=9)
