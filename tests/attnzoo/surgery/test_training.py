"""Converted models in training: gradients arrive, a step is taken, and what was learned is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnzoo
from attnzoo import surgery
from tests.attnzoo.surgery.hosts.masks import padding_mask
from tests.attnzoo.surgery.tiny import KINDS, assert_close, calibration, convert, converted, ids, logits, tiny


def loss_of(model: Any, tokens: Tensor) -> Tensor:
    """The mean loss; the host's own is taken in fp32 whatever the model's dtype."""
    chances = model(tokens, use_cache=False).logits[:, :-1].log_softmax(-1)
    return -chances.gather(2, tokens[:, 1:, None]).mean()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_reach_every_trainable_weight(kind: str, bias: bool) -> None:
    model = converted(kind, attention_bias=bias).train()
    loss_of(model, ids(2, 24)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        # A bias of keys shifts all scores of a query alike, so that its gradient is zero up to rounding but for groups.
        if not name.endswith("k_proj.bias"):
            assert bool(parameter.grad.any()), name


@pytest.mark.parametrize("kind", ["mha", "window", "latent"])
def test_gradients_equal_finite_differences(kind: str) -> None:
    model, tokens = converted(kind).train(), ids(2, 16)
    loss_of(model, tokens).backward()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "layers.0.self_attn" not in name:
            continue
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * 1e-5)
                ends.append(float(loss_of(model, tokens)))
                parameter.sub_(direction, alpha=sign * 1e-5)
        assert parameter.grad is not None
        slope = float((parameter.grad * direction).sum())
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(slope, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_blocks_stay_frozen_after_conversion(kind: str) -> None:
    model = tiny()
    model.requires_grad_(False)
    model.model.layers[1].self_attn.requires_grad_(True)
    if kind in ("latent", "commuting"):
        size = {"latent_dim": 20} if kind == "latent" else {"num_kv_heads": 1}
        convert(model, "lowrank_gqa", method=kind, calibration=calibration(), **size)
    else:
        convert(model, "mha", window=9, sink=2)
    trainable = {name.rpartition(".self_attn.")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"model.layers.1"}
    loss_of(model.train(), ids(2, 24)).backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapter", [False, True])
def test_a_step_lowers_the_loss_and_survives_saving(kind: str, adapter: bool, tmp_path: Path) -> None:
    model, tokens = converted(kind, dtype=torch.float32).train(), ids(2, 24)
    blocks = [p for site in surgery.find(model) for p in model.get_submodule(site.path).parameters()]
    learning = blocks if adapter else list(model.parameters())
    optimizer = torch.optim.SGD(learning, lr=0.05)
    before = loss_of(model, tokens)
    before.backward()
    optimizer.step()
    model.eval()
    with torch.no_grad():
        assert float(loss_of(model, tokens)) < float(before)
    if adapter and kind in ("mha", "window", "s2"):
        # Nothing of a reading conversion is in an adapter: the base, trained, is another one.
        with pytest.raises(attnzoo.ConversionError, match=r"^base: "):
            surgery.load(surgery.save(model, tmp_path / "a", adapter_only=True), base=tiny(dtype=torch.float32))
        return
    folder = surgery.save(model, tmp_path / "a", adapter_only=adapter)
    loaded, _ = surgery.load(folder, **({"base": tiny(dtype=torch.float32)} if adapter else {}))
    assert_close(logits(loaded, tokens), logits(model, tokens), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_in_a_training_batch_gives_the_gradients_of_the_items_alone(kind: str) -> None:
    padding, tokens = [0, 7], ids(2, 20)
    mask = padding_mask(padding, 20)
    grads = []
    for alone in (False, True):
        model = converted(kind).train()
        if alone:
            first, second = (loss_of(model, tokens[i : i + 1, left:]) * (19 - left) for i, left in enumerate(padding))
            (first + second).backward()
        else:
            chances = model(tokens, attention_mask=mask).logits[:, :-1].log_softmax(-1)
            # The padded token before the first real one has no say in the loss.
            (-chances.gather(2, tokens[:, 1:, None]).squeeze(2) * mask[:, :-1]).sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert_close(grad, grads[1][name], 1e-10)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["window", "latent"])
def test_gradient_checkpointing_gives_the_same_gradients(kind: str) -> None:
    grads = []
    for checkpointing in (False, True):
        model = converted(kind).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss_of(model, ids(2, 16)).backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, again in zip(*grads, strict=True):
        assert_close(again, plain, 1e-12)
