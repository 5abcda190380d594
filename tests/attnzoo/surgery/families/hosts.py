"""Tiny hosts of every class, exact in fp64: what the laws of ``test_conformance.py`` go through.

To add a class: a function here that builds one, under ``@host(...)`` with the cells that are refused and why. It is
under all laws then, and in the table of the documentation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCAB = 61
HEADS = 4
KV_HEADS = 2
WIDTH = 8

CELLS = (
    "mha",
    "window",
    "s2",
    "policy",
    "mean",
    "expand",
    "commuting",
    "latent",
    "moh",
    "longheads",
    "landmark",
    "rcmha",
)
"""What a host is converted to: what it reads, what it remembers, other weights, and layers in the places of blocks."""

WEIGHTS = ("mean", "expand", "commuting", "latent")


@dataclass(frozen=True, kw_only=True)
class Host:
    """A class of hosts.

    Attributes:
        name: Of the class, as users know it.
        make: Builds a tiny one in fp64, of which nothing is computed in fp32.
        refused: Cells that cannot be, and a piece of what the refusal says.
        attention: The name of its attention class.
    """

    name: str
    make: Callable[[], Any]
    refused: Mapping[str, str] = field(default_factory=dict)
    attention: str = ""


HOSTS: dict[str, Host] = {}


def host(
    name: str, attention: str, refused: Mapping[str, str] | None = None
) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Registers a function that builds a tiny host."""

    def register(make: Callable[[], Any]) -> Callable[[], Any]:
        HOSTS[name] = Host(name=name, make=make, refused=refused or {}, attention=attention)
        return make

    return register


class ExactNorm(nn.Module):
    """A host's norm without its detour through fp32."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(norm.weight.detach())
        self.eps = float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0)))
        # Gemma's weights are what is added to 1.
        self.shift = float("Gemma" in type(norm).__name__)

    def forward(self, x: Tensor) -> Tensor:
        return (self.shift + self.weight) * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))


class ExactRotary(nn.Module):
    """A host's rotary tables from fp64 angles, those of one kind of layers or of several."""

    def __init__(self, rotary: Any) -> None:
        super().__init__()
        parameters = rotary.config.rope_parameters
        self.frequencies: dict[str | None, Tensor] = {}
        for name, x in rotary.named_buffers():
            if name.endswith("inv_freq") and "original" not in name:
                kind = name.removesuffix("inv_freq").rstrip("_") or None
                base = (parameters if kind is None else parameters[kind])["rope_theta"]
                self.frequencies[kind] = base ** -(torch.arange(len(x), dtype=torch.float64) / len(x))

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].double() * self.frequencies[layer_type]
        both = torch.cat([angles, angles], -1)
        return both.cos().to(x.dtype), both.sin().to(x.dtype)


def make_exact(model: Any) -> Any:
    """Replaces what computes in fp32 whatever a model's dtype is."""
    for path, module in list(model.named_modules()):
        name = type(module).__name__
        new = ExactNorm(module) if name.endswith("RMSNorm") else ExactRotary(module) if "RotaryEmb" in name else None
        if new is not None:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, new)
    return model.double().eval()


