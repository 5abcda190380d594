"""Tiny hosts with random weights, and what the tests here ask of them again and again."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from attnzoo import surgery
from attnzoo.surgery.convert import convert_as
from attnzoo.surgery.hosts.families.known import is_block
from attnzoo.surgery.kinds import REPLACING
from attnzoo.surgery.kinds.kind import Order

VOCAB = 61
WIDTH = 16
LATENT_SMALL = 20

READING: dict[str, tuple[str, dict[str, Any]]] = {
    "mha": ("mha", {}),
    "window": ("mha", {"window": 9, "sink": 2, "block_size": 4}),
    "s2": ("s2", {"block_size": 4, "local_blocks": 2, "vert_stride": 2}),
}
"""Conversions of what is read, at sizes where they leave keys out at a few dozen tokens."""


class ExactNorm(nn.Module):
    """The host's norm without its detour through fp32, which would round every fp64 comparison to 1e-7."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight), eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))


class ExactRotary(nn.Module):
    """The host's rotary tables from fp64 angles."""

    def __init__(self, base: float, width: int = WIDTH) -> None:
        super().__init__()
        self.base = base
        self.width = width

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        exponent = torch.arange(0, self.width, 2, dtype=torch.float64) / self.width
        angles = position_ids[..., None].double() * self.base**-exponent
        both = torch.cat([angles, angles], -1)
        return both.cos().to(x.dtype), both.sin().to(x.dtype)


def tiny(
    heads: int = 6,
    kv_heads: int = 2,
    *,
    layers: int = 2,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    **more: Any,
) -> Any:
    """A Llama with random weights; at fp64 nothing in it is computed in fp32, as eager attention's softmax would be."""
    settings: dict[str, Any] = {"attention_bias": False, "tie_word_embeddings": False, "attn_implementation": "sdpa"}
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH * heads,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=WIDTH,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        **{**settings, **more},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Twice what initialisation would give: scores far from uniform, and biases that are not zero.
                scale = 2 * parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 0.3
                parameter.normal_(std=scale).add_("norm" in name)
    if dtype == torch.float64:
        make_exact(model)
    return model.to(dtype).eval()


def width_of(config: Any) -> int:
    """The width of a host's heads."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def make_exact(model: Any) -> None:
    eps = model.config.rms_norm_eps
    for layer in model.model.layers:
        for name in ("input_layernorm", "post_attention_layernorm"):
            setattr(layer, name, ExactNorm(getattr(layer, name).weight.detach(), eps))
    model.model.norm = ExactNorm(model.model.norm.weight.detach(), eps)
    model.model.rotary_emb = ExactRotary(model.config.rope_parameters["rope_theta"], width_of(model.config))


def ids(batch: int, length: int, seed: int = 0) -> Tensor:
    """Random tokens, none of them padding."""
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def calibration(batches: int = 3, batch: int = 2, length: int = 40) -> list[Tensor]:
    """Calibration text of more tokens than any tiny host is wide."""
    return [ids(batch, length, seed=100 + i) for i in range(batches)]


def logits(model: Any, tokens: Tensor, **more: Any) -> Tensor:
    """What the model says, without a graph."""
    with torch.no_grad():
        found: Tensor = model(tokens, **more).logits
    return found


def convert(model: Any, variant: str, **options: Any) -> surgery.ConversionReport:
    """A conversion in which warnings of patterns and baselines are expected."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*of the far blocks are read by no head")
        warnings.filterwarnings("ignore", message="method 'mean' is a baseline")
        return surgery.convert(model, variant, **options)


def converted(kind: str, **host: Any) -> Any:
    """A tiny host after one of the conversions that the tests go through."""
    model = tiny(**host)
    if kind in READING:
        variant, options = READING[kind]
        convert(model, variant, **options)
    elif kind == "latent":
        convert(model, "lowrank_gqa", method="latent", latent_dim=LATENT_SMALL, calibration=calibration())
    elif kind == "commuting":
        convert(model, "lowrank_gqa", method="commuting", num_kv_heads=1, calibration=calibration())
    elif kind == "replaced":
        replace_mha(model)
    elif kind == "expand":
        convert(model, "lowrank_gqa", method="expand", num_kv_heads=model.config.num_attention_heads)
    else:
        convert(model, "lowrank_gqa", method="mean", num_kv_heads=1)
    return model


def replace_mha(model: Any, where: Any = None) -> surgery.ConversionReport:
    """Replacements by plain attention, which ``convert`` itself does not make: they certify all others."""
    sites = [site for site in surgery.find(model) if where is None or where(site)]
    return convert_as(REPLACING, Order(model=model, sites=sites, variant="mha", options={}))


KINDS = (*READING, "latent", "commuting", "expand", "mean", "replaced")


def snapshot(model: Any) -> dict[str, Any]:
    """All by which a model could have been changed: modules, weights, settings, attributes of attention blocks."""
    return {
        "modules": {name: (id(module), type(module)) for name, module in model.named_modules()},
        "parameters": {name: (id(p), p.requires_grad) for name, p in model.named_parameters()},
        "state": {name: x.clone() for name, x in model.state_dict().items()},
        "config": model.config.to_dict() if hasattr(model, "config") else None,
        "attention": getattr(getattr(model, "config", None), "_attn_implementation", None),
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
        "attributes": {name: sorted(module.__dict__) for name, module in model.named_modules() if is_block(module)},
    }


def assert_untouched(model: Any, before: dict[str, Any]) -> None:
    """Nothing of a snapshot has changed, to the bit."""
    after = snapshot(model)
    state, was = after.pop("state"), dict(before)
    old = was.pop("state")
    assert after == was
    assert state.keys() == old.keys()
    assert all(torch.equal(state[name], old[name]) for name in old)
    assert all(p.grad is None for p in model.parameters())


def assert_close(actual: Tensor, expected: Tensor, limit: float) -> None:
    """Equal up to a share of the largest expected value (or 1)."""
    assert actual.shape == expected.shape
    assert bool(actual.isfinite().all())
    largest = max(1.0, float(expected.abs().max()))
    error = float((actual.double() - expected.double()).abs().max()) / largest
    assert error <= limit, f"off by {error:.3g}"
