"""Mixture-of-head attention in a pretrained host: exact at first, fewer heads warned of, trained, saved, generating."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import attnzoo
from attnzoo import surgery
from attnzoo.evaluation.decoding import Continuation, race
from attnzoo.oracles import moh as oracle
from attnzoo.surgery.replacements.replacement import Replacement
from tests.attnzoo.cases import recipe_of
from tests.attnzoo.surgery.hosts.masks import padding_mask
from tests.attnzoo.surgery.tiny import assert_close, assert_untouched, convert, ids, logits, snapshot, tiny
from tests.attnzoo.variants.test_moh import routing_of

EXACT = 1e-11
TOKENS = 30
FEWER: dict[str, dict[str, Any]] = {
    "longest queries": {"active_heads": 2, "shared_heads": 2, "router": "norm"},
    "learned": {"active_heads": 2, "shared_heads": 2},
    "groups": {"shared_heads": 0, "active_heads": 3, "route_unit": "kv_group"},
    "window": {"window": 9, "sink": 2, "block_size": 4},
    "gathered": {"active_heads": 2, "shared_heads": 2, "compute": "routed"},
}


def with_fewer(kind: str, **host: Any) -> Any:
    """A host with replacements by fewer heads, whose routers have opinions."""
    model = tiny(**host)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="moh")
        surgery.convert(model, "moh", **FEWER[kind])
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return model


def weights_of(replacement: Replacement) -> dict[str, torch.Tensor]:
    """A replacement's weights by the names that layers give them: the host's, and the layer's own."""
    state = replacement.state_dict()
    return {name.removeprefix("layer."): x for name, x in state.items()}


@pytest.mark.parametrize("options", [{}, {"shared_heads": 1}, {"router": "norm"}, {"compute": "routed"}])
@pytest.mark.parametrize("padding", [[0, 0], [0, 11]])
def test_all_heads_active_is_the_same_function(options: dict[str, Any], padding: list[int]) -> None:
    model, tokens, mask = tiny(), ids(2, TOKENS), padding_mask(padding, TOKENS)
    before, expected = snapshot(model), logits(model, tokens, attention_mask=mask)[mask.bool()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = surgery.convert(model, "moh", **options)
    assert_close(logits(model, tokens, attention_mask=mask)[mask.bool()], expected, EXACT)
    assert report.cache_bytes == (2 * 64 * 8, 2 * 64 * 8)
    assert "moh" in str(report)
    report.undo()
    assert_untouched(model, before)


@pytest.mark.parametrize("kind", FEWER)
def test_a_replacement_computes_what_the_oracle_does_with_the_hosts_weights(kind: str) -> None:
    model = with_fewer(kind, attention_bias=True)
    replacement = model.model.layers[1].self_attn
    config = replacement.layer.config
    x = torch.randn(2, 17, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    recipe = recipe_of(config)
    expected = oracle.moh(
        x, weights_of(replacement), recipe, routing_of(config), window=config.window, sink=config.sink
    ).out
    with torch.no_grad():
        assert_close(replacement(x)[0], expected, 1e-10)


def test_fewer_heads_are_warned_of_once_at_the_callers_line() -> None:
    with pytest.warns(UserWarning, match="4 of 6 heads.*healing.*norm") as caught:
        surgery.convert(tiny(layers=3), "moh", shared_heads=2, active_heads=2)
    assert [w.filename for w in caught] == [__file__]
    with pytest.warns(UserWarning, match="sink"):
        surgery.convert(tiny(), "moh", window=5)
    with pytest.warns(UserWarning, match="paper"):
        surgery.convert(tiny(), "moh", gate_norm="paper")


@pytest.mark.parametrize("kind", FEWER)
def test_generating_with_padding_and_a_cache_equals_full_forwards(kind: str) -> None:
    model, tokens, padding = with_fewer(kind), ids(2, 14), [0, 9]
    mask = padding_mask(padding, 14)
    found = model.generate(tokens * mask, attention_mask=mask, max_new_tokens=9, do_sample=False, pad_token_id=0)
    for item, left in enumerate(padding):
        row = tokens[item : item + 1, left:]
        for _ in range(9):
            row = torch.cat([row, logits(model, row, use_cache=False)[:, -1:].argmax(-1)], 1)
        assert found[item, left:].tolist() == row[0].tolist()


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("kind", FEWER)
def test_saved_replacements_say_the_same_after_loading(kind: str, adapter: bool, tmp_path: Path) -> None:
    model, tokens = with_fewer(kind, dtype=torch.float32), ids(2, 24)
    folder = surgery.save(model, tmp_path / "model", adapter_only=adapter)
    loaded, _ = surgery.load(folder, **({"base": tiny(dtype=torch.float32)} if adapter else {}))
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    assert loaded.model.layers[0].self_attn.layer.config == model.model.layers[0].self_attn.layer.config


def test_training_reaches_projections_and_routers_and_the_loss_is_recorded() -> None:
    model, tokens = with_fewer("learned").train(), ids(2, 24)
    with attnzoo.record(model) as record:
        out = model(tokens, use_cache=False).logits
    losses = [plan.aux_loss for plans in record.plans.values() for plan in plans]
    assert len(losses) == 2
    assert_close(record.aux_loss.detach(), sum(losses).detach(), 1e-12)
    (out.log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None]).mean() - 0.01 * record.aux_loss).backward()
    replacement = model.model.layers[0].self_attn
    assert isinstance(replacement, Replacement)
    for name, parameter in replacement.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()), name


