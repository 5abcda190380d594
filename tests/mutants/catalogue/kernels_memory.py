"""Of what the operation remembers and counts: pairs, kept plans, read masks, traces; and of what it refuses."""

from __future__ import annotations

from functools import partial

from tests.mutants.record import Mutant

FOLDER, TESTS = "kernels/attnzoo_kernels", "tests/attnzoo_kernels"
density = partial(Mutant, file=f"{FOLDER}/layouts/density.py", tests=f"{TESTS}/layouts/test_density.py")
memo = partial(Mutant, file=f"{FOLDER}/layouts/memo.py", tests=f"{TESTS}/runtime/test_store.py")
store = partial(Mutant, file=f"{FOLDER}/runtime/store.py", tests=f"{TESTS}/runtime/test_store.py")
flex_rule = partial(Mutant, file=f"{FOLDER}/layouts/flex_mask.py", tests=f"{TESTS}/layouts/test_flex_mask.py")
tracing = partial(
    Mutant,
    file=f"{FOLDER}/runtime/tracing.py",
    tests="tests/attnzoo/laws/test_tracing.py -k 'traced or number or flop'",
)
checks = partial(Mutant, file=f"{FOLDER}/checks.py", tests=f"{TESTS}/op/test_constants.py")
op = partial(Mutant, file=f"{FOLDER}/op.py", tests=f"{TESTS}/op/test_constants.py -k tangent")
schedule = partial(Mutant, file=f"{FOLDER}/cpu/schedule.py", tests=f"{TESTS}/op/test_unseen.py -k limits")
unseen = partial(Mutant, tests=f"{TESTS}/op/test_unseen.py")

