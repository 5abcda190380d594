r"""Low-rank grouped attention: few KV heads, or all of them expanded from one cached latent.

Source: Yu et al. 2024, *Effectively Compress KV Heads for LLM* (arXiv:2406.07056); the plain form is Ainslie et al.
2023, *GQA* (arXiv:2305.13245); the shared latent: DeepSeek-AI 2024, *DeepSeek-V2*, equations 9 to 11
(arXiv:2405.04434).

.. math:: c_s = W_{down} x_s, \qquad (k_s, v_s) = W_{up} c_s,
          \qquad o_t = \sum_{s \le t} softmax_s(\sigma R_t q_t \cdot R_s k_s) v_s

Departures: the latent form has no separate rotated part: the cache holds latents that are not rotated, and the expanded
keys are rotated when they are used. That saves memory and costs time: each call expands everything that it may read.

Letters: G KV heads, D head width, Dv value width, r latent width, S key tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from attnzoo.base.config import AttentionConfig, check_int
from attnzoo.base.decoding.compiled import HiddenRow, hidden_from_compilers
from attnzoo.base.decoding.latent import LatentHeads, attend_absorbed
from attnzoo.base.decoding.step import TokenRow
from attnzoo.base.evicting.layer import PolicyLayer
from attnzoo.base.layer import AttentionInputs, Heads, Step
from attnzoo.base.projections import is_unwatched
from attnzoo.base.rope import RotaryConfig as RotaryConfig
from attnzoo.base.rope import apply_rotary, rotary_tables
from attnzoo.base.steps import is_training
from attnzoo.cache.kv_cache import KVCache, Stream
from attnzoo_kernels import Slots, attend_slots
from attnzoo_kernels.errors import UnsupportedError


@dataclass(frozen=True, kw_only=True)
class LowRankGQAConfig(AttentionConfig):
    """Grouped or latent attention.

    Attributes:
        num_kv_heads: KV heads; ``None`` means the largest divisor of ``num_heads`` that is at most half of it, or all
            heads with a latent.
        latent_dim: Values cached for each token, from which all keys and values are expanded; ``None`` caches the keys
            and values themselves.
    """

    latent_dim: int | None = None

    def __post_init__(self) -> None:
        if self.latent_dim is not None:
            check_int("latent_dim", self.latent_dim, 1)
        super().__post_init__()

    @property
    def kv_heads(self) -> int:
        """KV heads G."""
        if self.num_kv_heads is not None:
            return self.num_kv_heads
        if self.latent_dim is not None:
            return self.num_heads
        return next(n for n in range(max(1, self.num_heads // 2), 0, -1) if self.num_heads % n == 0)

    @property
    def cautions(self) -> tuple[str, ...]:
        """That nothing is saved."""
        plain = 2 * self.num_heads * self.head_width
        if self.latent_dim is not None and self.latent_dim >= plain:
            return (
                f"lowrank_gqa: a latent of {self.latent_dim} values is no less than the {plain} keys and values of "
                "plain attention, so that nothing is saved; choose a smaller latent_dim",
            )
        if self.latent_dim is None and self.kv_heads == self.num_heads:
            return (
                f"lowrank_gqa: num_kv_heads is num_heads, {self.num_heads}, and there is no latent: this is plain "
                "attention; choose fewer num_kv_heads, or a latent_dim",
            )
        return ()

    @classmethod
    def small(cls) -> Self:
        """Four heads of 8 from a latent of 12."""
        return cls(dim=32, num_heads=4, num_kv_heads=2, latent_dim=12)


class LowRankGQAAttention(PolicyLayer, name="lowrank_gqa"):
    """Attention that remembers less: fewer KV heads, or a latent."""

    config_class = LowRankGQAConfig
    config: LowRankGQAConfig
    causal_promise = "bidirectional-capable"
    compiles_rows = True
    dense_limit: ClassVar[dict[str, Any]] = {"latent_dim": None}

    def build_projections(self, *, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """Makes the weights: ``kv_down`` and ``kv_up`` take the place of ``k_proj`` and ``v_proj`` with a latent.

        The first ``G * D`` rows of ``kv_up`` make the keys, the others the values.
        """
        config = self.config
        if config.latent_dim is None:
            super().build_projections(device=device, dtype=dtype)
            return
        width = config.head_width
        heads = config.num_heads
        latent = config.latent_dim
        both = 2 * config.kv_heads * width
        self.q_proj = nn.Linear(config.dim, heads * width, bias=config.bias, device=device, dtype=dtype)
        self.kv_down = nn.Linear(config.dim, latent, bias=config.bias, device=device, dtype=dtype)
        self.kv_up = nn.Linear(latent, both, bias=config.bias, device=device, dtype=dtype)
        self.o_proj = nn.Linear(heads * width, config.dim, bias=config.bias, device=device, dtype=dtype)

    def project(self, step: Step) -> Heads:
        """As the base; with a latent, ``k`` is the latent ``[B, 1, T, r]`` and ``v`` is empty."""
        if self.config.latent_dim is None:
            return super().project(step)
        source = step.x if step.context is None else step.context
        q = self.q_proj(step.x).unflatten(-1, (-1, self.config.head_width)).transpose(1, 2)  # [B, H, T, D]
        latent = self.kv_down(source).unsqueeze(1)  # [B, 1, T, r]
        if q.shape[1] != self.config.num_heads or latent.shape[-1] != self.config.latent_dim:
            raise UnsupportedError(
                f"q_proj, kv_down: expected {self.config.num_heads} heads and {self.config.latent_dim} values of a "
                f"latent, got {q.shape[1]} and {latent.shape[-1]}: with a latent lowrank_gqa does not run under tensor "
                "parallelism; shard its parameters (FSDP) instead"
            )
        return Heads(q, latent, latent[..., :0])

    def remember(self, step: Step, heads: Heads) -> AttentionInputs:
        """Caches the latent and each token's position; expands and rotates whatever may be read."""
        if self.config.latent_dim is None:
            return super().remember(step, heads)
        latent = heads.k
        positions = step.positions
        if step.cache is not None:
            position = positions.to(torch.int32).expand(step.x.shape[0], -1)[:, None, :, None]  # [B, 1, T, 1]
            training = is_training(heads.q, latent, *self.kv_up.parameters())
            seen = step.cache.append({"latent": latent, "position": position}, step.lengths, differentiable=training)
            latent = seen["latent"]
            positions = seen["position"].flatten(1)  # [B, S]
        k, v = self.expand(latent)
        q = heads.q
        if step.context is None:
            (q,) = self.rotate_rows(step, q)
            (k,) = self.rotate_rows(step, k) if step.cache is None else self.rotate(positions, k)
        return self.attention_inputs(step, q, k, v)

    def expand(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Keys ``[B, G, S, D]``, not rotated, and values ``[B, G, S, Dv]`` from latents ``[B, 1, S, r]``."""
        heads = self.kv_up(latent.squeeze(1)).unflatten(-1, (-1, self.config.head_width)).transpose(1, 2)
        if heads.shape[1] != 2 * self.config.kv_heads:
            raise UnsupportedError(
                f"kv_up: expected keys and values of {self.config.kv_heads} KV heads, got {heads.shape[1]} heads in "
                "all: they cannot be divided among processes"
            )
        keys, values = heads.chunk(2, dim=1)  # [B, G, S, D] each
        return keys, values

    def why_no_policy(self) -> str | None:
        """Latents are no keys: a head's rows cannot be left out one by one."""
        if self.config.latent_dim is not None:
            return "its cache holds latents, which all heads share"
        return super().why_no_policy()

    def row_slots(self, held: int, device: torch.device) -> Slots:
        """Everything."""
        return Slots(((0, held),))

    def row_projections(self) -> tuple[tuple[nn.Module, int], ...]:
        """With a latent, those that make it and expand it."""
        config = self.config
        if config.latent_dim is None:
            return super().row_projections()
        both = 2 * config.kv_heads * config.head_width
        latent = ((self.kv_down, config.latent_dim), (self.kv_up, both))
        return ((self.q_proj, config.num_heads * config.head_width), *latent, (self.o_proj, config.dim))

    def attend_row(self, row: TokenRow) -> Tensor | None:
        """As the base; latents are absorbed: of the past, keys alone are expanded."""
        config = self.config
        if config.latent_dim is None:
            return super().attend_row(row)
        held = row.position + 1
        places = row.cache.row_buffer("position")[:, 0, : row.position, 0]
        known = self.runs_own("expand", LowRankGQAAttention) and self.kv_up.bias is None
        # Keys are rotated by their slots: positions that were given to earlier calls may be others.
        if not known or not torch.equal(places, torch.arange(row.position, device=places.device).expand_as(places)):
            return None
        batch = row.x.shape[0]
        q = self.product("q_proj", row.x).view(batch, config.num_heads, 1, config.head_width)
        position = places.new_full((batch, 1, 1, 1), row.position)
        seen = row.cache.write_row({"latent": self.product("kv_down", row.x).unsqueeze(1), "position": position})
        heads = LatentHeads(config.kv_heads, config.head_width, config.rotary, self.row_scale)
        return attend_absorbed(q, seen["latent"][:, 0, :held], self.kv_up.weight, heads, self.row_slots(held, q.device))

    def may_compile_row(self, x: Tensor, cache: KVCache) -> bool:
        """As every layer; a latent where keys and values are products of it with a weight, and no more."""
        if self.config.latent_dim is None or not super().may_compile_row(x, cache):
            return super().may_compile_row(x, cache)
        up = self.kv_up
        known = self.runs_own("expand", LowRankGQAAttention) and type(up) is nn.Linear and is_unwatched(up)
        return known and up.bias is None and self.may_hide_row(cache)

    def compiled_row(self, step: Step, heads: Heads) -> Tensor:
        """As every layer; latents are absorbed."""
        config = self.config
        cache = step.cache
        if config.latent_dim is None or cache is None:
            return super().compiled_row(step, heads)
        position = step.positions.to(torch.int32).expand(step.x.shape[0], -1)[:, None, :, None]  # [B, 1, 1, 1]
        seen = cache.append({"latent": heads.k, "position": position}, step.lengths, differentiable=False)
        tensors = (heads.q, seen["latent"], seen["position"], self.kv_up.weight)
        return self.hidden_row("latent", tensors, seen["latent"].shape[2], self.row_scale)

    def streams(self) -> dict[str, Stream]:
        """The latent, and the position that its key will be rotated by."""
        if self.config.latent_dim is None:
            return super().streams()
        return {"latent": Stream(1, self.config.latent_dim), "position": Stream(1, 1, torch.int32)}


@hidden_from_compilers("latent")
def _attend_latents(row: HiddenRow) -> Tensor:
    """Attention of a row ``[B, H, 1, D]`` to latents ``[B, 1, S, r]`` at positions ``[B, 1, S, 1]``; see ``kv_up``."""
    q, latent, position, up = row.tensors
    config = row.config
    (scale,) = row.numbers
    every = Slots(((0, row.held),))
    places = position[:, 0, :, 0]  # [B, S]
    if torch.equal(places, torch.arange(row.held, device=q.device).expand_as(places)):
        heads = LatentHeads(config.kv_heads, config.head_width, config.rotary, scale)
        return attend_absorbed(q, latent[:, 0], up, heads, every)
    # Positions that were given to earlier calls are no slots: keys are expanded and rotated by them.
    k, v = linear(latent[:, 0], up).unflatten(-1, (-1, config.head_width)).transpose(1, 2).chunk(2, dim=1)
    rotary = config.rotary
    if rotary is not None:
        cos, sin = rotary_tables(rotary, config.head_width, places, torch.promote_types(q.dtype, torch.float32))
        q = apply_rotary(q, cos[:, -1:], sin[:, -1:], rotary.interleaved)
        k = apply_rotary(k, cos, sin, rotary.interleaved)
    return attend_slots(q, k, v, every, scale=scale)
