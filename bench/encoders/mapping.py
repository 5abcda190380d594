"""The ALBERT of rxnmapper with fewer key heads, or latents: tokens that it fills in still, and atoms that it maps.

Its eight heads have been trained to fill in tokens of reactions; one of them, in one of twelve applications of the one
layer, says which atom of the product was which. A converted block may have its heads in another order: the head that is
asked is the one whose attention on the calibration reactions is nearest to the original's.

Letters: B batch, T tokens, H query heads, G KV heads, D head width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo import surgery
from attnzoo.surgery.hosts.families.known import block_of
from bench.encoders.reactions import Reaction, to_calibrate, to_test

HEAD = 5
APPLICATION = 10
"""Which head maps, of which application of the layer, as rxnmapper's defaults are."""
EVERY = 4
"""Every how many tokens one is filled in."""

Progress = Callable[[str, int, int], None]

CONVERSIONS: dict[str, dict[str, Any]] = {
    "mean, 8 to 4": {"method": "mean", "num_kv_heads": 4},
    "commuting, 8 to 4": {"method": "commuting", "num_kv_heads": 4},
    "latent of 256": {"method": "latent", "latent_dim": 256},
    "mean, 8 to 2": {"method": "mean", "num_kv_heads": 2},
    "commuting, 8 to 2": {"method": "commuting", "num_kv_heads": 2},
    "latent of 128": {"method": "latent", "latent_dim": 128},
}
"""A latent of 256 values is as many as the keys and values of four heads, one of 128 of two."""


@dataclass(frozen=True)
class MappingRow:
    """How one conversion does.

    Attributes:
        name: Of the conversion.
        values: Keys and values, or values of a latent, that are computed for each token.
        filled: Share of tokens that are filled in right.
        nll: Their negative log-likelihood, in nats.
        same: Share of the product's atoms that are mapped as the original maps them.
        right: Share that are mapped to the atom that they were.
    """

    name: str
    values: int
    filled: float
    nll: float
    same: float
    right: float


class Mapper:
    """A model, its vocabulary, and what the original says.

    Args:
        model: The model; it is converted, and put back, again and again.
        vocabulary: Indices of its words.
        most: Reactions of each kind, at most.
    """

    def __init__(self, model: Any, vocabulary: dict[str, int], most: int | None = None) -> None:
        self.model = model
        self.vocabulary = vocabulary
        self.calibration = to_calibrate()[:: _stride(to_calibrate(), most)]
        self.tests = to_test()[:: _stride(to_test(), most)]
        (self.site,) = surgery.find(model)
        self.shown = [self._attention(reaction)[HEAD] for reaction in self.calibration[:20]]

    def measure(self, progress: Progress) -> list[MappingRow]:
        """The original, and all conversions."""
        original = [self._mapped(reaction, HEAD) for reaction in self.tests]
        rows = [self._row("original", original, HEAD, 2 * self.site.kv_heads * self.site.head_dim)]
        for done, (name, options) in enumerate(CONVERSIONS.items()):
            progress(name, done, len(CONVERSIONS))
            batches = self._batches() if options["method"] != "mean" else None
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                report = surgery.convert(self.model, "lowrank_gqa", calibration=batches, **options)
            values = options.get("latent_dim") or 2 * options["num_kv_heads"] * self.site.head_dim
            rows.append(self._row(name, original, self._nearest_head(), values))
            report.undo()
        progress("reactions", len(CONVERSIONS), len(CONVERSIONS))
        return rows

    def ids(self, reaction: Reaction) -> Tensor:
        """What the model is given, ``[1, T]``."""
        words = ["[CLS]", *reaction.tokens, "[SEP]"]
        unknown = self.vocabulary["[UNK]"]
        return torch.tensor([[self.vocabulary.get(word, unknown) for word in words]])

    def _batches(self) -> list[dict[str, Tensor]]:
        """Calibration reactions, sixteen a batch, padded behind."""
        rows = [self.ids(reaction)[0] for reaction in self.calibration]
        found = []
        for start in range(0, len(rows), 16):
            ids = torch.nn.utils.rnn.pad_sequence(rows[start : start + 16], batch_first=True)
            found.append({"input_ids": ids, "attention_mask": (ids != 0).long()})
        return found

    def _row(self, name: str, original: Sequence[list[int]], head: int, values: int) -> MappingRow:
        mapped = [self._mapped(reaction, head) for reaction in self.tests]
        pairs = [(a, b, reaction) for a, b, reaction in zip(mapped, original, self.tests, strict=True)]
        atoms = sum(len(a) for a, _, _ in pairs)
        same = sum(x == y for a, b, _ in pairs for x, y in zip(a, b, strict=True))
        right = sum(x == y for a, _, reaction in pairs for x, y in zip(a, reaction.source, strict=True))
        filled, nll = self._fill_in()
        return MappingRow(name, values, filled, nll, same / atoms, right / atoms)

    @torch.no_grad()
    def _fill_in(self) -> tuple[float, float]:
        """Tokens left out one at a time: share filled in right, and nats."""
        right = count = 0
        nats = 0.0
        for reaction in self.tests:
            ids = self.ids(reaction)[0]
            places = torch.arange(1, len(ids) - 1, EVERY)
            masked = ids.repeat(len(places), 1)
            masked[torch.arange(len(places)), places] = self.vocabulary["[MASK]"]
            said = self.model(input_ids=masked).logits[torch.arange(len(places)), places].log_softmax(-1)
            right += int((said.argmax(-1) == ids[places]).sum())
            nats -= float(said[torch.arange(len(places)), ids[places]].sum())
            count += len(places)
        return right / count, nats / count

    @torch.no_grad()
    def _attention(self, reaction: Reaction) -> Tensor:
        """Attention weights of all heads in the application that maps, ``[H, T, T]``."""
        seen: list[Tensor] = []
        module = self.model.get_submodule(self.site.path)
        hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            self.model(input_ids=self.ids(reaction))
        finally:
            hook.remove()
        block = block_of(module)
        q, k, _ = block.project(seen[APPLICATION])
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        weights: Tensor = (q @ k.mT * block.scale).softmax(-1)[0]
        return weights

    def _nearest_head(self) -> int:
        """The head whose attention is nearest to the original's that maps."""
        total = torch.zeros(self.site.heads)
        for reaction, shown in zip(self.calibration, self.shown, strict=False):
            total += (self._attention(reaction) - shown).square().sum((1, 2))
        return int(total.argmin())

    def _mapped(self, reaction: Reaction, head: int) -> list[int]:
        """Of each of the product's atoms, the reactants' atom of its element that it attends to most, both ways."""
        weights = self._attention(reaction)[head, 1:-1, 1:-1]
        tokens = reaction.tokens
        before, after = reaction.atoms()
        both = weights[after][:, before] * weights[before][:, after].T
        alike = torch.tensor([[tokens[a].lower() == tokens[b].lower() for b in before] for a in after])
        return both.masked_fill(~alike, -1.0).argmax(1).tolist()


def _stride(reactions: list[Reaction], most: int | None) -> int:
    return 1 if most is None else max(1, len(reactions) // most)
