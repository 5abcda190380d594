"""What stands round the attention blocks of a decoder: its layers, their norms, and what it says words by.

A layer adds what its attention gives to the stream of hidden states; the last norm and the unembedding make scores of
words of it. Which modules do that is read from a model's modules, and from what they give.

Letters: V words, C model width, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.surgery.hosts.families.known import block_of
from attnzoo.surgery.hosts.projections import Projections
from attnzoo.surgery.hosts.weights import type_name
from attnzoo.surgery.lookalikes import refuse_unknown
from attnzoo.surgery.sites import find, shared_blocks
from attnzoo_kernels.errors import ConversionError, UnsupportedError

INPUT_NORMS = ("input_layernorm", "ln_1", "self_attn_layer_norm")
"""What decoder layers call the norm before attention."""

OUTPUT_NORMS = {
    "Gemma2DecoderLayer": "post_attention_layernorm",
    "Gemma3DecoderLayer": "post_attention_layernorm",
    "Olmo2DecoderLayer": "post_attention_layernorm",
    "Glm4DecoderLayer": "post_self_attn_layernorm",
}
"""The norm of what attention gives, before it is added; by the layer's class."""

PROBE_ERROR = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.005}


@dataclass(frozen=True, eq=False)
class NormWeights:
    r"""A norm as a product: :math:`(x - \bar x) / \sqrt{mean((x - \bar x)^2) + \epsilon} \circ g + b`.

    Attributes:
        gain: g, ``[C]``, in fp32 at least.
        bias: b, ``[C]``, or ``None``.
        eps: What is added to the mean of squares.
        centred: Whether the mean over a row is taken off before; else :math:`\bar x` is 0.
    """

    gain: Tensor
    bias: Tensor | None
    eps: float
    centred: bool

    def less_mean(self, x: Tensor) -> Tensor:
        """Rows ``[..., C]`` less their means, where the norm takes them off."""
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def scale(self, x: Tensor) -> Tensor:
        """What rows ``[..., C]`` are multiplied by, ``[..., 1]``."""
        return (self.less_mean(x).square().mean(-1, keepdim=True) + self.eps).rsqrt()

    def read_by(self, weight: Tensor) -> Tensor:
        """The weight ``[n, C]`` behind the norm as one of what comes before it, its scale aside."""
        # Taking means off a row is the same as taking them off what it is multiplied by.
        return self.less_mean(weight * self.gain)

    @classmethod
    def of(cls, path: str, module: nn.Module, width: int) -> NormWeights:
        """Those of a module, found by its attributes and seen to be right by what it gives.

        Args:
            path: Its name, for errors.
            module: Any that divides by a root mean square or a standard deviation.
            width: C.

        Raises:
            UnsupportedError: If it is something else.
        """
        host: Any = module
        given = (getattr(host, name, None) for name in ("eps", "variance_epsilon"))
        eps = next((x for x in given if x is not None), None)
        weight = getattr(host, "weight", None)
        bias = getattr(host, "bias", None)
        like = weight if isinstance(weight, Tensor) else torch.ones(width, device="cpu")
        probe = torch.linspace(-1, 2, width, dtype=like.dtype, device=like.device)
        if eps is not None:
            with torch.no_grad():
                gave = module(probe[None, None])[0, 0].double()
            wide = torch.promote_types(like.dtype, torch.float32)
            own = like.detach().to(wide)
            for gain in (own, own + 1):
                for centred in (False, True):
                    found = cls(gain, None if bias is None else bias.detach().to(wide), float(eps), centred)
                    if _agree(found.apply(probe.to(wide)).double(), gave, PROBE_ERROR.get(like.dtype, 0.0)):
                        return found
        raise UnsupportedError(
            f"model: {path}: expected a norm by a root mean square or a standard deviation, got {type_name(module)}"
        )

    def apply(self, x: Tensor) -> Tensor:
        """The norm of rows ``[..., C]``."""
        y = self.less_mean(x) * self.scale(x) * self.gain
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True, eq=False)
class DecoderLayer:
    """A layer of a decoder.

    Attributes:
        path: Its name.
        block: The name of its attention block.
        reads: The norm before attention, or ``None``.
        output: The norm of what attention gives, or ``None``.
        factor: What that is multiplied by then.
    """

    path: str
    block: str
    reads: NormWeights | None
    output: NormWeights | None
    factor: float


