"""Of scores of heads: whose weights are counted, when, and what is left behind."""

from __future__ import annotations

from functools import partial

from tests.mutants.record import Mutant

TESTS = "tests/attnzoo/heads"
rows = partial(
    Mutant,
    file="attnzoo/heads/scores/attention_rows.py",
    tests=f"{TESTS}/scores/test_scores.py -k 'plain_loops and llama'",
)
repeated = partial(
    Mutant, file="attnzoo/heads/scores/repeated.py", tests=f"{TESTS}/scores/test_scores.py -k 'plain_loops and llama'"
)
retrieval = partial(Mutant, file="attnzoo/heads/scores/retrieval_cases.py")
scores = partial(
    Mutant, file="attnzoo/heads/scores/head_scores.py", tests=f"{TESTS}/scores/test_scores.py -k best_of_their_group"
)
gates = partial(Mutant, file="attnzoo/heads/training/duo_gates.py")
capture = partial(Mutant, file="attnzoo/surgery/capture.py", tests="tests/attnzoo/surgery/test_capture.py")

MUTANTS = (
    rows("heads-future", old="device=q.device) > rows[:, None]", new="device=q.device) > rows[:, None] + 1", wrong="a row sees one key ahead"),
    rows("heads-groups", old=".unflatten(1, (groups, -1))", new=".unflatten(1, (-1, groups)).transpose(1, 2)", wrong="heads read KV heads of other groups"),
    repeated("heads-induction-before", old="INDUCTION: 1}", new="INDUCTION: -1}", wrong="induction is of the token before"),
    repeated("heads-last-copy-alone", old="torch.arange(1, tokens // length, ", new="torch.arange(1, 2, ", wrong="one of the earlier copies counts alone"),
    retrieval(
        "heads-copied-twice", old="copied[head, place] = True", new="copied[head] |= copied.new_tensor(True)", wrong="one place stands for all",
        tests=f"{TESTS}/scores/test_scores.py -k counts_once",
    ),
    retrieval(
        "heads-any-token", old=" and case.tokens[place] == token:", new=":", wrong="heads are credited for what was not said",
        tests=f"{TESTS}/scores/test_scores.py -k retrieval_is_that",
    ),
    scores("heads-group-mean", old=".amax(2)", new=".mean(2)", wrong="one head that copies is lost in its group's mean"),
    gates(
        "duo-whole-of-the-mix", old="(gate * whole.pop(site.layer) + (1 - gate) * streamed)", new="(gate * call.answered() + (1 - gate) * streamed)",
        wrong="what is whole comes from the second stream", tests=f"{TESTS}/training/test_duo_gates.py -k first_streams",
    ),
    gates(
        "duo-window-of-one-block-less", old="behind < rule.near_blocks", new="behind < rule.near_blocks - 1", wrong="streaming heads see a block less",
        tests=f"{TESTS}/training/test_duo_gates.py -k policys_blocks",
    ),
    gates(
        "duo-open-end", old="gates.detach().clamp(0, 1)", new="gates.detach()", wrong="the last step leaves gates outside of [0, 1]",
        tests=f"{TESTS}/training/test_duo_gates.py -k end_between",
    ),
    capture(
        "capture-stays", old="restored.callback(_put_back, module, before)", new="pass", wrong="a block goes on asking", within="around_attention",
    ),
    capture(
        "capture-outer-lost", old="call = replace(call, answer=answer)", new="pass", wrong="the outer of two contexts is not asked", within="_ask",
    ),
    Mutant(
        "scores-beyond-positions", file="attnzoo/heads/scores/scoring.py", old="tokens > most and not rotates", new="False and not rotates",
        wrong="more tokens than learned positions end in an index out of range", tests="tests/attnzoo/heads/scores/test_scores.py -k learned",
    ),
)  # fmt: skip