def test_new_routers_are_as_trainable_and_of_the_dtype_and_mode_of_their_host() -> None:
    model = tiny(dtype=torch.bfloat16)
    model.requires_grad_(False)
    model.model.layers[1].self_attn.requires_grad_(True)
    model.model.layers[1].train()
    convert(model, "moh")
    for index, layer in enumerate(model.model.layers):
        router = layer.self_attn.layer.router
        assert router.weight.dtype == torch.bfloat16
        assert router.weight.requires_grad is bool(index)
        assert layer.self_attn.layer.training is router.training is bool(index)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"active_heads": 9}, "active_heads"),
        ({"shared_heads": 7}, "shared_heads"),
        ({"num_heads": 3}, "num_heads"),
        ({"causal": False}, "causal"),
        ({"rotary": None}, "rotary"),
        ({"heads": 3}, "heads"),
        ({"calibration": [ids(1, 8)]}, "calibration"),
    ],
)
def test_bad_options_are_refused_by_name_and_change_nothing(options: dict[str, Any], field: str) -> None:
    model = tiny()
    before = snapshot(model)
    with pytest.raises(attnzoo.ConfigError, match=rf"^{field}: "):
        surgery.convert(model, "moh", **options)
    assert_untouched(model, before)


def test_what_a_decoding_step_reads_is_the_share_of_heads_that_run() -> None:
    model = with_fewer("gathered", heads=6, kv_heads=6)
    whole = tiny(heads=6, kv_heads=6)
    surgery.convert(whole, "moh")
    sequences = []
    for one in (model, whole):
        sequence = Continuation(one)
        sequence.read(ids(1, 14)[0])
        sequences.append(sequence)
    assert race(sequences[0], sequences[1].copy()).read_share == pytest.approx(4 / 6)
    assert race(sequences[1], sequences[0].copy()).read_share == 1


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["longest queries", "gathered"])
def test_gradient_checkpointing_gives_the_same_gradients(kind: str) -> None:
    grads = []
    for checkpointing in (False, True):
        model = with_fewer(kind).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(ids(2, 16), use_cache=False).logits.log_softmax(-1)[..., 0].sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, again in zip(*grads, strict=True):
        assert_close(again, plain, 1e-12)


def test_a_model_with_replacements_compiles_and_says_the_same() -> None:
    model, tokens = with_fewer("gathered", layers=1), ids(2, 17)
    expected = logits(model, tokens)
    assert_close(logits(torch.compile(model, backend="eager"), tokens), expected, EXACT)
