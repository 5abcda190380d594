"""The decoder of attnzoo.models: the formulas, padding, calls of any length, the loss, landmarks, options, travels."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import attnzoo
from attnzoo import ConfigError, ShapeError, UnsupportedError, surgery
from attnzoo.cache.policies.streaming import Streaming
from attnzoo.models import CausalLM
from tests.attnzoo.models import plain
from tests.attnzoo.models.small import VARIANTS, WORDS, padded, small, texts

SIZES = {"vocab_size": WORDS, "dim": 32, "num_layers": 2, "num_heads": 4}


@pytest.fixture(scope="module", params=VARIANTS)
def model(request: pytest.FixtureRequest) -> CausalLM:
    return small(request.param)


def test_logits_are_those_of_the_formulas() -> None:
    model = small("mha")
    for gain in (
        model.norm.weight,
        *(norm.weight for block in model.blocks for norm in (block.attention_norm, block.mlp_norm)),
    ):
        torch.nn.init.uniform_(gain, 0.5, 1.5)
    ids = texts()[1]
    with torch.no_grad():
        expected = plain.logits(ids[0].tolist(), model.state_dict(), layers=2, heads=4, groups=2)
        torch.testing.assert_close(model(ids)[0], expected)


@pytest.mark.parametrize("side", ["left", "right", "between"])
def test_a_text_does_not_notice_padding_nor_its_batch(model: CausalLM, side: str) -> None:
    ids, padding = padded(texts(), side)
    with torch.no_grad():
        logits = model(ids, padding)
        for row, alone in enumerate(texts()):
            torch.testing.assert_close(logits[row, ~padding[row]], model(alone)[0])


def test_no_later_token_is_read(model: CausalLM) -> None:
    ids = texts()[0]
    other = ids.clone()
    other[:, 17:] = (other[:, 17:] + 5) % WORDS
    with torch.no_grad():
        before = model(ids)
        after = model(other)
    torch.testing.assert_close(after[:, :17], before[:, :17])
    assert (after[:, 17:] - before[:, 17:]).abs().amin(1).max() > 1e-3


def test_calls_of_any_length_are_one(model: CausalLM) -> None:
    ids, padding = padded(texts(), "left")
    cuts = [20, 1, 1, 7, 3]
    with torch.no_grad():
        cache = model.new_cache(batch=3, max_length=29)
        parts = zip(ids.split(cuts, 1), padding.split(cuts, 1), strict=True)
        logits = torch.cat([model(part, hidden, cache) for part, hidden in parts], 1)
        torch.testing.assert_close(logits[~padding], model(ids, padding)[~padding])
        with pytest.raises(ShapeError, match="max_length"):
            model(ids[:, -1:], None, cache)


@pytest.mark.parametrize("side", ["left", "right", "between"])
def test_the_loss_is_the_mean_over_all_followers(model: CausalLM, side: str) -> None:
    ids, padding = padded(texts(), side)
    with torch.no_grad(), attnzoo.record(model) as recording:
        expected = plain.cross_entropy(model(ids, padding), ids, padding)
    aux = float(recording.aux_loss)
    assert float(model.loss(ids, padding, aux_weight=0).detach()) == pytest.approx(expected)
    assert float(model.loss(ids, padding, aux_weight=0.5).detach()) == pytest.approx(expected + 0.5 * aux)
    assert (aux > 0) == (model.blocks[0].attention.config.kind == "moh")


def test_gradients_reach_every_weight(model: CausalLM) -> None:
    trained = copy.deepcopy(model).train()
    trained.loss(texts()[0]).backward()
    lost = [name for name, weight in trained.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert lost == []


@pytest.mark.parametrize("mode", ["soft", "topk"])
@pytest.mark.parametrize("variant", ["landmark", ["mha", "landmark"]])
def test_landmarks_come_and_go_by_themselves(variant: str | list[str], mode: str) -> None:
    torch.manual_seed(0)
    model = CausalLM(**SIZES, variant=variant, mode=mode, top_k=2, block_size=8).double().eval()
    torch.nn.init.normal_(model.landmark)
    ids = texts()[0]
    rows: list[Tensor] = []
    given = []
    for count, token in enumerate(ids[0].tolist(), 1):
        given.append(len(rows))
        rows.append(model.embedding.weight[token])
        if count % 7 == 0:
            rows.append(model.landmark)
    with torch.no_grad():
        x = torch.stack(rows).unsqueeze(0)
        for block in model.blocks:
            x = block(x)
        expected = model.norm(x[0, given]) @ model.embedding.weight.T
        torch.testing.assert_close(model(ids)[0], expected)
        assert model.new_cache(1, 29)[0].max_length == 29 + 29 // 7


def test_each_layer_takes_the_options_that_it_has() -> None:
    names = ["s2", "longheads"]
    options = {"block_size": 16, "vert_stride": 2, "chunk_size": 8, "attention_length": 32, "num_kv_heads": 2}
    model = CausalLM(**SIZES, variant=names, **options)
    s2, longheads = (block.attention.config for block in model.blocks)
    assert (s2.kind, s2.block_size, s2.kv_heads) == ("s2", 16, 2)
    assert (longheads.kind, longheads.chunk_size, longheads.kv_heads) == ("longheads", 8, 2)
    plain_one = CausalLM(**SIZES, vert_stride=4)
    assert plain_one.blocks[1].attention.config.kind == "s2"
    assert plain_one.blocks[1].mlp.up.weight.shape == (85, 32)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"variant": "mah"}, ConfigError, "mah.*did you mean"),
        ({"variant": ["mha"]}, ConfigError, "variant: expected a name, or 2"),
        ({"variant": ["mha", 3]}, TypeError, "variant: expected a name"),
        ({"variant": ["mha", "s2"], "blck_size": 8}, ConfigError, "blck_size: .*options of mha, s2.*'block_size'"),
        ({"variant": ["mha", "s2"], "top_k": 8}, ConfigError, "top_k: "),
        ({"variant": "mha", "causal": False}, ConfigError, "causal: expected no such option"),
        ({"num_layers": 0}, ConfigError, "num_layers: "),
        ({"vocab_size": 0}, ConfigError, "vocab_size: "),
        ({"hidden_dim": 0}, ConfigError, "hidden_dim: "),
        ({"num_heads": 5}, ConfigError, "num_heads: "),
    ],
)
def test_what_no_model_has_is_refused(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CausalLM(**{**SIZES, **options})


def test_what_no_call_takes_is_refused() -> None:
    model = small("mha")
    ids = texts()[1]
    for bad, error, message in (
        (ids[0], ShapeError, r"ids: expected \[B, T\]"),
        (ids + 12, ShapeError, "ids: expected 0 to 22"),
        (ids - 12, ShapeError, "ids: expected 0 to 22"),
        (ids.float(), TypeError, "ids: expected a Tensor of torch.int64, got torch.float32"),
        (ids.tolist(), TypeError, "ids: expected a Tensor of torch.int64, got list"),
    ):
        with pytest.raises(error, match=message):
            model(bad)
    with pytest.raises(TypeError, match=r"key_padding: expected a Tensor of torch\.bool"):
        model(ids, torch.ones_like(ids))
    with pytest.raises(ShapeError, match="key_padding: expected"):
        model(ids, torch.zeros(1, 3, dtype=torch.bool))
    with pytest.raises(ShapeError, match="cache: expected one for each of 2 layers, got 1"):
        model(ids, None, model.new_cache(1, 20)[:1])
    with pytest.raises(ConfigError, match="cache"):
        model(ids, None, small("mha").new_cache(1, 20))
    for short in (ids[:, :1], ids[:, :0]):
        with pytest.raises(ShapeError, match="ids: expected a text of two tokens or more"):
            model.loss(short)
    with pytest.raises(ShapeError, match="ids: expected a text of two tokens or more"):
        model.loss(ids, torch.arange(12).unsqueeze(0) > 0)


def test_a_policy_holds_for_all_layers() -> None:
    model = small("mha")
    ids = texts()[0]
    full = model.new_cache(1, 29)
    few = model.new_cache(1, 29, policy=Streaming(sink=1, window=5, block=1))
    with torch.no_grad():
        whole = torch.cat([model(token, None, full) for token in ids.split(1, 1)], 1)
        part = torch.cat([model(token, None, few) for token in ids.split(1, 1)], 1)
    torch.testing.assert_close(part[:, :6], whole[:, :6])
    assert (part[:, 12:] - whole[:, 12:]).abs().max() > 1e-3
    with pytest.raises(UnsupportedError, match="policy"):
        small("landmark").new_cache(1, 29, policy=Streaming(sink=1, window=5, block=1))


def test_it_travels(model: CausalLM) -> None:
    ids = texts()[0]
    other = small(model.blocks[0].attention.config.kind, seed=1)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(other(ids), model(ids))
        single = copy.deepcopy(model).float()
        half = copy.deepcopy(model).bfloat16()
        assert half(ids).dtype == torch.bfloat16
        assert float(half.loss(ids)) == pytest.approx(float(single.loss(ids)), rel=0.05)
        torch.testing.assert_close(model(ids), other(ids))


@pytest.mark.slow
def test_it_compiles() -> None:
    torch.manual_seed(0)
    model = CausalLM(**{**SIZES, "num_layers": 1}, variant="mha")
    ids = texts()[0]
    expected = model.loss(ids)
    expected.backward()
    gradient = model.embedding.weight.grad.clone()
    model.zero_grad()
    model.compile(backend="aot_eager")
    loss = model.loss(ids)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(model.embedding.weight.grad, gradient)


def test_surgery_finds_its_layers() -> None:
    model = small("mha")
    ids = texts()[0]
    before = model(ids).detach()
    assert [site.path for site in surgery.find(model)] == ["blocks.0.attention", "blocks.1.attention"]
    report = surgery.convert(model, "s2", block_size=8, local_blocks=1, sink_blocks=0, vert_stride=2)
    assert [block.attention.config.kind for block in model.blocks] == ["s2", "s2"]
    assert (model(ids).detach() - before).abs().max() > 1e-3
    report.undo()
    torch.testing.assert_close(model(ids).detach(), before)
