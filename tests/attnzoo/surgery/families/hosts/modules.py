"""Tiny models of anybody's: torch's own attention, timm's, and layers of the zoo, in models that are no transformers'.

Letters: B batch, T tokens, C width, V classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import attnzoo
from attnzoo import surgery
from tests.attnzoo.surgery.families.hosts.exact import randomise
from tests.attnzoo.surgery.families.hosts.host import HEADS, KV_HEADS, VOCAB, WEIGHTS, WIDTH, Hosts

HOSTS = Hosts()
C = HEADS * WIDTH


class Toy(nn.Module):
    """Somebody's model: an embedding, attention with residuals, and a head."""

    def __init__(self, layers: Iterable[nn.Module], attend: Callable[[Any, Tensor, Tensor | None], Tensor]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, C)
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(C, VOCAB)
        self.attend = attend

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """``[B, T]`` to ``[B, T, V]``."""
        x = self.embed(input_ids)
        hidden = None if attention_mask is None else ~attention_mask.bool()
        for layer in self.layers:
            x = x + self.attend(layer, x, hidden)
        y: Tensor = self.head(x)
        return y


class TorchDecoder(nn.Module):
    """A decoder of torch's layers, which read a few tokens that are learned beside their own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, C)
        self.memory = nn.Parameter(torch.zeros(1, 3, C))
        layer = nn.TransformerDecoderLayer(C, HEADS, 24, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerDecoder(layer, 2)
        self.head = nn.Linear(C, VOCAB)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """``[B, T]`` to ``[B, T, V]``."""
        x = self.embed(input_ids)
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        hidden = None if attention_mask is None else ~attention_mask.bool()
        memory = self.memory.expand(len(x), -1, -1)
        x = self.layers(x, memory, tgt_mask=later, tgt_is_causal=True, tgt_key_padding_mask=hidden)
        y: Tensor = self.head(x)
        return y


class TimmAttention(nn.Module):
    """What timm's attention looks like from outside."""

    def __init__(self, norms: bool, bias: bool, heads: int = 3) -> None:
        super().__init__()
        width = 8 * heads
        self.num_heads, self.head_dim, self.scale, self.fused_attn = heads, 8, 8**-0.5, True
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.q_norm = nn.LayerNorm(8) if norms else nn.Identity()
        self.k_norm = nn.LayerNorm(8) if norms else nn.Identity()
        self.attn_drop = nn.Dropout(0.0)
        self.norm = nn.LayerNorm(width) if norms else nn.Identity()
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """``[B, T, C]`` to as much."""
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, 8).permute(2, 0, 3, 1, 4)
        out = scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, attn_mask=attn_mask)
        y: Tensor = self.proj_drop(self.proj(self.norm(out.transpose(1, 2).reshape(batch, tokens, width))))
        return y


def _padded(layer: Any, x: Tensor, hidden: Tensor | None) -> Tensor:
    y: Tensor = layer(x, None, hidden)
    return y


def _unpadded(layer: Any, x: Tensor, hidden: Tensor | None) -> Tensor:
    y: Tensor = layer(x)
    return y


def _as_torchs(layer: Any, x: Tensor, hidden: Tensor | None) -> Tensor:
    y: Tensor = layer(x, x, x, key_padding_mask=hidden, need_weights=False)[0]
    return y


def _as_torchs_layer(layer: Any, x: Tensor, hidden: Tensor | None) -> Tensor:
    y: Tensor = layer(x, src_key_padding_mask=hidden)
    return y


def made(model: nn.Module) -> Any:
    """A model with weights at which mistakes show, in fp64."""
    return randomise(model).double().eval()


def toy(variant: str = "mha", **options: Any) -> Any:
    """Two layers of the zoo, that rotate."""
    sizes: dict[str, Any] = {"dim": C, "num_heads": HEADS, "num_kv_heads": KV_HEADS, "bias": True}
    layers = [attnzoo.create(variant, **{**sizes, "rotary": attnzoo.RotaryConfig(), **options}) for _ in range(2)]
    return made(Toy(layers, _padded))


NO_CACHE = "it is not causal, so that it has no cache, which a policy needs to rule its memory"
CHOOSES = "chooses from the past of each token, which needs a causal block"
AHEAD = {"policy": NO_CACHE, "longheads": CHOOSES, "landmark": CHOOSES}
"""What blocks that read ahead cannot be."""

TORCHS: dict[str, str] = {
    "policy": "torch's module has no cache, which a policy needs",
    "landmark": "it inserts tokens at the input of a model, and needs a decoder of transformers",
    **dict.fromkeys(WEIGHTS, "fewer, or a latent, needs a layer of attnzoo's own in its place"),
}
CAUSAL_ALONE = {"longheads": "is_causal: expected True, or the causal mask, with 'longheads'"}
ANYBODYS: dict[str, Any] = {"generates": False, "of_transformers": False}


@HOSTS.add("nn.MultiheadAttention", "MultiheadAttention", TORCHS, at_call=CAUSAL_ALONE, projects=False, **ANYBODYS)
def torch_alone() -> Any:
    return made(Toy((nn.MultiheadAttention(C, HEADS, batch_first=True) for _ in range(2)), _as_torchs))


@HOSTS.add("nn.TransformerEncoder", "MultiheadAttention", TORCHS, at_call=CAUSAL_ALONE, projects=False, **ANYBODYS)
def torch_encoder() -> Any:
    layers = [nn.TransformerEncoderLayer(C, HEADS, 24, dropout=0.0, batch_first=True) for _ in range(2)]
    return made(Toy(layers, _as_torchs_layer))


def _reads_its_own_tokens(site: surgery.Site) -> bool:
    return "multihead_attn" not in site.path


@HOSTS.add(
    "nn.TransformerDecoder, its own tokens",
    "MultiheadAttention",
    TORCHS,
    # Convolutions have other weights where blocks are causal, which calls of these modules are one by one.
    options={"rcmha": {"causal": True}},
    # Torch gives NaN where a row has nothing to read.
    sides=("right",),
    projects=False,
    where=_reads_its_own_tokens,
    **ANYBODYS,
)
def torch_decoder() -> Any:
    return made(TorchDecoder())


@HOSTS.add("timm's attention", "TimmAttention", AHEAD, sides=(), **ANYBODYS)
def timm() -> Any:
    return made(Toy((TimmAttention(norms=False, bias=True, heads=HEADS) for _ in range(2)), _unpadded))


@HOSTS.add(
    "timm's attention with norms",
    "TimmAttention",
    {
        **AHEAD,
        **dict.fromkeys(WEIGHTS, "it has a q_norm, which needs merged heads with a norm of their own"),
    },
    sides=(),
    **ANYBODYS,
)
def timm_with_norms() -> Any:
    return made(Toy((TimmAttention(norms=True, bias=False, heads=HEADS) for _ in range(2)), _unpadded))


@HOSTS.add("attnzoo's layers", "MHAAttention", anew=("landmark",), **ANYBODYS)
def own_layers() -> Any:
    return toy()


@HOSTS.add("attnzoo's layers, not causal", "MHAAttention", AHEAD, **ANYBODYS)
def own_layers_that_read_ahead() -> Any:
    return toy(causal=False)
