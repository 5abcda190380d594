"""Of rows with lists of their own: pairs sorted by key block, their tiles, and how a row's blocks are joined."""

from __future__ import annotations

from functools import partial

from tests.mutants.record import Mutant

TESTS = "tests/attnzoo_kernels/cpu/test_key_major.py"
pairs = partial(Mutant, file="kernels/attnzoo_kernels/key_major/pairs.py", tests=f"{TESTS} -k same_call")
tiles = partial(Mutant, file="kernels/attnzoo_kernels/key_major/attention.py", tests=f"{TESTS} -k same_call")
decoding = partial(Mutant, file="attnzoo/selection/decoding.py", tests="tests/attnzoo/selection/test_decoding.py")

MUTANTS = (
    pairs(
        "key-major-edges-among-whole-tiles", old="torch.where(seen < call.block_k, flat + groups_in_all, flat)",
        new="torch.where(seen < 0, flat + groups_in_all, flat)", wrong="the causal edge is not hidden in tiles of pairs",
    ),
    pairs(
        "key-major-row-of-another-head", old="own + head * (tokens - (last - first)) + first", new="own + first",
        wrong="in a later window, rows are those of the first head",
    ),
    tiles(
        "key-major-own-block-gated", old="    return torch.where(gated, gate, lse)", new="    return gate",
        wrong="the own block counts by its landmark",
    ),
    tiles(
        "key-major-gradient-of-lse-lost", old="        change += dlse", new="        pass",
        wrong="the log-sum-exp has no gradient",
    ),
    decoding(
        "decoding-ties-taken-for-clear", old="clear = (value[..., count] < last)", new="clear = (value[..., count] <= last)",
        wrong="which of two equal scores a decoding step takes is not defined",
    ),
    decoding(
        "decoding-tokens-of-another-group", old="// (heads // groups) * slots", new="% groups * slots",
        wrong="a query head reads what another group's chose",
    ),
)  # fmt: skip
