r"""What each head adds to what a model says, directly: past all heads and MLPs behind it.

The last stream r is the embedding and all that layers have added, and words are scored by it behind the last norm. With
the norm's scale as it was in the run, what a head has added has a share of its own in the score in any direction u,

.. math:: \frac{W_O^h z_h}{rms(r)} \circ g \cdot u.

Source: Elhage et al. 2021, *A Mathematical Framework for Transformer Circuits*; direct logit attribution with a norm's
scale frozen: Wang et al. 2022, *Interpretability in the Wild*, section 3 (arXiv:2211.00593). Departures: norms that
take means off do so for each head's part; where a norm stands behind attention its scale is frozen likewise.

Letters: B batch, R rows that were seen, C model width, L layers, H query heads, D width of a head's output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnzoo.heads.causal.seen import SeenHeads
from attnzoo.heads.decoder import DecoderLayer, decoder_parts, weights_at
from attnzoo.surgery.hosts.families.known import block_of
from attnzoo_kernels.errors import ConfigError, ShapeError


def contributions(model: Any, seen: SeenHeads, direction: Tensor) -> Tensor:
    """What each head adds to the score in a direction, directly.

    Over all heads these sum up to the share of the last stream that is neither the embedding nor added by MLPs nor by
    biases of outputs.

    Args:
        model: A decoder of a known family whose weights are plain.
        seen: What :func:`attnzoo.heads.capture` has seen of it with "z", in all layers, within edits if there are some.
        direction: In what the last norm gives: a word's row of the unembedding, or the difference of two, ``[C]``; or
            one for each row, ``[B, R, C]``.

    Returns:
        ``[L, H, B, R]`` in fp32, or fp64 where the model is, with a graph where what was seen has one.

    Raises:
        ConfigError: If no block is known, or not all layers were seen.
        ShapeError: If the direction is of another width, or of other rows.
        UnsupportedError: If the model is no decoder whose layers add to a stream, or a weight is none.
    """
    parts = decoder_parts(model)
    count = len(parts.layers)
    if "z" not in seen or list(seen["z"]) != list(range(count)) or count not in seen.stream:
        raise ConfigError(f"seen: expected outputs of heads ('z') in all of {count} layers, and a call of the model")
    stream = seen.stream[count]
    wide = torch.promote_types(stream.dtype, torch.float32)
    if direction.dim() not in (1, 3) or direction.shape[-1] != stream.shape[-1]:
        raise ShapeError(f"direction: expected [C] or [B, R, C] of {list(stream.shape)}, got {list(direction.shape)}")
    if direction.dim() == 3 and direction.shape != stream.shape:
        raise ShapeError(f"direction: expected [C] or {list(stream.shape)}, got {list(direction.shape)}")
    # What a direction behind the norm is before it, and the scale that the norm had.
    u = parts.last.read_by(direction.to(stream.device, wide)) * parts.last.scale(stream.to(wide))  # [B, R, C]
    found = []
    for layer, part in enumerate(parts.layers):
        z = seen["z"][layer].to(wide)  # [B, R, H, D]
        found.append(_of_layer(model, part, z, u))
    return torch.stack(found)


def _of_layer(model: Any, layer: DecoderLayer, z: Tensor, u: Tensor) -> Tensor:
    """What a layer's heads add in directions ``u [B, R, C]`` of the stream, ``[H, B, R]``."""
    weight = weights_at(model, layer.block).o  # [C, H * D]
    u = u * layer.factor
    if layer.output is not None:
        # What attention gives is normalised with the scale that it had.
        out = block_of(model.get_submodule(layer.block)).output(z.flatten(-2).to(weight.dtype))
        u = layer.output.read_by(u) * layer.output.scale(out.to(u.dtype))
    read = (u @ weight.to(device=u.device, dtype=u.dtype)).unflatten(-1, z.shape[-2:])  # [B, R, H, D]
    found: Tensor = (read * z).sum(-1).movedim(-1, 0)
    return found
