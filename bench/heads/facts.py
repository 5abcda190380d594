"""Facts that a small model knows, and contexts that say something else.

Source: Yu, Merullo and Pavlick 2023, *Characterizing Mechanisms for Factual Recall in Language Models*, section 3
(arXiv:2310.15910), whose capitals and whose words these are. Departures: fewer countries, written down here; a context
names the capital of another country of the list, and only answers whose first tokens differ are asked for.

Letters: B items, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from attnzoo.evaluation.two_phase.tasks import Encode

CAPITALS = {
    "France": "Paris",
    "Germany": "Berlin",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Portugal": "Lisbon",
    "England": "London",
    "Ireland": "Dublin",
    "Scotland": "Edinburgh",
    "Russia": "Moscow",
    "Poland": "Warsaw",
    "Austria": "Vienna",
    "Hungary": "Budapest",
    "Greece": "Athens",
    "Turkey": "Ankara",
    "Egypt": "Cairo",
    "Norway": "Oslo",
    "Sweden": "Stockholm",
    "Finland": "Helsinki",
    "Denmark": "Copenhagen",
    "Belgium": "Brussels",
    "Netherlands": "Amsterdam",
    "Switzerland": "Bern",
    "Japan": "Tokyo",
    "China": "Beijing",
    "India": "Delhi",
    "Thailand": "Bangkok",
    "Vietnam": "Hanoi",
    "Canada": "Ottawa",
    "Mexico": "Mexico City",
    "Cuba": "Havana",
    "Brazil": "Brasilia",
    "Argentina": "Buenos Aires",
    "Chile": "Santiago",
    "Peru": "Lima",
    "Colombia": "Bogota",
    "Venezuela": "Caracas",
    "Iran": "Tehran",
    "Iraq": "Baghdad",
    "Syria": "Damascus",
    "Israel": "Jerusalem",
    "Lebanon": "Beirut",
    "Kenya": "Nairobi",
    "Ethiopia": "Addis",
    "Nigeria": "Abuja",
    "Senegal": "Dakar",
    "Ukraine": "Kyiv",
    "Romania": "Bucharest",
    "Bulgaria": "Sofia",
    "Serbia": "Belgrade",
    "Croatia": "Zagreb",
    "Czech Republic": "Prague",
    "Australia": "Canberra",
    "South Korea": "Seoul",
    "Indonesia": "Jakarta",
    "Philippines": "Manila",
    "Nepal": "Kathmandu",
    "Pakistan": "Islamabad",
    "Afghanistan": "Kabul",
    "Mongolia": "Ulaan",
    "Jamaica": "Kingston",
}

INVENTED = (
    "Zorland Balkonia Merovia Tarkistan Veldoria Ostrania Kaldova Lumeria Pandoria Quintara Drakovia Norvinia Elbonia "
    "Grusinia Halvetia Tamoria"
)
"""Countries of which nothing is known but what a context says."""

STATEMENT = "The capital of {country} is"
QUESTIONS = "\nQ: What is the capital of {country}?\nA: The capital of {country} is"
CONFLICT = STATEMENT + " {other}." + QUESTIONS


@dataclass(frozen=True, eq=False)
class Conflicts:
    """Prompts whose context says something else than the model knows, padded at the right.

    Attributes:
        ids: int64 ``[B, T]``.
        mask: Which are tokens, int64 ``[B, T]``.
        known: The first token of what the model knows, int64 ``[B]``.
        told: That of what the context says, int64 ``[B]``.
    """

    ids: Tensor
    mask: Tensor
    known: Tensor
    told: Tensor

    @property
    def batch(self) -> dict[str, Tensor]:
        """For ``model(**batch)``."""
        return {"input_ids": self.ids, "attention_mask": self.mask}

    @property
    def last(self) -> Tensor:
        """The last token of each, int64 ``[B]``."""
        return self.mask.sum(1) - 1

    def half(self, number: int) -> Conflicts:
        """Every second item."""
        return Conflicts(*(x[number::2] for x in (self.ids, self.mask, self.known, self.told)))


@dataclass(frozen=True)
class Answers:
    """What a model answers.

    Attributes:
        prefers: Share of items whose context's answer is likelier than what the model knows.
        told: Share that say the context's answer.
        known: Share that say what the model knows.
        nll: Of the context's answer, nats.
    """

    prefers: float
    told: float
    known: float
    nll: float


def padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of tokens with padding at the right, and which are tokens: int64 ``[B, T]`` each."""
    length = max(map(len, rows))
    ids = torch.stack([torch.cat([row, row.new_zeros(length - len(row))]) for row in rows])
    mask = torch.stack([(torch.arange(length, device=row.device) < len(row)).long() for row in rows])
    return ids, mask


def last_logits(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """What a model says behind each row ``[B, V]``; the padding's logits are not computed."""
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        rows = torch.arange(len(ids), device=ids.device)
        logits: Tensor = model.get_output_embeddings()(hidden[rows, mask.sum(1) - 1])
    return logits


def first_token(encode: Encode, word: str) -> int:
    """The token by which a word is told from others; a blank of its own says nothing of it."""
    ids = encode(f" {word}")
    return int(ids[len(encode(" ")) if torch.equal(ids[:1], encode(" ")) else 0])


def known_countries(model: Any, encode: Encode, *, ask: bool = True) -> list[str]:
    """Countries whose capitals a model says; all of them where it is not asked."""
    if not ask:
        return list(CAPITALS)
    statements = [encode(STATEMENT.format(country=country)) for country in CAPITALS]
    said = last_logits(model, *padded(statements)).argmax(-1).tolist()
    firsts = [first_token(encode, capital) for capital in CAPITALS.values()]
    return [country for country, first, token in zip(CAPITALS, firsts, said, strict=True) if first == token]


def conflicts(encode: Encode, countries: Sequence[str], *, shift: int = 7, form: str = CONFLICT) -> Conflicts:
    """A prompt for each country, whose context names the capital of another one."""
    rows: list[Tensor] = []
    known: list[int] = []
    told: list[int] = []
    for place, country in enumerate(countries):
        other = CAPITALS[countries[(place + shift) % len(countries)]]
        own, false = (first_token(encode, capital) for capital in (CAPITALS[country], other))
        rows.append(encode(form.format(country=country, other=other)))
        known.append(own)
        told.append(false)
    ids, mask = padded(rows)
    different = torch.tensor(known) != torch.tensor(told)
    return Conflicts(ids[different], mask[different], torch.tensor(known)[different], torch.tensor(told)[different])


def invented(encode: Encode, *, form: str) -> Conflicts:
    """A prompt for each country that does not exist, with a capital that does."""
    countries = INVENTED.split()
    capitals = list(CAPITALS.values())[: len(countries)]
    rows = [encode(form.format(country=name, other=other)) for name, other in zip(countries, capitals, strict=True)]
    firsts = torch.tensor([first_token(encode, capital) for capital in capitals])
    ids, mask = padded(rows)
    return Conflicts(ids, mask, firsts.roll(1), firsts)


def answers(model: Any, items: Conflicts) -> Answers:
    """What a model answers where its context contradicts what it knows."""
    said = last_logits(model, items.ids, items.mask)
    rows = torch.arange(len(said), device=said.device)
    prefers = said[rows, items.told] > said[rows, items.known]
    best = said.argmax(-1)
    shares = [float(x.float().mean()) for x in (prefers, best == items.told, best == items.known)]
    return Answers(*shares, nll=float(cross_entropy(said.float(), items.told)))
