"""Of two-phase scores of policies: what is asked behind what, and what is counted."""

from __future__ import annotations

from functools import partial

from tests.mutants.record import Mutant

FOLDER = "attnzoo/evaluation/two_phase"
TESTS = "tests/attnzoo/evaluation/two_phase"
scores = partial(Mutant, file=f"{FOLDER}/scores.py", tests=f"{TESTS}/test_scores.py")
tasks = partial(Mutant, file=f"{FOLDER}/tasks.py", tests=f"{TESTS}/test_tasks.py")

MUTANTS = (
    scores(
        "two-phase-without-compaction",
        old="    reader.compact(sequence.cache)\n",
        new="",
        wrong="probes are read while everything is still held",
    ),
    scores(
        "two-phase-probes-follow",
        old="score_probe(sequence.copy(), probe",
        new="score_probe(sequence, probe",
        wrong="a probe is read behind the one before it",
    ),
    scores(
        "two-phase-scores-what-was-read",
        old="expected = ids[scored]",
        new="expected = ids[scored - 1]",
        wrong="tokens are scored by what is said once they are read",
    ),
    scores(
        "two-phase-last-token-alone",
        old="context.tensor_split(-(-len(context) // PIECE))",
        new="context.split(PIECE)",
        wrong="the last token of a context is a call of its own, behind which a policy compacts",
    ),
    scores(
        "two-phase-shares-of-all",
        old="if case.tokens == most)",
        new="if case.tokens <= most)",
        wrong="bytes of short contexts, which windows hold whole, count as the policy's",
    ),
    tasks(
        "recall-cue-scored",
        old="torch.arange(len(separator) + cue, len(ids)",
        new="torch.arange(len(separator), len(ids)",
        wrong="the tokens that say which span is meant are scored",
    ),
    tasks(
        "recall-in-the-window",
        old="(i + 1) * length // (count + 2)",
        new="(i + 2) * length // (count + 2)",
        wrong="spans lie where windows still hold them",
    ),
    tasks(
        "passkey-scores-the-blank",
        old="return int(apart[0]) if len(apart) else 0",
        new="return 0",
        wrong="the blank before a key counts as a part of it",
    ),
)
