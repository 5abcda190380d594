"""Of caches that evict: where tokens lie, what chunks read, what may be taken back, and converted models."""

from __future__ import annotations

from functools import partial

from tests.mutants.record import Mutant

TESTS = "tests/attnzoo"
regions = partial(Mutant, file="attnzoo/cache/evicting/regions.py", tests=f"{TESTS}/cache/test_regions.py")
cache = partial(
    Mutant, file="attnzoo/cache/evicting/cache.py", tests=f"{TESTS}/variants/test_mha_evict.py -k 'not training'"
)
calls = partial(
    Mutant, file="attnzoo/base/evicting/calls.py", tests=f"{TESTS}/variants/test_mha_evict.py -k 'any_window'"
)
hosts = partial(
    Mutant,
    file="attnzoo/surgery/hosts/attention_function.py",
    tests=f"{TESTS}/surgery/hosts/test_evicting.py -k 'kept or said or refused or padding'",
)

MUTANTS = (
    regions(
        "regions-margin-is-read", old="return tuple(Run(heads, (self.margin, filled + kept), own)", new="return tuple(Run(heads, (0, filled + kept), own)",
        wrong="a row reads what has left",
    ),
    regions(
        "regions-sink-not-kept", old="        if self.in_place:\n            _write_over(filled, left, journal)\n", new="        if self.in_place:\n            pass\n",
        wrong="a window's sink is forgotten when it leaves the window",
    ),
    cache(
        "evicting-counts-no-row", old="            region.retire(buffers, held, self._journal)", new="            pass", wrong="nothing moves between two decoding steps",
    ),
    cache(
        "evicting-grows-short", old="rows = region.rows(max_length)", new="rows = region.rows(self.max_length)", wrong="a cache says that it has grown, and has not",
    ),
    cache(
        "evicting-crops-into-what-is-gone", old="if bool((needed & ~is_known).any()):", new="if False:",
        wrong="more tokens are taken back than the margin holds", tests=f"{TESTS}/surgery/hosts/test_evicting.py -k 'taken_back'",
    ),
    calls(
        "evicting-window-of-gaps", old="token = torch.where(slot < sink, slot, slot + Lengths(gap).column(3))", new="token = slot + Lengths(gap).column(3)",
        wrong="a chunk reads later tokens in the place of the sink",
    ),
    hosts(
        "evicting-with-padding", file="attnzoo/surgery/hosts/caches/evicting_calls.py", old="real = real_slots(real, held.real, held.seen, tokens)", new="real = None", wrong="padding counts as tokens",
    ),
    hosts(
        "evicting-with-gradients", file="attnzoo/surgery/hosts/caches/evicting_calls.py", old="keeps = _wants_gradients(module, call)", new="keeps = False", wrong="gradients do not reach earlier tokens",
    ),
)  # fmt: skip
