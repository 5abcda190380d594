"""Of surgery: statistics, grouping, closed forms, merging, refit, and how variants are replaced."""

from __future__ import annotations

from functools import partial

from tests.mutants.record import Mutant

FOLDER, TESTS = "attnzoo/surgery", "tests/attnzoo/surgery"
statistics = partial(Mutant, file=f"{FOLDER}/lowrank/calibration.py", tests=f"{TESTS}/lowrank/test_statistics.py")
grouping = partial(
    Mutant,
    file=f"{FOLDER}/lowrank/grouping.py",
    tests=f"{TESTS}/lowrank/test_grouping.py -k 'not round_trip and not nine'",
)
factor = partial(Mutant, file=f"{FOLDER}/lowrank/solve.py", tests=f"{TESTS}/lowrank/test_solve.py")
merge = partial(
    Mutant,
    file=f"{FOLDER}/lowrank/merge_heads.py",
    tests=f"{TESTS}/lowrank/test_merge_parts.py {TESTS}/lowrank/test_factor.py",
)
lowrank = partial(
    Mutant,
    file=f"{FOLDER}/lowrank/factor.py",
    tests=f"{TESTS}/lowrank/test_factor.py {TESTS}/lowrank/test_calibration.py",
)
refit = partial(
    Mutant,
    file=f"{FOLDER}/lowrank/refit.py",
    tests=f"{TESTS}/lowrank/test_refit_parts.py {TESTS}/lowrank/test_refit.py",
)
report = partial(Mutant, file=f"{FOLDER}/report.py", tests=f"{TESTS}/test_report.py")
replacements = partial(Mutant, file=f"{FOLDER}/replacements/moh.py", tests=f"{TESTS}/replacements/test_moh_start.py")
spec = partial(Mutant, file=f"{FOLDER}/replacements/spec.py", tests=f"{TESTS}/replacements/test_moh_start.py")

