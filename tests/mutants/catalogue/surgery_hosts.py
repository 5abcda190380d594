"""Of surgery on hosts at run time: calls, autocast, implementations that were set, undoing, one site at a time."""

from __future__ import annotations

from functools import partial

from tests.mutants.record import Mutant

FOLDER, TESTS = "attnzoo/surgery", "tests/attnzoo/surgery"
calls = partial(
    Mutant, file=f"{FOLDER}/hosts/calls.py", tests=f"{TESTS}/hosts/test_transformers.py -k 'either and replaced-mha'"
)
interface = partial(Mutant, file=f"{FOLDER}/hosts/attention_function.py")
replaced = partial(Mutant, file=f"{FOLDER}/transaction.py")
one_site = partial(
    Mutant, file=f"{FOLDER}/lowrank/one_site.py", tests=f"{TESTS}/lowrank/test_one_site.py -k 'not same_weights'"
)
tested = partial(Mutant, file="attnzoo/reporting/versions.py")

MUTANTS = (
    calls(
        "calls-one-name", old='CACHE_NAMES = ("past_key_values", "cache", "layer_past")',
        new='CACHE_NAMES = ("cache", "layer_past")',
        wrong="the name up to transformers 5.23 is not known",
    ),
    calls("calls-both-names", old="if given is not None and cache is not None:", new="if False:", wrong="a second cache vanishes"),
    calls(
        "calls-unknown", old="if name not in _IGNORED and given is not None", new="if name in _IGNORED and given is not None",
        wrong="unknown arguments vanish",
    ),
    interface(
        "implementation-unseen", old="    if found != NAME:", new="    if False:", wrong="a converted model is dense in silence",
        tests=f"{TESTS}/hosts/test_switched.py -k 'taken_back and window and method'",
    ),
    interface(
        "implementation-of-blocks", old="        config._attn_implementation = NAME\n", new="        pass\n",
        wrong="a block with a configuration of its own follows no rule", tests=f"{TESTS}/hosts/test_switched.py -k of_its_own",
    ),
    interface(
        "switched-back-too-far", old="if switched.model == NAME and not any(", new="if False and not any(",
        wrong="undo leaves a shared configuration at our functions", tests=f"{TESTS}/hosts/test_switched.py -k any_order",
    ),
    replaced(
        "undo-stale-dtype", old="if now.whereabouts is not None and now.whereabouts != then.whereabouts:", new="if False:",
        wrong="old blocks come back in the dtype that they had", tests=f"{TESTS}/test_moved.py -k 'come_back_as and mean and bf16'",
    ),
    replaced(
        "undo-stale-mode", old="if now.training != then.training:", new="if False:", wrong="old blocks come back in another mode",
        tests=f"{TESTS}/test_moved.py -k 'come_back_as and mean and training'",
    ),
    replaced(
        "undo-drops-adapters", old="if now is not then and not kept:", new="if False:", wrong="adapters are dropped in silence",
        tests=f"{TESTS}/test_moved.py -k 'adapter and mean'",
    ),
    replaced(
        "undo-over-others", old="if found is not self.new:", new="if False:", wrong="a block of somebody else's is thrown away",
        tests=f"{TESTS}/test_moved.py -k 'somebody and mean'",
    ),
    one_site(
        "memory-fits-less", old="if free is not None and needed > free:", new="if free is not None and needed > 2 * free:",
        wrong="what does not fit is begun",
    ),
    one_site(
        "memory-two-sites", old="            self._last = None\n", new="", wrong="two sites' statistics are held at once",
        tests=f"{TESTS}/lowrank/test_one_site.py -k 'same_weights and latent'", within="Lazily.__getitem__",
    ),
    tested(
        "version-too-old", old='if release(found) < release(FLOORS["transformers"]):', new="if False:",
        wrong="versions without what is needed end in other errors", tests=f"{TESTS}/hosts/test_transformers.py -k too_old",
    ),
    tested(
        "version-said-always", old="found not in _warned", new="True", wrong="every conversion warns",
        tests=f"{TESTS}/hosts/test_transformers.py -k said_once",
    ),
)  # fmt: skip
