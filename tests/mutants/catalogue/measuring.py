"""Of measuring: scores of models, comparisons, costs of layers, timing, the self-test and the doctor."""

from __future__ import annotations

from functools import partial

from tests.mutants.record import Mutant

TESTS = "tests/attnzoo"
evaluate = partial(Mutant, file="attnzoo/evaluation/model_scores.py", tests=f"{TESTS}/evaluation/test_model_scores.py")
decode = partial(Mutant, file="attnzoo/evaluation/decoding.py", tests=f"{TESTS}/evaluation/test_decoding.py")
compare = partial(Mutant, file="attnzoo/evaluation/compare.py", tests=f"{TESTS}/evaluation/test_compare.py")
render = partial(Mutant, file="attnzoo/evaluation/compare_report.py", tests=f"{TESTS}/evaluation/test_compare.py")
costs = partial(Mutant, file="attnzoo/evaluation/layer_costs.py", tests=f"{TESTS}/evaluation/test_layer_costs.py")
checks = partial(Mutant, file="attnzoo/evaluation/layer_checks.py", tests=f"{TESTS}/evaluation/test_layer_costs.py")
ten_lines = partial(
    Mutant, file="attnzoo/evaluation/ten_lines.py", tests=f"{TESTS}/evaluation/test_layer_costs.py -k 'mha_forward'"
)
crossing = partial(Mutant, file="bench/crossover/curves.py", tests="tests/bench/test_crossover.py -k 'length'")
setting = partial(Mutant, file="attnzoo/evaluation/cost_setting.py", tests=f"{TESTS}/evaluation/test_timing.py")
timing = partial(Mutant, file="attnzoo/evaluation/timing.py", tests=f"{TESTS}/evaluation/test_timing.py")
selftest = partial(Mutant, file="kernels/attnzoo_kernels/selftest.py", tests="tests/attnzoo_kernels/test_selftest.py")

