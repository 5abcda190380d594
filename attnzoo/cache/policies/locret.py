r"""Locret: a row is kept by a score that a small trained head gives it when it comes.

With :math:`q_t, k_t, v_t` a token's queries, keys and values of all heads before rotation, the scores of its rows, one
for each KV head, are

.. math:: s_t = W_2\, \mathrm{SiLU}(W_1 [q_t; k_t; v_t]) .

A score depends on its token alone, so that it never has to be computed again. How the heads are trained:
:mod:`attnzoo.heads.training.locret`.

Source: Huang et al. 2024, *Locret: Enhancing Eviction in Long-Context LLM Inference with Trained Retaining Heads*,
section 3 and algorithm 1 (arXiv:2410.01805); code: huangyuxiang03/Locret.

Departures:
    - The paper evicts behind each chunk of the prompt, and keeps the last ``stabilizers`` of a chunk meanwhile. Here
      rows are chosen behind the prompt, where none are needed; they are for those who call ``compact()`` between
      chunks.
    - Rows keep their positions; the published code renumbers what is in the cache.
    - A model that normalises queries and keys shows normalised ones to its retaining heads.

Letters: B batch, H query heads, G KV heads, T tokens, D key width, Dv value width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from attnzoo.cache.policies.budget import Budgeted
from attnzoo.cache.policies.protocol import Seen
from attnzoo_kernels.errors import ConfigError, ShapeError

NAMES = ("first", "second")


class RetainingHead(nn.Module):
    """Scores of one layer's rows, from what its tokens are before rotation.

    Args:
        width: Numbers that come in for a token: H D + G D + G Dv.
        kv_heads: G.
        hidden: Width between the two products.
    """

    def __init__(self, width: int, kv_heads: int, hidden: int = 1024) -> None:
        super().__init__()
        self.first = nn.Linear(width, hidden, bias=False)
        self.second = nn.Linear(hidden, kv_heads, bias=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The scores ``[B, G, T]``, in the dtype of the weights.

        Args:
            q: Queries ``[B, H, T, D]``, before rotation like the keys.
            k: Keys ``[B, G, T, D]``.
            v: Values ``[B, G, T, Dv]``.

        Raises:
            ShapeError: If that is another width than the weights are for.
        """
        weight = self.first.weight
        token = torch.cat([x.transpose(1, 2).flatten(2) for x in (q, k, v)], -1).to(weight.dtype)
        if token.shape[-1] != weight.shape[1]:
            raise ShapeError(f"q, k, v: expected {weight.shape[1]} numbers for a token, got {token.shape[-1]}")
        scores: Tensor = self.second(silu(self.first(token))).transpose(1, 2)
        return scores

    @classmethod
    def of_weights(cls, first: Tensor, second: Tensor) -> Self:
        """A head with given weights, W1 ``[hidden, width]`` and W2 ``[G, hidden]``.

        Raises:
            ConfigError: If they do not fit each other.
        """
        if first.dim() != 2 or second.dim() != 2 or first.shape[0] != second.shape[1]:
            got = f"{list(first.shape)} and {list(second.shape)}"
            raise ConfigError(f"retaining: expected weights [hidden, width] and [G, hidden], got {got}")
        with torch.device("meta"):
            made = cls(first.shape[1], second.shape[0], first.shape[0])
        made.first.weight = nn.Parameter(first.detach())
        made.second.weight = nn.Parameter(second.detach())
        return made


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Locret(Budgeted, name="locret"):
    """Keeps the rows to which trained heads give the best scores, and the last ones.

    Attributes:
        retaining: A head for each layer.
        stabilizers: Last tokens that are kept where rows are chosen in the middle of a prompt.
        local: Last tokens that are kept in any case; their scores are not asked.

    Raises:
        ConfigError: If there are no heads, or a setting is out of its range.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"score"})

    retaining: Sequence[RetainingHead] = field(kw_only=False)
    sink: int = 0
    window: int = 0
    stabilizers: int = 0
    local: int = 100

    def __post_init__(self) -> None:
        for name in ("stabilizers", "local"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigError(f"{name}: expected a whole number, 0 or more, got {value!r}")
        super().__post_init__()
        heads = tuple(self.retaining)
        if not heads or not all(isinstance(head, RetainingHead) for head in heads):
            raise ConfigError("retaining: expected a RetainingHead for each layer, got none or something else")
        object.__setattr__(self, "retaining", heads)

    def of_layer(self, layer: int) -> Locret:
        """The policy of one layer."""
        if not 0 <= layer < len(self.retaining):
            raise ConfigError(f"retaining: expected a head for layer {layer}, got {len(self.retaining)} heads")
        return replace(self, retaining=(self.retaining[layer],))

    def check(self, layers: int, kv_heads: int) -> None:
        """Raises unless there is a retaining head for every layer, with a score for every KV head."""
        found = [head.second.out_features for head in self.retaining]
        if found != [kv_heads] * layers:
            expected = f"{layers} heads with {kv_heads} scores each"
            raise ConfigError(f"retaining: expected {expected}, got {len(found)} with {sorted(set(found))}")

    def recent(self, rows: int) -> int:
        """The last tokens that are kept: what is largest of the settings that say so."""
        return max(self.window, self.local, self.stabilizers)

    def scores_of(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What the layer's retaining head says ``[B, G, T]``.

        Raises:
            ConfigError: If this is the policy of several layers.
            ShapeError: If the head is for another layer's widths.
        """
        if len(self.retaining) != 1:
            raise ConfigError(f"retaining: expected the policy of one layer, got that of {len(self.retaining)}")
        head = self.retaining[0]
        # Weights follow the model to its device once.
        if head.first.weight.device != q.device:
            head.to(q.device)
        with torch.no_grad():
            scores: Tensor = head(q.detach(), k.detach(), v.detach())
        return scores

    def score(self, seen: Seen) -> Tensor:
        """What rows came with."""
        return seen.signals["score"]

    def settings(self) -> dict[str, Any]:
        """The settings, but for the heads."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.init and f.name != "retaining"}
        return {"policy": self.name, **found}

    def weights(self) -> dict[str, Tensor]:
        """The heads' weights, W1 ``<layer>.first`` and W2 ``<layer>.second``."""
        heads = enumerate(self.retaining)
        return {f"{layer}.{name}": getattr(head, name).weight.detach() for layer, head in heads for name in NAMES}

    @classmethod
    def restored(cls, settings: dict[str, Any], weights: Mapping[str, Tensor]) -> Self:
        """The policy with settings as JSON has them, and with the heads' weights.

        Raises:
            ConfigError: If weights are missing, or do not fit each other.
        """
        layers = len(weights) // len(NAMES)
        names = [f"{layer}.{name}" for layer in range(layers) for name in NAMES]
        if not weights or set(names) != set(weights):
            raise ConfigError(f"retaining: expected weights of each layer, such as '0.first', got {sorted(weights)}")
        heads = [RetainingHead.of_weights(*(weights[f"{layer}.{name}"] for name in NAMES)) for layer in range(layers)]
        return cls(heads, **settings)