def randomise(model: Any, seed: int = 0) -> Any:
    """Gives all weights values at which scores are far from uniform, and biases that are not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            std = 0.3 if p.dim() < 2 else 2 * p.shape[-1] ** -0.5
            p.copy_(std * torch.randn(p.shape, generator=generator))
            if p.dim() < 2 and "norm" in name.lower() and "bias" not in name:
                p.add_(1)
    return model


SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HEADS * WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}


OF_LLAMAS = ("intermediate_size", "num_key_value_heads", "tie_word_embeddings")
"""What other configurations call otherwise, or do not have."""


def causal(kind: str, attention: str = "sdpa", *, leave: tuple[str, ...] = (), **more: Any) -> Any:
    """A tiny causal model of transformers.

    Args:
        kind: The name of its configuration, without "Config".
        attention: How it attends.
        leave: Of ``SIZES``, what its configuration does not have.
        **more: What else it has.
    """
    with torch.random.fork_rng(devices=[]):
        sizes = {name: size for name, size in SIZES.items() if name not in leave}
        config = getattr(transformers, f"{kind}Config")(**{**sizes, **more})
        # Quicker ways to run experts know no fp64.
        experts = {"experts_implementation": "eager"} if "num_experts_per_tok" in more else {}
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention, **experts)
    return make_exact(randomise(model))


NORMALISED = dict.fromkeys(WEIGHTS, "normalises keys after projection")
WINDOWED = {
    "policy": "sliding window of its own",
    **dict.fromkeys(("longheads", "landmark", "rcmha"), "sliding window of its own"),
}
"""What a block with a window of its own cannot be beside it."""


def every(reason: str) -> dict[str, str]:
    """Refuses all cells."""
    return dict.fromkeys(CELLS, reason)


@host("Llama", "LlamaAttention")
def llama() -> Any:
    return causal("Llama", attention_bias=True)


@host("Mistral", "MistralAttention")
def mistral() -> Any:
    return causal("Mistral", sliding_window=None, head_dim=WIDTH)


@host("Mistral with a window", "MistralAttention", WINDOWED)
def mistral_with_a_window() -> Any:
    return causal("Mistral", sliding_window=6, head_dim=WIDTH)


@host("Mixtral", "MixtralAttention")
def mixtral() -> Any:
    return causal("Mixtral", sliding_window=None, num_local_experts=2, num_experts_per_tok=1)


@host("Qwen2", "Qwen2Attention")
def qwen2() -> Any:
    return causal("Qwen2")


@host("Qwen2 with windows", "Qwen2Attention", WINDOWED)
def qwen2_with_windows() -> Any:
    # One layer of two slides.
    return causal("Qwen2", use_sliding_window=True, sliding_window=6, max_window_layers=1)


@host("Qwen2-MoE", "Qwen2MoeAttention")
def qwen2_moe() -> Any:
    return causal(
        "Qwen2Moe", num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8, shared_expert_intermediate_size=8
    )


@host("Qwen3", "Qwen3Attention", NORMALISED)
def qwen3() -> Any:
    # A width that is not heads times head width.
    return causal("Qwen3", head_dim=12)


@host("Qwen3-MoE", "Qwen3MoeAttention", NORMALISED)
def qwen3_moe() -> Any:
    return causal("Qwen3Moe", head_dim=WIDTH, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8)


@host("SmolLM3", "SmolLM3Attention")
def smollm3() -> Any:
    # The second layer is not rotated.
    return causal("SmolLM3", no_rope_layers=[1, 0])


@host("OLMo 2", "Olmo2Attention", NORMALISED)
def olmo2() -> Any:
    # An old configuration of it takes no such flag.
    return causal("Olmo2", leave=("tie_word_embeddings",))


@host("Granite", "GraniteAttention")
def granite() -> Any:
    return causal("Granite", attention_multiplier=0.3, residual_multiplier=0.8)


@host("StableLM", "StableLmAttention")
def stablelm() -> Any:
    return causal(
        "StableLm",
        use_qkv_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    )


@host("StableLM with norms", "StableLmAttention", NORMALISED)
def stablelm_with_norms() -> Any:
    return causal(
        "StableLm",
        qk_layernorm=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    )


@host("Phi", "PhiAttention")
def phi() -> Any:
    return causal("Phi", rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5})


@host("Gemma", "GemmaAttention")
def gemma() -> Any:
    return causal("Gemma", head_dim=WIDTH)


@host("Gemma 3", "Gemma3Attention", {**WINDOWED, **NORMALISED})
def gemma3() -> Any:
    # Two rotations, a window in the first layer, and a factor on scores.
    return causal(
        "Gemma3Text",
        head_dim=WIDTH,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
        query_pre_attn_scalar=5,
    )


@host("Gemma 2", "Gemma2Attention", every("caps its scores softly"))
def gemma2() -> Any:
    return causal("Gemma2", "eager", head_dim=WIDTH)


@host("gpt-oss", "GptOssAttention", every("sinks that are learned"))
def gpt_oss() -> Any:
    return causal("GptOss", "eager", head_dim=WIDTH, num_local_experts=2, num_experts_per_tok=1)


PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}


@host("Phi-3", "Phi3Attention")
def phi3() -> Any:
    return causal("Phi3", rope_parameters=PARTIAL)


@host("GPT-NeoX", "GPTNeoXAttention")
def gpt_neox() -> Any:
    return causal("GPTNeoX", leave=("num_key_value_heads",), rope_parameters=PARTIAL)


@host("GPT-2", "GPT2Attention")
def gpt2() -> Any:
    return causal("GPT2", leave=OF_LLAMAS, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)


@host("OPT", "OPTAttention")
def opt() -> Any:
    return causal("OPT", leave=OF_LLAMAS, ffn_dim=24, word_embed_proj_dim=HEADS * WIDTH, dropout=0.0)