MUTANTS = (
    density(
        "density-found-behind-the-last", old="found & (index < self.key.shape[0]) & (block < self.blocks)",
        new="found & (index < self.key.shape[0])", wrong="the end of the keys is taken for the next list's first block",
        survives="Behind the last block there are no keys to count: what is found there counts for 0.",
    ),
    density(
        "density-short-block-whole", old="last = (first + call.block_k).clamp(max=seq_k)", new="last = first + call.block_k",
        wrong="a ragged last block counts slots that are not there",
    ),
    density(
        "density-lists-share-a-bias", old="        pairs % (bias_batch * bias_heads),",
        new="        pairs * 0,",
        wrong="all rows count the keys of the first row of the bias", tests=f"{TESTS}/op/test_surface.py -k hidden",
    ),
    density(
        "density-items-of-positions", old="positions[item if positions.shape[0] > 1 else 0,", new="positions[0,",
        wrong="all items stand where the first one does",
        tests=f"{TESTS}/layouts/test_density.py tests/attnzoo/base/test_plan_density.py",
    ),
    density(
        "density-one-item-for-all", old="1 if q_pos is None else q_pos.shape[0]) > 1 else 1", new="1) > 1 else 1",
        wrong="items that differ in positions alone are counted as one",
        tests=f"{TESTS}/layouts/test_density.py tests/attnzoo/base/test_plan_density.py",
    ),
    density(
        "density-landmark-cut-off", old="hidden = counts.cut_off(lists, lo) - torch.where", new="hidden = counts.cut_off(lists, lo) + torch.where",
        wrong="a sink inside the block where a gated window begins is taken off twice",
    ),
    Mutant(
        "records-density-of-front-of-items", "attnzoo/base/steps.py",
        old="if extras.q_pos is None and Lengths(self.front).shared:", new="if False:",
        wrong="rows in front of a chunk count as queries", tests="tests/attnzoo/base/test_plan_density.py",
    ),
    Mutant(
        "moh-density-of-padding", "attnzoo/variants/moh/records.py",
        old="extras = Extras(q_pos=self.form.dense_pos, key_bias=self.extras.key_bias)",
        new="extras = Extras(key_bias=self.extras.key_bias)",
        wrong="rows behind an item's last count as pairs that dense attention sees", tests="tests/attnzoo/base/test_plan_density.py",
    ),
    memo(
        "memo-origins-of-another", old="same and known is origin and", new="same and",
        wrong="calls with other origins share a plan", tests=f"{TESTS}/layouts/test_kept_plans.py",
    ),
    memo(
        "memo-without-packed-heads", old="        rule.packed,\n", new="", wrong="calls whose heads are packed otherwise share a plan",
    ),
    memo(
        "memo-without-causality", old="        rule.causal,\n", new="", wrong="causal calls and others share a plan",
    ),
    memo(
        "memo-outlives-its-layout", old="weakref.ref(lists.col, forget)", new="weakref.ref(lists.col)",
        wrong="what was made for a layout stays when that is gone",
    ),
    memo(
        "memo-one-for-all-builders", old="        build,\n", new="", wrong="a call gets what another function made of it",
    ),
    store(
        "store-oldest-stays", old="key=lambda item: item[0], reverse=True)", new="key=lambda item: item[0])",
        wrong="what was used last goes first",
    ),
    store(
        "store-not-touched", old="record.used = next(_clock)", new="pass", within="Shelf",
        wrong="what is asked for again and again counts as old",
    ),
    store(
        "store-huge-displaces-all", old="if size > _Budget.limit:", new="if size < 0:", within="Shelf",
        wrong="a value that is not kept displaces what was",
        survives="The walk from the newest on leaves out what does not fit and keeps the rest: only the time differs.",
    ),
    store(
        "store-views-counted-again", old="pieces[storage.data_ptr() if storage.nbytes() else id(value)]", new="pieces[id(value)]",
        wrong="memory that two tensors share counts twice",
    ),
    store(
        "store-growth-unseen", old="_Budget.room -= size", new="pass", wrong="nothing is ever made room for",
    ),
    store(
        "store-later-parts-unseen", old='getattr(value, "__dict__", None) or {', new="{",
        wrong="what a dataclass has computed of itself is not counted",
        survives="All that is remembered keeps its later parts in fields; the rest is a slice.",
    ),
    store(
        "store-keywords-ignored", old="key = (args, tuple(sorted(kwargs.items())))", new="key = (args, ())",
        wrong="results are remembered without their keywords",
    ),
    flex_rule(
        "flex-rule-absent-rows-seen", old="return (at - slots).abs(), allowed & (at >= 0) if given else allowed",
        new="return (at - slots).abs(), allowed", wrong="rows that see nothing get a rule by which they see",
        survives="Positions that are given are never negative, or are read with causality, which leaves such rows nothing.",
    ),
    flex_rule(
        "flex-rule-full-blocks-unchecked", old="fits &= (last <= least) if causal else torch.ones_like(fits)", new="pass",
        wrong="blocks that are shown whole get a causal rule that hides half of them",
    ),
    flex_rule(
        "flex-rule-last-of-full-blocks", old="((col + 1) * block_k).clamp(max=seq_k) - 1, \"amax\")",
        new="(col * block_k).clamp(max=seq_k) - 1, \"amax\")", wrong="the last slot of a whole block is its neighbour's",
    ),
    flex_rule(
        "flex-rule-window-off-by-one", old="(distance >= window)", new="(distance > window)",
        wrong="a window that lacks a slot that the mask shows is taken",
    ),
    tracing(
        "tracing-other-sizes-pass", old="if list(x.shape) != list(size):", new="if x.dim() != len(size):",
        wrong="a trace runs at lengths that it was not made for",
    ),
    tracing(
        "tracing-named-not-held", old="named = {key: _held_to_size(name, x) for key, x in kwargs.items()}", new="named = kwargs",
        wrong="tensors given by name are not held to their sizes",
    ),
    tracing(
        "tracing-stays-off", old="_c._set_tracing_state(state)", new="pass", wrong="after a size was read nothing more is traced",
    ),
    tracing(
        "tracing-sizes-seen", old="    Tensor.size,\n", new="", wrong="size() is a tensor while torch traces",
    ),
    op(
        "op-tangent-of-bias", old="_refuse_transforms((q, k, v, extras.key_bias, ", new="_refuse_transforms((q, k, v, ",
        wrong="a tangent of the bias gets lost",
    ),
    op(
        "op-tangent-of-aux", old="*(extras.aux or ()), extras.gate))", new="extras.gate))",
        wrong="a tangent of auxiliary channels gets lost",
    ),
    op(
        "op-tangent-of-gate", old="*(extras.aux or ()), extras.gate))", new="*(extras.aux or ())))",
        wrong="a tangent of gate keys gets lost",
    ),
    checks(
        "checks-tangent-of-constants", old="if forward_ad.unpack_dual(x).tangent is not None:", new="if False:",
        wrong="a tangent of a rotary table gets lost",
    ),
    checks(
        "checks-origin-just-off", old="int(listed.max()) < positions)", new="int(listed.max()) <= positions)",
        wrong="an origin just behind the table is read",
    ),
    checks(
        "checks-origin-before", old="int(listed.min()) >= 0 and", new="True and", wrong="an origin of -1 is read",
    ),
    checks(
        "checks-origin-of-nobody", old="listed = layout.origin[listed_indices(distinct_lists(layout.lists)[1])[1]]",
        new="listed = layout.origin", wrong="what stands behind the lists has to be on the table",
    ),
    schedule(
        "schedule-late-limits-of-row", old="self.source[part.rows]", new="part.rows",
        wrong="limits made chunk by chunk are another head's",
    ),
    schedule(
        "schedule-late-limits-of-first-blocks", old="part.cols[:, part.cols.shape[1] - part.partial :])",
        new="part.cols[:, : part.partial])", wrong="limits made chunk by chunk are those of blocks seen whole",
    ),
    schedule(
        "schedule-limits-never-kept", old="if not call.rule.is_static and sum(sizes)", new="if sum(sizes)",
        wrong="what serves later calls is made anew for each",
    ),
    schedule(
        "schedule-limits-all-at-once", old="> MOST_LIMITS", new="> MOST_LIMITS * 0 + 2**62",
        wrong="a single long call makes all its limits at once",
    ),
    unseen(
        "gates-own-block-of-first-item", f"{FOLDER}/cpu/schedule.py",
        old="at_batch = head // heads if batch > 1 else torch.zeros_like(head)", new="at_batch = torch.zeros_like(head)",
        wrong="a gate's own block is that of the first item's position",
    ),
    unseen(
        "gates-own-block-of-first-head", f"{FOLDER}/cpu/schedule.py",
        old="at_head = head % heads if pos_heads > 1 else torch.zeros_like(head)", new="at_head = torch.zeros_like(head)",
        wrong="a gate's own block is that of the first head's position",
    ),
    Mutant(
        "gradients-of-vanished-blocks", f"{FOLDER}/blocks/gates.py", old="change.masked_fill_(outer == 0, 0.0)", new="pass",
        wrong="a NaN in one block reaches the gradients of blocks that have vanished",
        tests=f"{TESTS}/cpu/test_nonfinite.py -k 'blocked and (landmarks or gate or all)'",
    ),
    unseen(
        "gradients-of-dead-rows", f"{FOLDER}/cpu/blocked.py",
        old="dlse_rows = None if dlse_rows is None else dlse_rows.masked_fill(chunk.dead, 0.0)", new="pass",
        wrong="what the log-sum-exp of a row that sees nothing is told comes into its products",
        survives="Results that are no numbers are computed again with care, which zeroes it: only the time differs.",
    ),
    Mutant(
        "aux-hidden-keys", f"{FOLDER}/cpu/blocked.py", old='dq_aux = multiply("dq_aux"', new='dq_aux = product("dq_aux"',
        wrong="a NaN in a hidden slot's auxiliary channels reaches the gradients of queries beside clean keys",
        tests=f"{TESTS}/cpu/test_nonfinite.py -k 'blocked and aux'",
    ),
    Mutant(
        "aux-hidden-queries", f"{FOLDER}/cpu/blocked.py", old='dk_aux = multiply("dk_aux"', new='dk_aux = product("dk_aux"',
        wrong="a NaN in an absent row's auxiliary channels reaches the gradients of keys",
        tests=f"{TESTS}/cpu/test_nonfinite.py -k 'blocked and aux'",
    ),
    Mutant(
        "keys-hidden-beside-aux", f"{FOLDER}/cpu/blocked.py", old='dq = multiply("dq", dscores, chunk.k', new='dq = product("dq", dscores, chunk.k',
        wrong="a NaN in a hidden key reaches the gradients of queries beside clean channels",
        tests=f"{TESTS}/cpu/test_nonfinite.py -k 'blocked and aux'",
    ),
    Mutant(
        "reference-aux-hidden-keys", f"{FOLDER}/reference.py",
        old="scores = scores + _where_seen(q_aux.to(acc), k_aux, lambda q, k: torch.matmul(q, k.transpose(-1, -2)))",
        new="scores = scores + torch.matmul(q_aux.to(acc), k_aux.transpose(-1, -2))",
        wrong="a NaN in hidden auxiliary channels reaches gradients in the reference",
        tests=f"{TESTS}/cpu/test_nonfinite.py -k 'reference and aux'",
    ),
    Mutant(
        "dispatch-unused-gpu-always-told", f"{FOLDER}/dispatch.py",
        old='_warn_once(f"{reason}; the blocked implementation runs instead")',
        new='warn_caller(f"{reason}; the blocked implementation runs instead", RuntimeWarning)',
        wrong="every call on a GPU that is not used warns", within="choose", tests=f"{TESTS}/test_dispatch.py -k told",
    ),
)  # fmt: skip
