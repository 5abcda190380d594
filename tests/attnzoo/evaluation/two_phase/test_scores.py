"""Two-phase scores against plain loops: what is let go of is gone before anything is asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnzoo.cache.policies.protocol import Keep, PageBounds, Policy, Seen
from attnzoo.evaluation.two_phase.scores import (
    DenseReader,
    Held,
    prefill_nll,
    read_context,
    score_case,
    score_cases,
)
from attnzoo.evaluation.two_phase.tasks import Case, Probe, text_case
from attnzoo.policies.one_forward import why_one_forward_says_nothing
from attnzoo_kernels.errors import UnsupportedError
from tests.attnzoo.surgery.tiny import ids, tiny

TEXT = ids(1, 160)[0]
SEPARATOR = torch.tensor([7, 7])


def case_of(context: int = 100) -> Case:
    return text_case("some", TEXT, context=context, encode=lambda text: SEPARATOR, continuation=24, spans=2, span=16)


class Forgetful(DenseReader):
    """Holds the first 40 tokens of a context: a policy that is easily computed by hand."""

    def compact(self, cache: Any) -> None:
        for layer in cache.layers:
            layer.keys = layer.keys[:, :, :40]
            layer.values = layer.values[:, :, :40]

    def held(self, cache: Any) -> Held:
        rows = cache.get_seq_length()
        return Held(rows * 10, rows * 12, 1000, rows * 5)


def by_hand(model: Any, before: Tensor, probe: Tensor, scored: list[int]) -> tuple[float, bool]:
    """The mean NLL of some tokens of a probe, one at a time, without any cache."""
    values, right = [], []
    for place in scored:
        with torch.no_grad():
            said = model(torch.cat((before, probe[:place])).unsqueeze(0), use_cache=False).logits[0, -1]
        values.append(-said.float().log_softmax(-1)[probe[place]])
        right.append(int(said.argmax()) == int(probe[place]))
    return float(torch.stack(values).mean()), all(right)


@pytest.mark.parametrize(("run", "kept"), [(DenseReader, 100), (Forgetful, 40)])
def test_probes_are_scored_behind_what_is_held_each_anew(run: Any, kept: int) -> None:
    model = tiny()
    case = case_of()
    found = score_case(run(model), case)
    expected = [by_hand(model, TEXT[:kept], TEXT[100:124], list(range(1, 24)))[0]]
    assert found.nll["text"] == pytest.approx(expected, rel=1e-5)
    spans = [torch.cat((SEPARATOR, TEXT[start : start + 16])) for start in (25, 50)]
    expected = [by_hand(model, TEXT[:kept], span, list(range(4, 18)))[0] for span in spans]
    assert found.nll["recall"] == pytest.approx(expected, rel=1e-5)
    assert (found.name, found.tokens, found.right) == ("some", 100, [])


def test_a_key_is_right_where_greedy_decoding_says_it() -> None:
    model = tiny()
    ask = TEXT[100:104]
    with torch.no_grad():
        said = model.generate(TEXT[:104].unsqueeze(0), max_new_tokens=3, do_sample=False)[0, 104:]
    wrong = torch.cat((said[:2], (said[2:] + 1) % 61))
    probes = tuple(Probe("key", torch.cat((ask, key)), torch.arange(4, 7)) for key in (said, wrong))
    found = score_case(DenseReader(model), Case("keys", TEXT[:100], probes))
    assert found.right == [True, False]
    assert found.nll["key"] == pytest.approx(
        [by_hand(model, TEXT[:100], p.ids, [4, 5, 6])[0] for p in probes], rel=1e-5
    )


class ByStep(Policy):
    """Compacts again while decoding."""

    name = "by step"


def test_token_by_token_says_the_same_where_nothing_happens_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    case = case_of()
    at_once = score_case(DenseReader(model), case)
    calls: list[int] = []
    forward = model.forward
    run = DenseReader(model)
    monkeypatch.setattr(run, "policy", ByStep(every=8), raising=False)
    monkeypatch.setattr(model, "forward", lambda ids, **more: calls.append(ids.shape[1]) or forward(ids, **more))
    by_step = score_case(run, case)
    assert calls == [100] + [1] * (23 + 17 + 17)
    assert by_step.nll["text"] == pytest.approx(at_once.nll["text"], rel=1e-5)
    assert by_step.nll["recall"] == pytest.approx(at_once.nll["recall"], rel=1e-5)


@pytest.mark.parametrize(("tokens", "pieces"), [(8, [8]), (9, [5, 4]), (16, [8, 8]), (17, [6, 6, 5])])
def test_no_piece_of_a_context_is_a_single_token(
    tokens: int, pieces: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny()
    calls: list[int] = []
    forward = model.forward
    monkeypatch.setattr("attnzoo.evaluation.two_phase.scores.PIECE", 8)
    monkeypatch.setattr(model, "forward", lambda ids, **more: calls.append(ids.shape[1]) or forward(ids, **more))
    sequence, cache = read_context(DenseReader(model), TEXT[:tokens])
    assert calls == pieces
    assert sequence.tokens == cache.get_seq_length() == tokens


def test_bytes_are_those_of_all_contexts_together() -> None:
    model = tiny()
    dense = score_cases(DenseReader(model), [case_of(), case_of(80)])
    # Two layers of two KV heads of 16 fp64 channels, keys and values.
    assert dense.bytes_per_token == 2 * 2 * 2 * 16 * 8
    assert dense.held_share == dense.room_share == dense.read_share == 1
    few = score_cases(Forgetful(model), [case_of(), case_of(80)])
    assert (few.held_share, few.room_share, few.read_share) == (0.4, 0.48, 0.2)
    # Of the longest context alone.
    assert few.bytes_per_token == 400 / 100
    assert few.mean("key") is None
    mean = few.mean("recall")
    assert mean == pytest.approx(sum(x for case in few.cases for x in case.nll["recall"]) / 4)


class Scored(Policy):
    """Chooses by what it holds."""

    name = "scored"

    def keep(self, seen: Seen) -> Keep | None:
        return None


class Reading(Policy):
    """Chooses pages."""

    name = "reading"

    def read(self, q: Tensor, pages: PageBounds) -> Tensor | None:
        return None


def test_one_forward_says_nothing_of_what_happens_behind_it() -> None:
    model = tiny()
    with torch.no_grad():
        said = model(TEXT[:50].unsqueeze(0), use_cache=False).logits[0].float()
    expected = torch.nn.functional.cross_entropy(said[:-1], TEXT[1:50])
    assert prefill_nll(DenseReader(model), TEXT[:50]) == pytest.approx(float(expected), rel=1e-5)
    assert why_one_forward_says_nothing(ByStep()) is None
    for policy, reason in ((Scored(), "chooses behind a prompt"), (Reading(), "chooses pages for decoding rows")):
        run = DenseReader(model)
        run.policy = policy  # type: ignore[assignment]
        with pytest.raises(UnsupportedError, match=reason):
            prefill_nll(run, TEXT[:50])
