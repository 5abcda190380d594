"""Of policies that hold by place: their rule, which heads are chosen, and models that follow them."""

from __future__ import annotations

from functools import partial

from tests.mutants.record import Mutant

TESTS = "tests/attnzoo"
duo = partial(Mutant, file="attnzoo/cache/policies/duo.py", tests=f"{TESTS}/cache/policies/test_duo.py")
plans = partial(
    Mutant, file="attnzoo/base/evicting/plans.py", tests=f"{TESTS}/base/evicting/test_policy_caches.py -k split"
)
hosts = partial(
    Mutant,
    file="attnzoo/surgery/hosts/caches/evicting_calls.py",
    tests=f"{TESTS}/policies/test_applied.py -k 'refused and caches or llama'",
)

MUTANTS = (
    duo(
        "duo-ties-as-they-come", old=".argsort(descending=True, stable=True)", new=".flip(0).argsort(descending=True, stable=True).neg().add(chosen.numel() - 1)",
        wrong="of equal scores the last heads are taken",
    ),
    duo(
        "duo-count-of-a-sparsity", old="math.ceil(sparsity * (gates.numel() - 1) - 1e-9)", new="math.floor(sparsity * (gates.numel() - 1))",
        wrong="one head more than the published rule says holds everything",
    ),
    duo(
        "duo-chosen-twice", old="values.masked_fill(chosen, -torch.inf)", new="values",
        wrong="a head that two scores choose leaves one head fewer",
    ),
    plans(
        "plan-near-blocks", old="near = own - block < retention.local", new="near = own - block <= retention.local",
        wrong="a prompt reads one block more than a cache holds",
    ),
    plans(
        "plan-full-heads", old="near | kept | torch.tensor(full, device=device).view(shape)", new="near | kept",
        wrong="a prompt streams for heads that hold everything",
    ),
    hosts(
        "policy-padding-in-its-place", old="rows = Alignment.of(~own)", new="rows = Alignment.of(torch.zeros_like(own))",
        wrong="padding takes the places of tokens in what is held",
    ),
    hosts(
        "policy-any-cache", old="    if policy is not None and pattern.evict:\n", new="    if False:\n",
        wrong="a cache that cannot follow the policy keeps everything silently",
    ),
    Mutant(
        "policy-silent-without-cache", file="attnzoo/surgery/hosts/attention_function.py", old="        _warn_without_cache(pattern)\n", new="        pass\n",
        wrong="a call without a cache reads everything, and nobody is told", tests="tests/attnzoo/policies/test_applied.py -k says_so",
    ),
)  # fmt: skip
