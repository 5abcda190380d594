"""Of what is hidden and no number, of scales, and of products that write over what memory held."""

from __future__ import annotations

from functools import partial

from tests.mutants.record import Mutant

FOLDER, TESTS = "kernels/attnzoo_kernels", "tests/attnzoo_kernels"
gemm = partial(Mutant, file=f"{FOLDER}/runtime/products.py", tests=f"{TESTS}/runtime/test_products.py")
nonfinite = partial(Mutant, file=f"{FOLDER}/runtime/products.py", tests=f"{TESTS}/cpu/test_nonfinite.py -k blocked")
checks = partial(Mutant, file=f"{FOLDER}/checks.py", tests=f"{TESTS}/op/test_scale.py -k refuse")

MUTANTS = (
    gemm(
        "gemm-zero-left", old="if rounds_to_zero(scale, a.dtype):", new="if False:",
        wrong="at a scale of 0 what memory held stays, where the library returns at once",
    ),
    gemm(
        "gemm-zero-not-added", old="return out.add_(nothing) if add else out.copy_(nothing)", new="return out.copy_(nothing)",
        wrong="at a scale of 0 what a product is added to is lost",
    ),
    gemm(
        "gemm-zero-half", old="abs(scale) <= 2.0**-150", new="abs(scale) < 2.0**-150",
        wrong="half of the smallest number is taken for one",
    ),
    gemm(
        "gemm-zero-of-nonfinite", old="torch.bmm(a, b).mul_(0.0)", new="torch.zeros_like(out)",
        wrong="at a scale of 0 a NaN that is seen is lost",
    ),
    nonfinite(
        "nonfinite-touched-by-all", old=".float()) > 0", new=".float()) >= 0", wrong="a NaN reaches rows that give it no weight",
    ),
    nonfinite(
        "nonfinite-bias-hides-nothing", file=f"{FOLDER}/cpu/blocked.py", old="return call.key_bias is not None and bool((call.key_bias == -torch.inf).any())",
        new="return False", wrong="calls in which the bias alone hides are not computed again",
        tests=f"{TESTS}/op/test_torture.py -k bias_alone",
    ),
    nonfinite(
        "nonfinite-rule-hides-nothing", file=f"{FOLDER}/cpu/blocked.py", old="call.gate is not None or any(part.partial for part in parts)",
        new="call.gate is not None", wrong="calls in which the rule alone hides are not computed again",
    ),
    Mutant(
        "scores-weights-of-spoiled-rows", file=f"{FOLDER}/cpu/scores.py", old="scores.masked_fill_(unseen, 0.0)", new="pass",
        wrong="a row with a NaN has weights for slots that it does not see", tests=f"{TESTS}/cpu/test_nonfinite.py -k blocked",
    ),
    Mutant(
        "gating-weights-of-vanished-blocks", file=f"{FOLDER}/blocks/gates.py",
        old="weights.masked_fill_(_weightless(inner, outer), 0.0)", new="pass",
        wrong="a gated row with a NaN has weights for slots that it does not see",
        tests=f"{TESTS}/cpu/test_nonfinite.py -k blocked",
    ),
    checks(
        "checks-nan-passes", old="if not abs(value) <= torch.finfo(acc).max:", new="if abs(value) > torch.finfo(acc).max:",
        wrong="a scale of NaN is taken",
    ),
    checks(
        "checks-mix-unread", old="for value in mix.tolist():", new="for value in ():",
        wrong="a mix with a NaN is taken",
    ),
    Mutant(
        "reference-gradients-of-dead-rows", file=f"{FOLDER}/reference.py",
        old="out = torch.where(live, _weighted(weights, mask, v), 0.0)", new="out = _weighted(weights, mask, v)",
        wrong="the gradient of a row that sees nothing reaches values", tests=f"{TESTS}/cpu/test_nonfinite.py -k reference",
    ),
    Mutant(
        "reference-no-rows", file=f"{FOLDER}/reference.py", old=" or q.shape[2] == 0", new="",
        wrong="origins fail where there is no row", tests=f"{TESTS}/op/test_switches.py -k nothing",
    ),
)  # fmt: skip