MUTANTS = (
    evaluate(
        "evaluate-shift", old="cross_entropy(logits[:-1], window[1:])", new="cross_entropy(logits[1:], window[1:])",
        wrong="tokens are scored by what is said once they are read",
    ),
    evaluate(
        "evaluate-probe-first", old="probe = logits[-PROBE_ROWS:].clone()", new="probe = logits[:PROBE_ROWS].clone()",
        wrong="models are compared where sparse and dense attention are the same",
    ),
    evaluate(
        "evaluate-offset", old="return tokens[offset:end].view(count, length)", new="return tokens[: length * count].view(count, length)",
        wrong="windows begin at the start of the text",
    ),
    decode(
        "evaluate-density-of-first-layer", old="for layer in seen.plans.values() for plan in layer]", new="for layer in list(seen.plans.values())[:1] for plan in layer]",
        wrong="density is that of the first layer",
    ),
    decode(
        "evaluate-density-once", old="return id(plan.layout), id(plan.extras.q_pos)", new="return id(plan.layout), 0",
        wrong="layers that share a layout and differ in rows are measured as one",
    ),
    decode(
        "evaluate-absent-rows-read", old="present = 1.0 if q_pos is None else float((q_pos >= 0).double().mean())", new="present = 1.0",
        wrong="heads that leave their row out count as reading",
    ),
    decode(
        "decode-not-paired", old='timing.paired(found, "this", "dense")', new='timing.paired(found, "dense", "this")', wrong="the ratio is upside down",
    ),
    decode(
        "decode-behind-others", old="    dense.step()\n", new="", wrong="the dense model is a token behind",
    ),
    decode(
        "decode-shared-cache", old="other._cache = deepcopy(self._cache)", new="other._cache = self._cache", wrong="rows go on in each other's cache",
    ),
    compare(
        "compare-longer-from-window", old="sequence.read(prompt[sequence.tokens :])", new="sequence.read(prompt)", wrong="a longer prompt is read behind the window, which it begins with",
        tests=f"{TESTS}/evaluation/test_compare.py -k 'read_as_much'",
    ),
    compare(
        "compare-dense-goes-on", old="race(mine, start.copy())", new="race(mine, start)", wrong="the dense model is behind more tokens in every row",
        tests=f"{TESTS}/evaluation/test_compare.py -k 'read_as_much'",
    ),
    decode(
        "evaluate-read-of-all", old="/ plan.layout.seq_k", new="/ (plan.layout.grid[1] * plan.layout.block_k)", wrong="a ragged memory counts as longer than it is",
    ),
    compare(
        "compare-noop-by-density", old="elif spec.conversions and found.density == 1 and same:", new="elif spec.conversions and found.density == 1:",
        wrong="a conversion of weights is called a no-op for its density",
    ),
    compare(
        "compare-noop-by-logits", old="elif spec.conversions and found.density == 1 and same:", new="elif spec.conversions and same:",
        wrong="a conversion that leaves pairs out is called a no-op for its logits",
    ),
    compare(
        "compare-certificate", old='"certificate holds" if same', new='"certificate holds" if found.density == 1', wrong="a certificate holds whatever the logits are",
    ),
    compare(
        "compare-ratio", old="math.exp(found.mean_nll - dense.mean_nll)", new="found.mean_nll / dense.mean_nll", wrong="the ratio is that of likelihoods, not of perplexities",
    ),
    compare(
        "compare-not-undone", old="            for report in reversed(reports):\n                report.undo()", new="            for report in reports[-1:]:\n                report.undo()",
        wrong="only the last conversion of a row is taken back",
    ),
    compare(
        "compare-statistics-of-converted", old="calibration = self._collected() if first else self.batches[:1]", new="calibration = self._collected()",
        wrong="a second conversion uses statistics of the model before the first",
    ),
    compare(
        "compare-read-bytes", old="round(held * decoding[0].read_share)", new="round(held * found.density)", wrong="what a step reads is told by the density of prefill",
    ),
    compare(
        "compare-held-of-dense", old="held = surgery.cache_bytes(self.model)", new="held = surgery.cache_bytes(self.model) if self._dense is None else 0",
        wrong="cached bytes are not those of the converted model",
    ),
    checks(
        "costs-bound-ignored", old="if errors[worst] > bound:", new="if errors[worst] > 1e30:", wrong="wrong layers are timed", tests=f"{TESTS}/evaluation/test_layer_costs.py -k 'wrong'",
    ),
    checks(
        "costs-nan-right", old="return math.inf if math.isnan(worst) else worst", new="return 0.0 if math.isnan(worst) else worst",
        wrong="what is no number counts as right", tests=f"{TESTS}/evaluation/test_layer_costs.py -k 'number'",
    ),
    checks(
        "costs-aux-loss", old="if aux is not None and aux.requires_grad:", new="if aux is None:", wrong="auxiliary losses are not trained", tests=f"{TESTS}/evaluation/test_layer_costs.py -k 'auxiliary'",
    ),
    checks(
        "costs-density-of-check", old="layer.eval().attend(setting.inputs(setting.tokens)).plan.density", new="layer.eval().attend(setting.inputs(tokens)).plan.density",
        wrong="density is that of the shorter check", tests=f"{TESTS}/evaluation/test_layer_costs.py -k 'density'",
    ),
    costs(
        "costs-wrong-baseline", old="comparable = cost.problem is None and first.problem is None", new="comparable = cost.problem is None",
        wrong="times are given beside a baseline that is wrong", tests=f"{TESTS}/evaluation/test_layer_costs.py -k 'baseline_that_is_wrong'",
    ),
    costs(
        "costs-step-kept", old="        clear_memory()\n", new="", wrong="a step finds what an earlier round made for its own length",
        tests=f"{TESTS}/evaluation/test_layer_costs.py -k 'same_one_each_time'",
    ),
    costs(
        "costs-step-grows", old="cache.crop(max(0, slots - 1))", new="cache.crop(slots)", wrong="the step before is not made anew",
        tests=f"{TESTS}/evaluation/test_layer_costs.py -k 'same_one_each_time'",
    ),
    costs(
        "costs-groups-empty", old="    if groups:\n", new="    if groups and tokens < 0:\n", wrong="what stands for blocks is zero in a cache that is filled",
        tests=f"{TESTS}/evaluation/test_layer_costs.py -k 'as_a_prefill'",
    ),
    crossing(
        "crossing-first", old="    last = slower[-1]\n", new="    last = slower[0]\n", wrong="a layer counts as quicker from where it is so for a while",
    ),
    crossing(
        "crossing-noise", old="if ratio >= QUICKER]", new="if ratio >= 1]", wrong="noise counts as quicker",
    ),
    crossing(
        "crossing-past-limit", old="        if longer_than(limit, pair, curve.kind):\n            return\n", new="", wrong="a length is measured however long it takes",
    ),
    ten_lines(
        "ten-lines-reads-all", old="k, v = cache[:, :, :, :end]", new="k, v = cache", wrong="a step reads slots that nobody has written",
    ),
    ten_lines(
        "ten-lines-not-rotated", old="k = rotated(k, self.cos[start:end], self.sin[start:end])", new="k = rotated(k, self.cos[: end - start], self.sin[: end - start])",
        wrong="a step's key is rotated as the first",
    ),
    setting(
        "costs-cuda-index", old="int(index or 0) >= found", new="int(index or 0) > found",
        wrong="a device behind the last is accepted",
    ),
    timing(
        "timing-mean", old="statistics.median(values) for name", new="statistics.fmean(values) for name", wrong="outliers count",
    ),
    timing(
        "timing-paired", old="statistics.median(a / b for a, b in zip(found[first], found[second], strict=True))", new="statistics.median(found[first]) / statistics.median(found[second])",
        wrong="the ratio is of medians and not of rounds",
    ),
    timing(
        "timing-least", old="if done + 1 >= least and time", new="if time", wrong="fewer rounds than asked for",
    ),
    timing(
        "timing-one-after-the-other", old="    for done in range(most):\n        for name in contestants:", new="    for name in contestants:\n        for done in range(most):",
        wrong="contestants do not take turns",
    ),
    timing(
        "timing-warm-up", old="    for name in contestants:\n        timed(name)\n", new="", wrong="the first run is timed cold",
    ),
    timing(
        "timing-before-timed", old="        if name in before:\n            before[name]()\n        start = clock()", new="        start = clock()\n        if name in before:\n            before[name]()",
        wrong="what comes before a run is timed",
    ),
    selftest(
        "selftest-bias-added", old="return most / math.sqrt(self.q.shape[3]) + added", new="return most + added", wrong="the bound is wider by the root of the width",
    ),
    selftest(
        "selftest-lse-gradient", old="+ (torch.where(lse.isfinite(), lse, 0.0) * pull).sum()", new="", wrong="the gradient of lse is not tested",
    ),
    selftest(
        "selftest-skips-wrong", old="if why_not(impl,", new="if why_not('triton' if impl == 'blocked' else impl,", wrong="the blocked implementation is not tested where triton cannot run",
    ),
    selftest(
        "selftest-truth-rounded", old='solve(make(case).to(dtype, cpu).to(torch.float64, cpu), "reference", dtype)', new='solve(make(case).to(dtype, cpu), "reference", dtype)',
        wrong="the truth is computed in the dtype under test",
    ),
)  # fmt: skip
