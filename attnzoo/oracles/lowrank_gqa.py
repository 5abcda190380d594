r"""Low-rank grouped attention: few key heads, or keys and values expanded from one latent, one query at a time.

Source: Yu et al. 2024, *Effectively Compress KV Heads for LLM* (arXiv:2406.07056); the plain form is Ainslie et al.
2023, *GQA* (arXiv:2305.13245); the shared latent: DeepSeek-AI 2024, *DeepSeek-V2*, equations 9 to 11
(arXiv:2405.04434), here without a separate rotated part: the expanded keys are rotated.

Letters: ``C`` model width, ``G`` key heads, ``D`` head width, ``Dv`` value width, ``r`` latent width.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from attnzoo.oracles.mha import Project, Recipe, attention, heads, linear, separate


def expanded(weights: Mapping[str, Tensor], recipe: Recipe) -> Project:
    """Keys and values from a latent: the first ``G * D`` rows of ``kv_up`` make the keys, the others the values."""

    def project(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = linear(x, weights, "q_proj")
        latent = linear(x, weights, "kv_down")
        both = linear(latent, weights, "kv_up")
        keys = recipe.num_kv_heads * recipe.head_dim
        k = both[:, :keys]
        v = both[:, keys:]
        return heads(q, recipe.num_heads), heads(k, recipe.num_kv_heads), heads(v, recipe.num_kv_heads)

    return project


def lowrank_gqa(
    x: Tensor,
    weights: Mapping[str, Tensor],
    recipe: Recipe,
    *,
    key_padding: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    r"""Softmax attention over few key heads, plain, or latent where the weights hold ``kv_down`` and ``kv_up``.

    .. math:: c_s = W_{down} x_s, \quad (k_s, v_s) = W_{up} c_s,
              \quad o_t = \sum_{s \le t} softmax_s(\sigma R_t q_t \cdot R_s k_s) v_s

    Args:
        x: Tokens ``[B, T, C]``.
        weights: ``q_proj``, ``o_proj`` and either ``k_proj``, ``v_proj`` or ``kv_down [r, C]``, ``kv_up [G(D+Dv), r]``.
        recipe: The shared numbers.
        key_padding: bool ``[B, T]``, true where a token is padding.
        positions: ``[T]`` or ``[B, T]``, for the rotation alone.
    """
    project = expanded(weights, recipe) if "kv_down.weight" in weights else separate(weights, recipe)

    def sees(_g: int, _t: int, _s: int) -> bool:
        return True

    return attention(x, weights, recipe, project=project, sees=sees, key_padding=key_padding, positions=positions)
