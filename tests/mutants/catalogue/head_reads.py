"""Of edits of what heads read: whose rows and keys, by which numbers, and what is told apart."""

from __future__ import annotations

from functools import partial

from tests.mutants.record import Mutant

READING = "tests/attnzoo/heads/edits/test_reading.py"
ACT = "tests/attnzoo/heads/test_act.py"
operation = partial(Mutant, file="attnzoo/base/editing/operation.py", tests=f"{READING} -k written_out")
reading = partial(Mutant, file="attnzoo/surgery/edits/reading.py", tests=f"{READING} -k written_out")

MUTANTS = (
    operation(
        "reads-see-ahead", old="q=self.q.index_select(1, own),", new="q=self.q.index_select(1, own), causal=False,",
        wrong="edited heads read what comes behind, plain means too",
    ),
    operation(
        "reads-base-two", old="other_lse.masked_fill(single, 0)).sigmoid()", new="other_lse.masked_fill(single, 0)).div(0.693147).sigmoid()",
        wrong="log-sum-exps are taken for logarithms to the base of two",
    ),
    operation(
        "reads-weighted-means", old="torch.zeros_like(bias).masked_fill(bias == -torch.inf, -torch.inf)", new="torch.zeros_like(bias)",
        wrong="a plain mean sees what was hidden", tests=f"{READING} -k plain_mean_sees",
    ),
    reading("reads-keys-for-rows", old="_set_of(edit.key_bias.queries)", new="_set_of(edit.key_bias.keys)", wrong="keys are hidden from themselves"),
    reading(
        "reads-of-the-group", old="for head in edit.query_heads(site):",
        new="for head in sorted({3 * (head // 3) + i for head in edit.query_heads(site) for i in range(3)}):", wrong="a query head's edit reaches its whole group",
    ),
    reading(
        "reads-count-padding", old="token = (real.cumsum(1) - 1).masked_fill(~real, -1)[:, geometry.first :]",
        new="token = (real.long().cumsum(1) * 0 + torch.arange(held)).masked_fill(~real, -1)[:, geometry.first :]",
        wrong="rows are numbered with padding", tests=f"{READING} -k padding_does",
    ),
    Mutant(
        "reads-slots-of-blocks", file="attnzoo/base/evicting/calls.py", old="HeldKeys(region.heads, token)", new="HeldKeys(region.heads)", within="_attend_blocks",
        wrong="what is held is taken for the first tokens of its sequence", tests=f"{READING} -k 'held_is_edited and place'",
    ),
    Mutant(
        "reads-slots-of-pages", file="attnzoo/base/paged/calls.py", old="position = pool.view(\"position\", extent).narrow(2, 0, extent.most).long()",
        new="position = pool.view(\"position\", extent).narrow(2, 0, extent.most).long() * 0 + torch.arange(extent.most)",
        wrong="rows are numbered as they are held", tests=f"{READING} -k 'held_is_edited and score'",
    ),
    Mutant(
        "reads-quick-steps", file="attnzoo/surgery/hosts/caches/evicting_calls.py", old=" and inputs.edits is None", new="",
        wrong="decoding rows over what is held know no edits", tests=f"{READING} -k 'held_is_edited and place'",
    ),
    Mutant(
        "reads-mean-multiplied", file="attnzoo/surgery/edits/outputs.py", old="if n > number] + self._inner", new="if n > number]",
        wrong="an outer context multiplies the plain mean that came after it", tests=f"{READING} -k all_that_is_left",
    ),
    Mutant(
        "act-first-sink", file="attnzoo/heads/act.py", old="(self.tokens.cumsum(-1) > 1)", new="(self.tokens.cumsum(-1) > 0)",
        wrong="the first sink is calibrated too", tests=f"{ACT} -k spared",
    ),
    Mutant(
        "far-mass-window", file="attnzoo/heads/scores/far_mass.py", old="slot <= row[:, None] - window", new="slot < row[:, None] - window",
        wrong="the window is a token longer", tests=f"{ACT} -k far_is",
    ),
)  # fmt: skip
