"""Grouped-query attention in the place of an encoder's, whose classes have one key head for each query head.

Where the output's projection stands outside the block, heads that were merged are taken apart inside it: each query
head's output is turned by a matrix of its own, and heads come out in the order that the host expects.

Letters: B batch, T tokens, C model width, H query heads, G KV heads, D head width.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.surgery.hosts import attention_function
from attnzoo.surgery.hosts.attending import attend_as_host
from attnzoo.surgery.hosts.block import ROLES, AttentionBlock, Need, ReplacementModule, no_rotation
from attnzoo.surgery.hosts.calls import named_arguments, read_call
from attnzoo.surgery.hosts.projections import Projections, new_linear


def reasons_of_pattern(module: nn.Module) -> Mapping[Need, tuple[str, ...]]:
    """Why a block cannot be converted: what it follows already."""
    pattern = attention_function.pattern_of(module)
    if pattern is None:
        return dict.fromkeys(Need, ())
    replaced = ("it follows a read pattern, which a replacement would not; undo that conversion first",)
    return {Need.READING: (), Need.WEIGHTS: replaced, Need.REPLACING: replaced}


class HeadOutput(nn.Module):
    """Outputs of heads, each turned by its own matrix and put where the host expects it: ``[B, T, H * D]``.

    Attributes:
        weight: ``[H, D, D]``; a head's output ``[D]`` is multiplied from the left.
        place: Of each of the host's heads, which head here it comes from, int64 ``[H]``.
    """

    place: Tensor

    def __init__(self, matrix: Tensor, heads: int, like: Tensor) -> None:
        super().__init__()
        blocks = (
            matrix.detach().T.unflatten(1, (heads, -1)).unflatten(0, (heads, -1))
        )  # [H, D, H, D], from here to there
        # On no device weights say which head each is: the order that it is made in.
        strongest = blocks.square().sum((1, 3)).argmax(1)
        order = torch.arange(heads, device="cpu") if blocks.is_meta else strongest
        mine = torch.stack([blocks[head, :, there] for head, there in enumerate(order.tolist())])
        self.weight = nn.Parameter(mine.to(like).contiguous(), requires_grad=like.requires_grad)
        self.register_buffer("place", order.argsort().to(like.device))

    def forward(self, y: Tensor) -> Tensor:
        """``[B, T, H * D]`` to as much."""
        heads = torch.einsum("bthd,hde->bthe", y.unflatten(-1, (self.weight.shape[0], -1)), self.weight)
        return heads.index_select(2, self.place).flatten(2)

    def matrix(self) -> Tensor:
        """The same as the weight of one product, ``[H * D, H * D]``."""
        heads, width, _ = self.weight.shape
        whole = self.weight.new_zeros(heads, width, heads, width)
        order = self.place.argsort().tolist() if not self.place.is_meta else range(heads)
        for head, there in enumerate(order):
            whole[head, :, there] = self.weight[head]
        return whole.view(heads * width, heads * width).T


class GroupedEncoderAttention(ReplacementModule):
    """An encoder's block with G key and value heads, which attends by whatever implementation the host is set to.

    Attributes:
        scaling: The factor on scores.
        num_key_value_groups: H / G, which implementations of attention ask for.
        arguments: What the host's own block calls its arguments, in their order.
        drops: The share of attention weights that is dropped in training.
        finish: What follows inside the block.
        reply: What the host unpacks.
    """

    needs_interface = False

    def __init__(self, host: nn.Module, old: AttentionBlock, family: str, projections: Projections) -> None:
        super().__init__(host, family)
        p = projections
        self.head_dim = p.head_dim
        self.num_key_value_groups = p.num_heads // p.num_kv_heads
        self.scaling = old.asked_scale
        self.drops = old.dropout
        self.finish = old.finish
        self.reply = old.reply
        # Hosts outside transformers do not say it.
        self.is_causal = False
        known: Any = getattr(host, "arguments", None) or tuple(inspect.signature(type(host).forward).parameters)[1:]
        self.arguments: tuple[str, ...] = known
        theirs = {id(module) for module in old.projections.values()}
        for name, child in host.named_children():
            if id(child) not in theirs:
                self.add_module(name, child)
        parts = {"q": p.q_bias, "k": p.k_bias, "v": p.v_bias, "o": p.o_bias}
        for name, bias in parts.items():
            role = f"{name}_proj"
            weight: Tensor = getattr(p, name)
            like = old.projections["q_proj"]
            if role == "o_proj" and not isinstance(old.projections.get(role), nn.Linear):
                self.add_module(role, HeadOutput(weight, p.num_heads, like.weight))
                continue
            self.add_module(role, new_linear(weight, bias, like=like))
        attention_function.take_over(self, host, p.num_kv_heads)

    def block(self) -> AttentionBlock:
        """What a family says about its blocks, of this module."""
        q, k, v, o = (self.get_submodule(role) for role in ROLES)
        kv_heads = int(k.out_features) // self.head_dim  # type: ignore[arg-type]
        return AttentionBlock(
            heads=kv_heads * self.num_key_value_groups,
            kv_heads=kv_heads,
            head_dim=self.head_dim,
            value_dim=self.head_dim,
            width=int(q.in_features),  # type: ignore[arg-type]
            cached_values=int,
            project=self._project,
            output=o,
            projections={"q_proj": q, "k_proj": k, "v_proj": v} | ({"o_proj": o} if isinstance(o, nn.Linear) else {}),
            weights=self._weights,
            rotary=no_rotation,
            rope_type=None,
            scale=self.scaling,
            causal=False,
            window=None,
            reply=self.reply,
            reasons=reasons_of_pattern(self),
            planes=None,
            dropout=self.drops,
            finish=self.finish,
        )

    def forward(self, *given: Any, **named: Any) -> Any:
        """As the host calls it: ``[B, T, C]`` to ``[B, T, C]`` and what its attention says of weights.

        Raises:
            UnsupportedError: If an argument cannot be honoured.
        """
        arguments = named_arguments(self.arguments, given, named)
        hidden_states: Tensor = arguments.pop(self.arguments[0])
        mask = arguments.pop("attention_mask", None)
        read_call(arguments, causal=False)
        q, k, v = self._project(hidden_states)
        share = self.drops if self.training else 0.0
        out, weights = self._attend()(self, q, k, v, mask, dropout=share, scaling=self.scaling)
        y = self.get_submodule("o_proj")(out.flatten(2))
        y = y if self.finish is None else self.finish(self, hidden_states, y)
        return y if self.reply == "tensor" else (y, weights)

    def _attend(self) -> Any:
        """What attends: the implementation that the host is set to, or attnzoo's where it knows of none."""
        if not hasattr(self.config, "_attn_implementation"):
            return attention_function.attend
        return attend_as_host(self.config)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = (self.get_submodule(role)(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for role in ROLES[:3])
        q, k, v = parts
        return q, k, v

    def _weights(self) -> Projections:
        parts: list[Any] = [self.get_submodule(role) for role in ROLES]
        q, k, v, known = parts
        weights: dict[str, Any] = {}
        for name, linear in (("q", q), ("k", k), ("v", v)):
            weights |= {name: linear.weight, f"{name}_bias": linear.bias}
        whole = isinstance(known, nn.Linear)
        return Projections(
            **weights,
            o=known.weight if whole else known.matrix(),
            o_bias=known.bias if whole else None,
            num_heads=q.out_features // self.head_dim,
            num_kv_heads=k.out_features // self.head_dim,
            head_dim=self.head_dim,
            rotary=None,
            scale=self.scaling,
        )
