"""``attnzoo heads``: scores of a model's heads, and what it does without the best of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import typer
from torch import Tensor

from attnzoo.base.config import check_int
from attnzoo.cli import screen
from attnzoo.cli.models import encode, text_tokens
from attnzoo.cli.progress import Bar
from attnzoo.evaluation.heads.knockout import Knockout, head_sets, knock_out, read_ablate
from attnzoo.evaluation.heads.report import HeadsReport
from attnzoo.evaluation.heads.text_ablation import ABLATION, text_ablation
from attnzoo.evaluation.heads.word_classes import word_classes
from attnzoo.evaluation.model_scores import cut_windows
from attnzoo.evaluation.passkeys import passkey_cases
from attnzoo.heads import HeadScores, score_heads
from attnzoo.heads.scores import copying, far_mass, successor
from attnzoo.heads.scores.far_mass import FAR_MASS
from attnzoo.heads.scores.retrieval_cases import RETRIEVAL
from attnzoo.heads.scores.scoring import METHODS
from attnzoo.heads.scores.token_maps import COPYING, SUCCESSOR
from attnzoo.reporting.choices import check_choice
from attnzoo.reporting.outputs import check_writable

SCORES = (*METHODS, FAR_MASS, COPYING, SUCCESSOR, ABLATION)

COPY = 200
"""Tokens of one copy of random ones."""

PROMPT = 400
"""Tokens of a passkey's prompt."""

TEXT = "botchan"
TEXT_OFFSET = 1024
TEXT_TOKENS = 512
PASSKEYS = 3

ABLATION_TOKENS = 128
"""Tokens of the text by whose likelihood heads are ablated."""

SINK = 4
WINDOW = 64
"""What is near, in tokens."""


@dataclass(frozen=True, kw_only=True)
class HeadsCall:
    """What a command asks for.

    Attributes:
        model: As the command line names it.
        score: One of ``SCORES``.
        top: How many heads of each kind are named.
        length: Tokens of one copy, or of a passkey's prompt; ``None`` for the usual number.
        seed: Of random tokens, passkeys and random heads.
        ablate: Which heads the model is tried without, such as "top:10"; ``None`` for none.
        picture: Where scores are drawn, or ``None``.
        out: The common name of all files, or ``None``.
    """

    model: str
    score: str
    top: int
    length: int | None
    seed: int
    ablate: str | None
    picture: Path | None
    out: Path | None

    def check(self) -> None:
        """Raises unless it fits, before anything is loaded.

        Raises:
            ConfigError: If something does not.
        """
        check_choice("score", self.score, SCORES)
        check_int("top", self.top, 1)
        if self.ablate is not None:
            read_ablate(self.ablate)
        if self.picture is not None:
            check_choice("picture", self.picture.suffix, (".png", ".pdf", ".svg"))
            check_writable(self.picture, "picture")
        if self.out is not None:
            check_writable(self.out)


def score_model(call: HeadsCall, model: Any, tokenizer: Any, *, as_json: bool) -> None:
    """Scores a model's heads, tries it without the best of them where that is asked, and prints or writes it all.

    Raises:
        ConfigError: If the model or its tokenizer does not fit.
        UnsupportedError: If its heads cannot be scored or edited.
    """
    with Bar() as progress:
        scores, skipped = _scores(call, model, tokenizer, progress)
        knockouts = _knockouts(call, model, tokenizer, scores, progress) if call.ablate else []
    top = min(call.top, scores.layers * scores.heads)
    report = HeadsReport(call.model, scores, top, knockouts, skipped)
    if call.picture is not None:
        report.write_picture(call.picture)
    if call.out is not None:
        report.write(call.out)
    _tell(call, report, as_json=as_json)


def _scores(call: HeadsCall, model: Any, tokenizer: Any, progress: Bar) -> tuple[HeadScores, dict[str, str]]:
    """The scores that are asked for, and the classes of words that were skipped for them."""
    if call.score in (COPYING, SUCCESSOR):
        classes, skipped = word_classes(partial(encode, tokenizer))
        score = copying if call.score == COPYING else successor
        return score(model, classes, progress=progress), skipped
    if call.score == FAR_MASS:
        return far_mass(model, [_text(tokenizer)[None]], SINK, WINDOW), {}
    if call.score == ABLATION:
        return text_ablation(model, _text(tokenizer)[:ABLATION_TOKENS], progress), {}
    options: dict[str, Any] = {"seed": call.seed, "length": call.length or COPY}
    if call.score == RETRIEVAL:
        length = call.length or PROMPT
        options = {"cases": passkey_cases(partial(encode, tokenizer), length=length, seed=call.seed)}
    return score_heads(model, call.score, progress=progress, **options), {}


def _text(tokenizer: Any) -> Tensor:
    """A piece of a text that ships, int64 ``[T]``."""
    return cut_windows(text_tokens(tokenizer, TEXT), length=TEXT_TOKENS, offset=TEXT_OFFSET, count=1)[0]


def _knockouts(call: HeadsCall, model: Any, tokenizer: Any, scores: HeadScores, progress: Bar) -> list[Knockout]:
    # What of the model or the text does not fit is known before the sets are tried.
    count = read_ablate(call.ablate or "")
    sets = head_sets(scores, scores.kinds[0], count, seed=call.seed)
    length = call.length if call.score == RETRIEVAL and call.length else PROMPT
    # Other passkeys than those that heads may have been chosen by.
    cases = passkey_cases(partial(encode, tokenizer), count=PASSKEYS, length=length, seed=call.seed + 1)
    return knock_out(model, sets, cases, _text(tokenizer), progress)


def _tell(call: HeadsCall, report: HeadsReport, *, as_json: bool) -> None:
    if as_json:
        typer.echo(report.to_json())
        return
    for number, grid in enumerate(report.grids()):
        if number:
            screen.text("")
        screen.table(grid)
    for note in report.notes():
        screen.text(note)
    if call.picture is not None:
        screen.text(f"written: {call.picture}")
    screen.written(call.out)
