"""Tiny decoders of transformers."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers

from tests.attnzoo.surgery.families.hosts.exact import make_exact, randomise
from tests.attnzoo.surgery.families.hosts.host import CELLS, HEADS, KV_HEADS, VOCAB, WEIGHTS, WIDTH, Hosts

HOSTS = Hosts()

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
        # Configurations complete the tables that they are given.
        config = getattr(transformers, f"{kind}Config")(**copy.deepcopy({**sizes, **more}))
        # Quicker ways to run experts know no fp64.
        experts = {"experts_implementation": "eager"} if "num_experts_per_tok" in more else {}
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention, **experts)
    return make_exact(randomise(model))


NORMALISED = dict.fromkeys(
    WEIGHTS,
    "normalises keys after projection, which needs merged heads with a norm of their own",
)
OWN_WINDOW = "it has a sliding window of its own (6 tokens), which needs a"
WINDOWED = {
    "policy": f"{OWN_WINDOW} policy that holds what lies within it",
    **dict.fromkeys(("longheads", "landmark", "rcmha"), f"{OWN_WINDOW} variant that has one"),
}
"""What a block with a window of its own cannot be beside it."""


def every(reason: str) -> dict[str, str]:
    """Refuses all cells."""
    return dict.fromkeys(CELLS, reason)


@HOSTS.add("Llama", "LlamaAttention")
def llama() -> Any:
    return causal("Llama", attention_bias=True)


@HOSTS.add("Mistral", "MistralAttention")
def mistral() -> Any:
    return causal("Mistral", sliding_window=None, head_dim=WIDTH)


@HOSTS.add("Mistral with a window", "MistralAttention", WINDOWED)
def mistral_with_a_window() -> Any:
    return causal("Mistral", sliding_window=6, head_dim=WIDTH)


@HOSTS.add("Mixtral", "MixtralAttention")
def mixtral() -> Any:
    return causal("Mixtral", sliding_window=None, num_local_experts=2, num_experts_per_tok=1)


@HOSTS.add("Qwen2", "Qwen2Attention")
def qwen2() -> Any:
    return causal("Qwen2")


@HOSTS.add("Qwen2 with windows", "Qwen2Attention", WINDOWED)
def qwen2_with_windows() -> Any:
    # One layer of two slides.
    return causal("Qwen2", use_sliding_window=True, sliding_window=6, max_window_layers=1)


@HOSTS.add("Qwen2-MoE", "Qwen2MoeAttention")
def qwen2_moe() -> Any:
    return causal(
        "Qwen2Moe", num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8, shared_expert_intermediate_size=8
    )


@HOSTS.add("Qwen3", "Qwen3Attention", NORMALISED)
def qwen3() -> Any:
    # A width that is not heads times head width.
    return causal("Qwen3", head_dim=12)


@HOSTS.add("Qwen3-MoE", "Qwen3MoeAttention", NORMALISED)
def qwen3_moe() -> Any:
    return causal("Qwen3Moe", head_dim=WIDTH, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8)


@HOSTS.add("SmolLM3", "SmolLM3Attention")
def smollm3() -> Any:
    # The second layer is not rotated.
    return causal("SmolLM3", no_rope_layers=[1, 0])


# Its configuration cannot be made with the oldest version.
@HOSTS.add("OLMo 2", "Olmo2Attention", NORMALISED, since="5.23")
def olmo2() -> Any:
    # An old configuration of it takes no such flag.
    return causal("Olmo2", leave=("tie_word_embeddings",))


@HOSTS.add("Granite", "GraniteAttention")
def granite() -> Any:
    return causal("Granite", attention_multiplier=0.3, residual_multiplier=0.8)


@HOSTS.add("StableLM", "StableLmAttention")
def stablelm() -> Any:
    return causal(
        "StableLm",
        use_qkv_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    )


@HOSTS.add("StableLM with norms", "StableLmAttention", NORMALISED)
def stablelm_with_norms() -> Any:
    return causal(
        "StableLm",
        qk_layernorm=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    )


@HOSTS.add("Phi", "PhiAttention")
def phi() -> Any:
    return causal("Phi", rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5})


@HOSTS.add("Gemma", "GemmaAttention")
def gemma() -> Any:
    return causal("Gemma", head_dim=WIDTH)


@HOSTS.add("Gemma 3", "Gemma3Attention", {**WINDOWED, **NORMALISED})
def gemma3() -> Any:
    # Two rotations, a window in the first layer, and a factor on scores.
    return causal(
        "Gemma3Text",
        head_dim=WIDTH,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
        query_pre_attn_scalar=5,
    )


@HOSTS.add(
    "Gemma 2",
    "Gemma2Attention",
    every("caps its scores softly (attn_logit_softcapping=50.0), which needs an operation that does"),
)
def gemma2() -> Any:
    return causal("Gemma2", "eager", head_dim=WIDTH)


@HOSTS.add(
    "gpt-oss",
    "GptOssAttention",
    every("its softmax has sinks that are learned, which needs an operation that has them"),
)
def gpt_oss() -> Any:
    return causal("GptOss", "eager", head_dim=WIDTH, num_local_experts=2, num_experts_per_tok=1)


PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}


@HOSTS.add("Starcoder2", "Starcoder2Attention")
def starcoder2() -> Any:
    return causal("Starcoder2", use_bias=True)


# It attends through the attention interface from this version on.
@HOSTS.add("GPT-J", "GPTJAttention", since="5.24")
def gpt_j() -> Any:
    # Half of a head is rotated.
    return causal("GPTJ", leave=OF_LLAMAS, rotary_dim=4, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)


@HOSTS.add("Phi-3", "Phi3Attention")
def phi3() -> Any:
    return causal("Phi3", rope_parameters=PARTIAL)


@HOSTS.add("Phi-3 with a window", "Phi3Attention", WINDOWED)
def phi3_with_a_window() -> Any:
    return causal("Phi3", sliding_window=6, rope_parameters=PARTIAL)


@HOSTS.add("GPT-NeoX", "GPTNeoXAttention")
def gpt_neox() -> Any:
    return causal("GPTNeoX", leave=("num_key_value_heads",), rope_parameters=PARTIAL)


@HOSTS.add("GPT-2", "GPT2Attention")
def gpt2() -> Any:
    return causal("GPT2", leave=OF_LLAMAS, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)


# Neighbours are turned against each other, in half of a head.
GLM: dict[str, Any] = {"head_dim": WIDTH, "attention_bias": True, "rope_parameters": PARTIAL}


@HOSTS.add("GLM", "GlmAttention")
def glm() -> Any:
    return causal("Glm", **GLM)


@HOSTS.add("GLM-4", "Glm4Attention")
def glm4() -> Any:
    return causal("Glm4", **GLM)


@HOSTS.add("OPT", "OPTAttention")
def opt() -> Any:
    return causal("OPT", leave=OF_LLAMAS, ffn_dim=24, word_embed_proj_dim=HEADS * WIDTH, dropout=0.0)
