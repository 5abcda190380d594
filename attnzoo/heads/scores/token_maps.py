r"""What heads make of single tokens, by their weights alone: the token itself, or the one that follows in a class.

A token's effective embedding is what the first layer makes of it without attention, :math:`x = e + MLP_0(norm(e))`. A
head that attends to it adds :math:`W_O^h W_V^{\lfloor h / g \rfloor} norm(x)` to the stream, which scores words by
:math:`W_U (g \circ \cdot)`: g is the last norm's weight, whose scale moves no argmax. A head *copies* a token whose own
score is the largest of its class, and a *successor head* scores the next one highest.

Source: copying: Wang et al. 2022, *Interpretability in the Wild*, section 3.1 (arXiv:2211.00593); successors: Gould et
al. 2023, *Successor Heads*, section 2 (arXiv:2312.09230). Departures: the largest score of its class, not one of the
five largest; the largest among a class's words, and no word after the last one; biases of values and outputs are left
out, which are the same for all tokens; every token stands at the first position where positions are learned.

Letters: N tokens, V words, C model width, L layers, H query heads, G KV heads, D width of a head's values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.base.config import check_int
from attnzoo.heads.decoder import DecoderParts, decoder_parts, weights_at
from attnzoo.heads.scores.head_scores import HeadScores
from attnzoo.heads.scores.repeated import repeated_tokens
from attnzoo.heads.scores.scoring import Progress
from attnzoo.surgery.hosts.projections import Projections
from attnzoo.surgery.lowrank.calibration import evaluating
from attnzoo_kernels.errors import ConfigError, UnsupportedError

COPYING = "copying"
SUCCESSOR = "successor"


def copying(
    model: Any,
    classes: Mapping[str, Sequence[int]] | None = None,
    *,
    count: int = 256,
    seed: int = 0,
    progress: Progress | None = None,
) -> HeadScores:
    """The share of tokens that each head's weights copy, ``[L, H]``.

    Args:
        model: A decoder of a known family whose weights are plain. It is left as it was.
        classes: Tokens by the name of their class, as for :func:`successor`; by default ``count`` random ones that are
            one class.
        count: How many, at least 2.
        seed: Of these; global random numbers are untouched.
        progress: Told of each layer.

    Raises:
        ConfigError: If an argument does not fit, or no block is known.
        UnsupportedError: If the model is no decoder whose layers add to a stream, or a weight is none.
    """
    if classes is None:
        check_int("count", count, 2)
        ids = repeated_tokens(model, length=count, repeats=1, batch=1, seed=seed)[0]
        classes = {"random tokens": ids.unique().tolist()}
        about: dict[str, Any] = {"method": COPYING, "tokens": len(classes["random tokens"]), "seed": seed}
    else:
        about = {"method": COPYING, "classes": {name: len(tokens) for name, tokens in classes.items()}}
    return _scored(model, classes, COPYING, about, progress)


def successor(model: Any, classes: Mapping[str, Sequence[int]], *, progress: Progress | None = None) -> HeadScores:
    """The share of tokens whose successor each head's weights score highest in their class, ``[L, H]``.

    Args:
        model: A decoder of a known family whose weights are plain. It is left as it was.
        classes: Tokens in their order, by the name of their class: weekdays, months, numbers. The last one of a class
            is no question.
        progress: Told of each layer.

    Raises:
        ConfigError: If an argument does not fit, or no block is known.
        UnsupportedError: If the model is no decoder whose layers add to a stream, or a weight is none.
    """
    about = {"method": SUCCESSOR, "classes": {name: len(tokens) for name, tokens in classes.items()}}
    return _scored(model, classes, SUCCESSOR, about, progress)


def _scored(
    model: Any,
    classes: Mapping[str, Sequence[int]],
    kind: str,
    about: dict[str, Any],
    progress: Progress | None,
) -> HeadScores:
    parts = decoder_parts(model)
    rows, starts = _checked(classes, parts.words.shape[0])
    weights = [weights_at(model, layer.block) for layer in parts.layers]
    first = weights[0]
    for layer, own in zip(parts.layers, weights, strict=True):
        if (own.num_heads, own.num_kv_heads) != (first.num_heads, first.num_kv_heads):
            raise UnsupportedError(
                f"model: {layer.block}: expected {first.num_heads} query and {first.num_kv_heads} KV heads as in "
                f"{parts.layers[0].block}, got {own.num_heads} and {own.num_kv_heads}"
            )
    step = 0 if kind == COPYING else 1
    found = []
    with torch.no_grad(), evaluating(model):
        ids = rows.to(parts.words.device)
        reads = _read_by_blocks(model, parts, ids)
        words = parts.last.read_by(parts.words[ids].to(parts.last.gain.dtype))  # [N, C]
        for number, own in enumerate(weights):
            scored = _Layer(parts, number, own, reads[number]).words_of_heads(words)  # [H, N, N]
            found.append(_share(scored, starts, step))
            if progress is not None:
                progress("heads", number + 1, len(weights))
    asked = sum(end - start - step for start, end in starts)
    return HeadScores({kind: torch.stack(found).cpu()}, first.num_kv_heads, {**about, "asked": asked})


@dataclass(frozen=True, eq=False)
class _Layer:
    """What the heads of a layer make of tokens.

    Attributes:
        parts: Of the decoder.
        number: Of the layer.
        weights: Of its block.
        reads: What the block is called with for each token, ``[N, C]``.
    """

    parts: DecoderParts
    number: int
    weights: Projections
    reads: Tensor

    def words_of_heads(self, words: Tensor) -> Tensor:
        """Each head's scores of words for each token, ``[H, N, N]``.

        Args:
            words: The unembedding of the same tokens behind the last norm, ``[N, C]``.
        """
        p = self.weights
        layer = self.parts.layers[self.number]
        if layer.output is not None:
            words = layer.output.read_by(words)
        wide = words.dtype
        values = (self.reads.to(wide) @ p.v.to(wide).T).unflatten(-1, (p.num_kv_heads, -1))  # [N, G, D]
        values = values.repeat_interleave(p.num_heads // p.num_kv_heads, 1)  # [N, H, D]
        outputs = (words @ p.o.to(wide)).unflatten(-1, (p.num_heads, -1))  # [N, H, D]
        return torch.einsum("nhd,mhd->hnm", values, outputs)


def _share(scored: Tensor, starts: Sequence[tuple[int, int]], step: int) -> Tensor:
    """The share of tokens for which the word ``step`` behind has the largest score of its class, ``[H]``."""
    hits = torch.zeros(scored.shape[0], dtype=torch.float64, device=scored.device)
    asked = 0
    for start, end in starts:
        best = scored[:, start : end - step, start:end].argmax(-1)  # [H, n - step]
        hits += (best == torch.arange(step, end - start, device=scored.device)).sum(-1)
        asked += end - start - step
    return hits / asked


def _read_by_blocks(model: Any, parts: DecoderParts, ids: Tensor) -> list[Tensor]:
    """What each attention block is called with where its layer is given effective embeddings, ``[N, C]`` each."""
    layers = [model.get_submodule(layer.path) for layer in parts.layers]
    blocks = [model.get_submodule(layer.block) for layer in parts.layers]
    effective: list[Tensor] = []
    read: list[Tensor] = []

    def nothing(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (torch.zeros_like(output[0]), *output[1:])
        return torch.zeros_like(output)

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        effective.append(output[0] if isinstance(output, tuple) else output)

    def give(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if args:
            return (effective[0], *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": effective[0]}

    def see(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        read.append((args[0] if args else kwargs["hidden_states"])[:, 0])

    with ExitStack() as restored:
        restored.callback(blocks[0].register_forward_hook(nothing).remove)
        restored.callback(layers[0].register_forward_hook(keep).remove)
        model.base_model(ids[:, None], use_cache=False)
    with ExitStack() as restored:
        for layer, block in zip(layers, blocks, strict=True):
            restored.callback(layer.register_forward_pre_hook(give, with_kwargs=True).remove)
            restored.callback(block.register_forward_pre_hook(see, with_kwargs=True).remove)
        model.base_model(ids[:, None], use_cache=False)
    if len(read) != len(blocks):
        raise UnsupportedError(f"model: expected one call of each of {len(blocks)} blocks, got {len(read)} calls")
    return read


def _checked(classes: Mapping[str, Sequence[int]], vocabulary: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """All classes' tokens, int64 ``[N]``, and where each class begins and ends among them.

    Raises:
        ConfigError: If there is no class, or one has fewer than two tokens, others, or one twice.
    """
    if not isinstance(classes, Mapping) or not classes:
        raise ConfigError(f"classes: expected tokens by the name of their class, got {classes!r}")
    ids: list[int] = []
    starts = []
    for name, tokens in classes.items():
        given = [int(token) for token in tokens]
        if len(given) < 2 or len(set(given)) < len(given):
            raise ConfigError(f"classes: expected at least two tokens of {name!r}, each once, got {given}")
        if not 0 <= min(given) <= max(given) < vocabulary:
            raise ConfigError(f"classes: expected tokens of {name!r} below {vocabulary}, got {given}")
        starts.append((len(ids), len(ids) + len(given)))
        ids += given
    return torch.tensor(ids, dtype=torch.int64, device="cpu"), starts
