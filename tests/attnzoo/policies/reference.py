"""Plain hosts without a cache, whose attention is the oracle's: every token's heads live through all calls in loops.

Letters: B items, S slots, H query heads, G KV heads, D head width, n tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from attnzoo.cache.policies.known import Compose, Policy
from attnzoo.oracles.policies import Call, Head
from tests.attnzoo.policies.masked import GROUPS, HEADS, LAYERS, blocks_of, host
from tests.attnzoo.policies.settings import Setting

NAME = "oracle"
PLACE = "oracle_of_test"
WIDTH = 6
SHARED = HEADS // GROUPS

Sequence = tuple[int, ...]
"""Tokens of one item, -1 at padding."""


def small_host(name: str) -> Any:
    """A host of the widths that the settings of policies are for.

    A token that comes twice would score twice the same in the first layer, and rounding would choose between its rows:
    what is embedded depends on positions here.
    """
    model = host(name, head_dim=WIDTH, hidden_size=HEADS * WIDTH)
    model.model.layers[0].register_forward_pre_hook(_add_positions, with_kwargs=True)
    return model


def _add_positions(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    angles = torch.cat(kwargs["position_embeddings"], -1)
    return (args[0] + angles.repeat(1, 1, args[0].shape[-1] // angles.shape[-1]), *args[1:]), kwargs


def of_all_layers(policy: Policy, layers: int = LAYERS) -> Policy:
    """The policy of a model each of whose layers has the policy of one layer."""
    if isinstance(policy, Compose):
        return Compose(**{name: of_all_layers(part, layers) for name, part in policy.parts().items()})
    told: dict[str, Any] = {}
    for setting in fields(policy):
        value = getattr(policy, setting.name)
        if setting.init and isinstance(value, Tensor):
            told[setting.name] = value.expand(layers, *value.shape[1:])
        elif setting.init and isinstance(value, tuple):
            told[setting.name] = value * layers
    return replace(policy, **told)


@dataclass(eq=False)
class Lives:
    """What the heads of a host remember of every sequence that was asked for.

    Attributes:
        setting: What each KV head does.
        model: The host.
        calls: Slots of the first calls; every later one brings one.
        known: By layer and sequence, the heads behind it and the outputs ``[H, n, D]`` of its tokens.
    """

    setting: Setting
    model: Any
    calls: list[int]
    known: dict[tuple[int, Sequence], tuple[list[Head], Tensor]] = field(default_factory=dict)
    sequences: list[Sequence] = field(default_factory=list)
    plain: dict[str, Tensor] = field(default_factory=dict)

    def ends(self, slots: int) -> list[int]:
        """Where the calls of so many slots end."""
        ends = [0]
        for width in self.calls:
            ends.append(ends[-1] + width)
        ends += range(ends[-1] + 1, slots + 1)
        return [end for end in ends if end <= slots]

    def rows_of(self, layer: int, sequence: Sequence) -> list[list[tuple[int, float]]]:
        """Positions and masses of the rows that KV heads hold behind a sequence, in order; the folded one as -1."""
        heads, _ = self.known[layer, sequence]
        return [sorted((-1 if row.folded else row.position, row.mass) for row in head.held) for head in heads]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attention of whole sequences, q ``[B, H, S, D]`` and k, v ``[B, G, S, D]``, ``[B, H, S, D]``."""
        out = torch.zeros_like(q)
        for item, sequence in enumerate(self.sequences):
            real = [s for s, token in enumerate(sequence) if token >= 0]
            plain = [self.plain[f"{layer}.{name}"][item, real] for name in "qk"]
            given = self.setting.given(*plain, v[item, :, real].transpose(0, 1))
            own = (q[item, :, real], k[item, :, real], v[item, :, real])
            out[item, :, real] = self.one(layer, sequence, own, scale=scale, given=given)
        return out

    def one(
        self, layer: int, sequence: Sequence, own: tuple[Tensor, ...], *, scale: float, given: Tensor | None
    ) -> Tensor:
        """One sequence: what is known of it, and the calls that are not known yet."""
        q, k, v = own
        ends = self.ends(len(sequence))
        last = max(n for n, end in enumerate(ends) if not end or (layer, sequence[:end]) in self.known)
        known = self.known.get((layer, sequence[: ends[last]]))
        heads = [Head(policy, scale) for policy in self.setting.heads] if known is None else known[0]
        out = q[:, :0] if known is None else known[1]
        for before, end in zip(ends[last:], ends[last + 1 :], strict=False):
            call = Call(sum(token >= 0 for token in sequence[before:end]), end - before)
            rows = slice(heads[0].tokens, heads[0].tokens + call.tokens)
            # Other sequences may go on from what is known.
            heads = [head.copy() for head in heads]
            parts = [out]
            each = []
            for g, head in enumerate(heads):
                queries = q[g * SHARED : (g + 1) * SHARED, rows]
                each.append(head.live(queries, k[g, rows], v[g, rows], call, None if given is None else given[g, rows]))
            parts.append(torch.cat(each))
            out = torch.cat(parts, 1)
            self.known[layer, sequence[:end]] = (heads, out)
        return out


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **more: Any
) -> tuple[Tensor, None]:
    lives: Lives = module.__dict__[PLACE]
    return lives.attend(module.layer_idx, query, key, value, scaling).transpose(1, 2).contiguous(), None


def _no_mask(*args: Any, **more: Any) -> None:
    return None


@contextmanager
def remembering(model: Any, setting: Setting, calls: list[int]) -> Iterator[Lives]:
    """Lets a plain host, called without a cache, read what the oracle says that its heads hold.

    Args:
        model: The host.
        setting: What each KV head does.
        calls: Slots of the first calls; every later one brings one.
    """
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _no_mask)
    lives = Lives(setting, model, calls)
    before = model.config._attn_implementation

    def note_sequences(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        tokens = kwargs.get("input_ids", args[0] if args else None)
        mask = kwargs.get("attention_mask")
        real = torch.ones_like(tokens) if mask is None else mask
        lives.sequences = [tuple(row) for row in torch.where(real.bool(), tokens, -1).tolist()]

    def note_plain(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, out: Tensor) -> None:
            lives.plain[name] = out.detach().unflatten(-1, (-1, WIDTH)) if out.dim() == 3 else out.detach()

        return hook

    hooks = [model.register_forward_pre_hook(note_sequences, with_kwargs=True)]
    for layer, block in enumerate(blocks_of(model)):
        block.__dict__[PLACE] = lives
        for name in "qk":
            # What is rotated: behind the norm where there is one.
            last = getattr(block, f"{name}_norm", None) or getattr(block, f"{name}_proj")
            hooks.append(last.register_forward_hook(note_plain(f"{layer}.{name}")))
    model.set_attn_implementation(NAME)
    try:
        yield lives
    finally:
        model.set_attn_implementation(before)
        for hook in hooks:
            hook.remove()
        for block in blocks_of(model):
            del block.__dict__[PLACE]
