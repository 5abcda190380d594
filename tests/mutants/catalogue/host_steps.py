"""Of decoding in converted models: caches that grow, rows that are read without a plan, latents that are absorbed."""

from __future__ import annotations

from functools import partial

from tests.mutants.record import Mutant

HOSTS, TESTS = "attnzoo/surgery/hosts", "tests/attnzoo/surgery"
growing = partial(
    Mutant,
    file=f"{HOSTS}/caches/growing.py",
    tests=f"{TESTS}/hosts/test_growing.py -k 'any_order or tenth or step_copies or gradients_reach'",
)
one_row = partial(
    Mutant, file=f"{HOSTS}/one_row.py", tests=f"{TESTS}/hosts/test_one_row.py -k 'need_a_plan and window and gradients'"
)
positions = partial(Mutant, file=f"{HOSTS}/positions.py", tests=f"{TESTS}/hosts/test_one_row.py -k 'positions'")
latent = partial(
    Mutant,
    file="attnzoo/base/decoding/latent.py",
    tests=f"{TESTS}/replacements/test_latent_step.py -k 'expanded and (half or factor) or round_a_projection'",
)

MUTANTS = (
    growing(
        "growing-edited",
        old="self.keys is self._views[0] and self.values is self._views[1]",
        new="True",
        wrong="keys that a caller has put there are lost",
    ),
    growing(
        "growing-gradients",
        old="if torch.is_grad_enabled() and any(x.requires_grad",
        new="if False and any(x.requires_grad",
        wrong="gradients do not reach earlier calls",
    ),
    growing(
        "growing-doubles", old="_SHARE_OF_ROOM = 16", new="_SHARE_OF_ROOM = 1", wrong="a cache takes twice its tokens"
    ),
    growing(
        "growing-cropped",
        old="        if own:\n",
        new="        if not own:\n",
        wrong="after a crop nothing is written in place",
    ),
    one_row(
        "one-row-gradients",
        old="if torch.is_grad_enabled() and any(",
        new="if False and any(",
        wrong="no gradient passes a step",
    ),
    positions(
        "positions-stale",
        old="_counted.get(position_ids) == (first, tokens_per_landmark, version)",
        new="position_ids in _counted",
        wrong="positions that were changed in place count as slots",
    ),
    latent(
        "latent-query-late",
        old="_rotate(q, table[last : last + 1])",
        new="_rotate(q, table[last + 1 : last + 2])",
        wrong="queries are rotated by the slot behind their own",
    ),
    latent(
        "latent-chunks-begin",
        old="keys.expand(some, first + begin, made)",
        new="keys.expand(some, first, made)",
        wrong="every chunk of keys is rotated as the first",
    ),
    latent(
        "latent-hooks",
        old="hooks = module._forward_hooks or",
        new="hooks = False and",
        wrong="hooks on kv_up are not called",
    ),
    Mutant(
        "landmark-row-mixes-once",
        file="attnzoo/variants/landmark/decoding.py",
        tests="tests/attnzoo/variants/test_landmark_decoding.py",
        old="far += (gate - within) * row.mix",
        new="far += gate * row.mix",
        wrong="a block's own log-sum-exp stays in its logit whatever the mix",
    ),
    positions(
        "positions-landmarks-late",
        old="wanted -= (wanted + 1).div(",
        new="wanted -= wanted.div(",
        wrong="a landmark's position is that of the token behind it",
    ),
)