MUTANTS = (
    statistics(
        "statistics-padding", old="with_constant(in_full(x[real]), constant)", new="with_constant(in_full(x.flatten(0, 1)), constant)",
        wrong="padding counts as text", within="_add",
    ),
    statistics(
        "statistics-first-column", old="return real & (real.cumsum(1) == 1)", new="return real & (torch.arange(real.shape[1], device=real.device) == 0)",
        wrong="left-padded sequences have no sink",
    ),
    statistics(
        "statistics-loss-behind-padding", old="real[:, 1:] & real[:, :-1]", new="real[:, 1:]",
        wrong="the token behind padding is predicted from padding", tests=f"{TESTS}/lowrank/test_loss.py",
    ),
    statistics(
        "statistics-loss-of-padding", old="real[:, 1:] & real[:, :-1]", new="real[:, :-1]",
        wrong="padding behind the text is learnt", tests=f"{TESTS}/lowrank/test_loss.py",
    ),
    statistics(
        "statistics-mean-loss", old='ignore_index=-100, reduction="sum")', new='ignore_index=-100, reduction="mean")',
        wrong="gradients depend on how many tokens a batch has", tests=f"{TESTS}/lowrank/test_loss.py {TESTS}/lowrank/test_statistics.py",
    ),
    statistics(
        "statistics-weight-not-squared", old="weight = grads.square().sum(-1)", new="weight = grads.abs().sum(-1)",
        wrong="tokens are weighed by gradients and not their squares",
    ),
    statistics(
        "statistics-trainable-lost", old="        for parameter in frozen:\n            parameter.requires_grad_(True)\n", new="",
        wrong="the model's weights stay frozen",
    ),
    statistics(
        "statistics-sink-of-tokens", old="self.first * (share / max(self.sequences, 1))", new="self.first * (share / max(self.tokens, 1))",
        wrong="the sink's moment shrinks with the length of sequences", tests=f"{TESTS}/lowrank/test_refit_parts.py",
    ),
    statistics(
        "statistics-loss-moment-trace", old="return (self.weighted * (plain.trace() / trace) + plain) / 2", new="return (self.weighted + plain) / 2",
        wrong="the weighted moment counts by the size of gradients", tests=f"{TESTS}/lowrank/test_refit_parts.py",
    ),
    statistics(
        "statistics-last-batch-weights", old="site.token_weight.append(full)", new="site.token_weight[:] = [full]",
        wrong="token weights of the last batch replace those of all", tests=f"{TESTS}/lowrank/test_refit_parts.py",
    ),
    grouping(
        "grouping-ties", old="kept <= sum(cost(group) for group in best) * (1 + 1e-9) + NOTHING", new="kept < sum(cost(group) for group in best)",
        wrong="heads are shuffled though nothing is won", tests=f"{TESTS}/lowrank/test_grouping_ties.py",
    ),
    grouping(
        "grouping-given-up", old="NOTHING = 1e-12", new="NOTHING = 1e-3",
        wrong="neighbours that lose something are not compared with any others", tests=f"{TESTS}/lowrank/test_grouping_ties.py",
    ),
    grouping(
        "grouping-swap-any", old="cost(tuple(a)) + cost(tuple(b)) < before - 1e-12", new="cost(tuple(a)) + cost(tuple(b)) <= before",
        wrong="swaps that win nothing are kept, and the search goes on till it is stopped", tests=f"{TESTS}/lowrank/test_grouping_ties.py",
    ),
    grouping(
        "grouping-swap-not-taken-back", old="        return True\n    a[i], b[j] = b[j], a[i]\n    return False", new="        return True\n    return False",
        wrong="swaps that lose are kept",
    ),
    grouping(
        "grouping-values-tail", old="spectrum[: size - width].sum()", new="spectrum[: size - width - 1].sum()",
        wrong="the largest lost value is not counted",
    ),
    grouping(
        "grouping-keys-total", old="lost += float(spectrum[:, :-1].sum()) / total_keys", new="lost += float(spectrum[:, :-1].sum()) / total_values",
        wrong="lost keys are a share of the values' energy",
    ),
    grouping(
        "grouping-farthest", old="nearest = min(free, key=lambda head: _closeness(head, group, pairs))", new="nearest = max(free, key=lambda head: _closeness(head, group, pairs))",
        wrong="groups are filled with whoever is farthest", tests=f"{TESTS}/lowrank/test_grouping_ties.py",
    ),
    factor(
        "factor-root-inverse", old="(vectors / values.sqrt()) @ vectors.mH", new="(vectors / values) @ vectors.mH", wrong="the inverse root is the inverse",
    ),
    factor(
        "factor-rank-lowest", old="top = vectors[:, size - rank :]", new="top = vectors[:, :rank]", wrong="the least energy is kept",
    ),
    factor(
        "factor-query-conjugate", old="factor = (top.conj() @ inverse).conj()", new="factor = top.conj() @ inverse", wrong="queries are turned the other way than keys",
    ),
    factor(
        "factor-plane-imaginary", old="block(first, second) - block(second, first)", new="block(second, first) - block(first, second)",
        wrong="the planes' metric is the conjugate",
    ),
    factor(
        "factor-refit-start", old="cross - gram @ start)\n    return start + step", new="cross)\n    return step", wrong="the ridge pulls to zero instead of the start",
    ),
    factor(
        "factor-rest-columns", old="query[head][at.unsqueeze(1), at] = up.T", new="query[head][at.unsqueeze(1), at] = up",
        wrong="unrotated parts of queries are transposed",
    ),
    factor(
        "factor-balance", old="scales += [1.0 / float(energy)] * columns.shape[1]", new="scales += [float(energy)] * columns.shape[1]",
        wrong="the louder of keys and values weighs even more",
    ),
    factor(
        "factor-spread", old="torch.linalg.qr(inverse @ top)", new="inverse @ top, torch.eye(rank).to(top)",
        wrong="factors spread over orders of magnitude, as a metric does",
    ),
    factor(
        "factor-keys-of-any-size", old="size = factor.abs().square().mean().sqrt()", new="size = factor.abs().max() * 0 + 1",
        wrong="merged keys are small and their queries large",
    ),
    factor(
        "factor-kept", old="values[size - rank :].sum() / values.sum()", new="values[rank:].sum() / values.sum()",
        wrong="the promised share is not that of the kept values",
    ),
    merge(
        "merge-heads-fisher-swapped", old="keys = fisher[:size, :size]\n        values = fisher[size:, size:]", new="values = fisher[:size, :size]\n        keys = fisher[size:, size:]",
        wrong="keys are weighed by the Fisher matrix of values, and the other way round", tests=f"{TESTS}/lowrank/test_merge_parts.py",
    ),
    merge(
        "merge-heads-query-order", old="for query in range(head * share, (head + 1) * share):", new="for query in range(head, share * len(weights.k[0]), len(weights.k[0])):",
        wrong="query heads belong to KV heads by remainder", tests=f"{TESTS}/lowrank/test_merge_parts.py",
    ),
    merge(
        "merge-heads-output-slices", old="place * weights.v.shape[2] : (place + 1) * weights.v.shape[2]", new="head * weights.v.shape[2] : (head + 1) * weights.v.shape[2]",
        wrong="outputs are expanded by the wrong member's part", tests=f"{TESTS}/lowrank/test_merge_parts.py",
    ),
    merge(
        "merge-heads-bias-lost", old="kept = weights.constant and (had_bias or bool(rows[inputs].any()))", new="kept = weights.constant and had_bias",
        wrong="biases that a correction brings are dropped", tests=f"{TESTS}/lowrank/test_merge_parts.py",
    ),
    merge(
        "merge-heads-interleaved", old="torch.stack([2 * pairs, 2 * pairs + 1], 1)", new="torch.stack([pairs, pairs + size // 2], 1)",
        wrong="interleaved rotations are merged as halves", tests=f"{TESTS}/lowrank/test_merge_parts.py",
    ),
    merge(
        "merge-heads-partial-rotation", old="size = width if rotary.dim is None else rotary.dim", new="size = width",
        wrong="dimensions that are not rotated are merged as planes", tests=f"{TESTS}/lowrank/test_merge_parts.py",
    ),
    merge(
        "merge-heads-expand-order", old='"(g d) ... -> (g n d) ..."', new='"(g d) ... -> (n g d) ..."', wrong="repeated heads stand by copy and not by group",
        tests=f"{TESTS}/lowrank/test_merge_parts.py",
    ),
    merge(
        "merge-heads-mean-queries", old="HeadWeights(weights.q[order], k, v, weights.o[order], weights.constant)", new="HeadWeights(weights.q[order], k, v, weights.o, weights.constant)",
        wrong="queries are moved with their groups and outputs are not", tests=f"{TESTS}/lowrank/test_merge_parts.py",
    ),
    merge(
        "merge-heads-latent-bias", old="found.down[inputs].to(like) if weights.constant else None", new="None",
        wrong="the biases of keys and values are dropped in the latent form", tests=f"{TESTS}/lowrank/test_merge_parts.py",
    ),
    lowrank(
        "lowrank-gradients-ignored", old="calibration if request.gradients else calibration.without_gradients()", new="calibration",
        wrong="statistics with gradients are used as such though asked not to", tests=f"{TESTS}/lowrank/test_calibration.py -k without_them",
    ),
    lowrank(
        "lowrank-statistics-unchecked", old="calibration.check(site, biases=has_biases(model.get_submodule(site.path)))", new="pass",
        wrong="statistics of another model are used", tests=f"{TESTS}/lowrank/test_calibration.py -k another_model",
    ),
    lowrank(
        "lowrank-divides", old="elif count is not None and groups % count:", new="elif count is not None and count > groups:",
        wrong="a number of KV heads that does not divide is not refused by name", tests=f"{TESTS}/lowrank/test_merge_parts.py",
    ),
    lowrank(
        "lowrank-latent-most", old="most = 2 * groups * site.head_dim", new="most = groups * site.head_dim", wrong="latents of full rank are refused",
        tests=f"{TESTS}/lowrank/test_factor.py -k full_rank",
    ),
    refit(
        "refit-token-weights-dropped", old="by_token = weight[self.student.real.cpu()].to(student).unsqueeze(1)", new="by_token = torch.ones(tokens, 1).to(student)",
        wrong="token weights are dropped", tests=f"{TESTS}/lowrank/test_refit_parts.py",
    ),
    refit(
        "refit-joined-without-weights", old="for path, site in statistics.sites.items() if site.token_weight}", new="for path, site in statistics.sites.items() if site.token_weight is None}",
        wrong="no site gets its token weights", tests=f"{TESTS}/lowrank/test_refit_parts.py",
    ),
    refit(
        "refit-batches-left-padded", old="pad(x, (0, longest - x.shape[1]))", new="pad(x, (longest - x.shape[1], 0))",
        wrong="short batches are padded in front", tests=f"{TESTS}/lowrank/test_refit_parts.py",
    ),
    refit(
        "refit-goal-without-stream", old="wanted = (seen[1] + (before - hidden))[self.real]", new="wanted = seen[1][self.real]",
        wrong="a block does not make up for what the stream has lost", tests=f"{TESTS}/lowrank/test_refit.py -k 'reported or no_worse'",
    ),
    refit(
        "refit-teacher-not-real", old="refit.solve(seen[0][self.real], wanted)", new="refit.solve(seen[0].flatten(0, 1)[: int(self.real.sum())], wanted)",
        wrong="padding takes the place of text in what the teacher saw", tests=f"{TESTS}/lowrank/test_refit.py -k 'padding'",
    ),
    refit(
        "refit-bias-not-subtracted", old="in_full(wanted) - in_full(projections.o_bias)", new="in_full(wanted)",
        wrong="the output projection learns its own bias a second time", tests=f"{TESTS}/lowrank/test_refit_parts.py",
    ),
    refit(
        "refit-error-not-relative", old="error = (max(lost, 0.0) / max(energy, 1e-300)) ** 0.5", new="error = max(lost, 0.0) / max(energy, 1e-300)",
        wrong="the reported error is squared", tests=f"{TESTS}/lowrank/test_refit.py -k reported",
    ),
    refit(
        "refit-student-not-moved", old="self.hidden = _run(refit.layer_with(result[0]), hidden, call)", new="self.hidden = after",
        wrong="sites are solved for what the dense model gives", tests=f"{TESTS}/lowrank/test_refit.py -k 'give or reported'",
    ),
    report(
        "report-before-and-after", old='for name in ("values_before", "values_after")', new='for name in ("values_after", "values_before")',
        wrong="bytes before and afterwards are swapped",
    ),
    report(
        "report-undo-twice", old="        self._undo()\n        self._undo = None", new="        self._undo()", wrong="a conversion is undone twice",
    ),
    report(
        "report-columns", old='("site", "values/token", "energy kept", "output error")',
        new='("site", "values/token", "output error", "energy kept")',
        wrong="the table's figures stand under each other's names",
    ),
    replacements(
        "replaced-moh-routers-random", old="                    router.weight.zero_()", new="                    pass",
        wrong="routers of a partly active conversion are random instead of zero",
    ),
    replacements(
        "replaced-moh-one-router", old="(layer.router, layer.shared_router, layer.type_router)", new="(layer.router, layer.type_router)",
        wrong="the router of shared heads is random",
    ),
    replacements(
        "replaced-moh-all-heads", old='return {"active_heads": "all"}', new="return {}", wrong="a conversion without options leaves heads out",
    ),
    replacements(
        "replaced-moh-sink-warning", old="if config.window is not None and not config.sink:", new="if config.window is None and not config.sink:",
        wrong="dropping the sink is not warned of",
    ),
    spec(
        "replaced-frozen", old="parameter.requires_grad_(trainable)", new="parameter.requires_grad_(True)", wrong="new weights of frozen blocks train",
        tests=f"{TESTS}/replacements/test_moh.py -k trainable",
    ),
    spec(
        "replaced-scale-lost", old="        scale=block.scale,\n", new="", wrong="a host's own scale is lost in its replacements", tests=f"{TESTS}/replacements/test_moh_start.py",
    ),
)  # fmt: skip
