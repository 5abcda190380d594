"""Of the operation: sharding, dispatch, workspace, merging, counting, and what is beside the arithmetic."""

from __future__ import annotations

from tests.mutants.record import Mutant

MERGE = "kernels/attnzoo_kernels/merge.py"
MERGE_TESTS = "tests/attnzoo_kernels/test_merge.py"

MUTANTS = (
    Mutant(
        "merge-empty-lse",
        MERGE,
        old="live, shift + torch.log(total), -torch.inf",
        new="live, shift + torch.log(total), 0.0",
        wrong="a row that is empty everywhere gets lse 0",
        tests=MERGE_TESTS,
    ),
    Mutant(
        "merge-shift-lost",
        MERGE,
        old="shift + torch.log(total)",
        new="torch.log(total)",
        wrong="the joined lse lacks the largest of the parts",
        tests=MERGE_TESTS,
    ),
)