@dataclass(frozen=True, eq=False)
class DecoderParts:
    """A decoder's layers, and what says words.

    Attributes:
        layers: In order.
        norm: The name of the last norm.
        last: Its weights.
        words: The unembedding ``[V, C]``.
    """

    layers: tuple[DecoderLayer, ...]
    norm: str
    last: NormWeights
    words: Tensor


def decoder_parts(model: Any) -> DecoderParts:
    """The parts of a decoder.

    Raises:
        ConfigError: If no attention block is known.
        UnsupportedError: If it is no decoder whose layers add to a stream, or has no unembedding.
    """
    paths = [site.path for site in find(model)]
    if not paths:
        refuse_unknown(model)
    if shared := shared_blocks(model):
        raise UnsupportedError(f"model: expected a block for each layer, got one for {' and '.join(shared[0])}")
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    words = getattr(head, "weight", None)
    if not isinstance(words, Tensor):
        raise UnsupportedError(f"model: expected a decoder with an unembedding, got {type_name(model)}")
    layers = tuple(_layer(model, path) for path in paths)
    norm = _last_norm(model, layers[0].path)
    width = words.shape[1]
    return DecoderParts(layers, norm, NormWeights.of(norm, model.get_submodule(norm), width), words)


def weights_at(model: Any, block: str) -> Projections:
    """The plain weights of an attention block.

    Raises:
        UnsupportedError: If it has others.
    """
    try:
        return block_of(model.get_submodule(block)).weights()
    except ConversionError as error:
        raise UnsupportedError(f"model: {block}: expected plain weights, but {error}") from error


def last_norm(model: nn.Module, block: str) -> str | None:
    """The name of the norm behind a model's layers, where there is one.

    Args:
        model: The model.
        block: The name of one of its attention blocks.
    """
    try:
        return _last_norm(model, block.rpartition(".")[0])
    except UnsupportedError:
        return None


def _layer(model: nn.Module, block: str) -> DecoderLayer:
    path = block.rpartition(".")[0]
    module: Any = model.get_submodule(path)
    if getattr(module, "do_layer_norm_before", True) is False:
        raise UnsupportedError(f"model: {path}: expected a layer that adds to its input, got one that norms the sum")
    width = int(model.config.hidden_size)  # type: ignore[union-attr, arg-type]
    norms: dict[str, NormWeights] = {}
    after = OUTPUT_NORMS.get(type(module).__name__)
    before = next((name for name in INPUT_NORMS if name in module._modules), None)
    if before is None and after is None:
        raise UnsupportedError(
            f"model: {path}: expected a layer with a norm before attention ({', '.join(INPUT_NORMS)}), got "
            f"{type_name(module)}"
        )
    for name in (before, after):
        if name is not None:
            norms[name] = NormWeights.of(f"{path}.{name}", module.get_submodule(name), width)
    factor = float(getattr(module, "residual_multiplier", 1.0))
    return DecoderLayer(path, block, norms.get(before or ""), norms.get(after or ""), factor)


def _last_norm(model: nn.Module, layer: str) -> str:
    """The name of the norm behind the layers: the only one beside them, or the only one behind.

    Raises:
        UnsupportedError: If there is none, or several.
    """
    container = layer.rpartition(".")[0]
    if not container:
        raise UnsupportedError(f"model: expected layers in a list of the model's, got {layer or 'the model itself'}")
    owner, _, own = container.rpartition(".")
    names = list(model.get_submodule(owner)._modules)
    behind = names[names.index(own) + 1 :]
    for among in (behind, names):
        norms = [name for name in among if "norm" in type(model.get_submodule(owner)._modules[name]).__name__.lower()]
        if len(norms) == 1:
            return f"{owner}.{norms[0]}" if owner else norms[0]
    raise UnsupportedError(f"model: expected one norm behind {container}, got {', '.join(norms) or 'none'}")


def _agree(found: Tensor, gave: Tensor, error: float) -> bool:
    return bool((found - gave).abs().max() <= error * gave.abs().max().clamp_min(1e-30))
