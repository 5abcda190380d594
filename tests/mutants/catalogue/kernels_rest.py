"""Of the operation: what stands round the arithmetic, from sharding and dispatch to the counting of pairs."""

from __future__ import annotations

from functools import partial

from tests.mutants.record import Mutant

FOLDER, TESTS = "kernels/attnzoo_kernels", "tests/attnzoo_kernels"
merge = partial(Mutant, file=f"{FOLDER}/merge.py", tests=f"{TESTS}/test_merge.py")
sharding = partial(Mutant, file=f"{FOLDER}/sharding.py", tests=f"{TESTS}/test_sharding.py")
dispatch = partial(Mutant, file=f"{FOLDER}/dispatch.py", tests=f"{TESTS}/test_dispatch.py")
flash = partial(Mutant, file=f"{FOLDER}/cpu/flash.py")
workspace = partial(Mutant, file=f"{FOLDER}/runtime/workspace.py", tests=f"{TESTS}/runtime/test_workspace.py")
flops = partial(Mutant, file=f"{FOLDER}/flops.py", tests=f"{TESTS}/op/test_tools.py -k flop")
density = partial(Mutant, file=f"{FOLDER}/layouts/density.py", tests=f"{TESTS}/layouts/test_density.py")
memo = partial(Mutant, file=f"{FOLDER}/layouts/memo.py", tests=f"{TESTS}/layouts/test_kept_plans.py")
registration = partial(
    Mutant,
    file=f"{FOLDER}/registration.py",
    tests=f"{TESTS}/op/test_composability.py -k 'vmap or meta or second or derivatives or checkpoint'",
)
op = partial(Mutant, file=f"{FOLDER}/op.py", tests=f"{TESTS}/op/test_surface.py")

MUTANTS = (
    merge(
        "merge-empty-lse", old="live, shift + torch.log(total), -torch.inf", new="live, shift + torch.log(total), 0.0",
        wrong="a row that is empty everywhere gets lse 0",
    ),
    merge(
        "merge-shift-lost", old="shift + torch.log(total)", new="torch.log(total)",
        wrong="the joined lse lacks the largest of the parts",
    ),
    merge(
        "merge-nan-is-empty", old="live = peak != -torch.inf", new="live = peak > -torch.inf",
        wrong="a row of NaN is taken for an empty one",
    ),
    merge(
        "merge-in-low-precision", old="out.to(weights.dtype) for out in outs", new="out for out in outs",
        wrong="half-precision parts are weighed before they are widened",
        survives="torch promotes the product of fp32 weights and half-precision parts by itself: the same numbers.",
    ),
    merge(
        "merge-peak-of-last", old="stacked.detach().amax(0)", new="stacked.detach()[-1]",
        wrong="the shift is the last part's, not the largest: large parts overflow",
    ),
    sharding(
        "sharding-origins-lost", old="layout.col, layout.origin)", new="layout.col, None)",
        wrong="origins are lost where tensors are distributed",
    ),
    sharding(
        "sharding-window-by-head-whole", old='_BY_HEAD_ALONE = ("window", "sink", "gate_mix")',
        new='_BY_HEAD_ALONE = ("window", "sink")', wrong="the mixes [H] of gates are cut as if they had a batch",
    ),
    sharding(
        "sharding-by-head-not-cut", old="shift=1 if name in _BY_HEAD_ALONE else 0", new="shift=0",
        wrong="windows and sinks [H] are cut by items instead of by heads",
    ),
    sharding(
        "sharding-shared-gradient", old='for name in ("key_bias", "aux", "gate"):', new='for name in ("aux", "gate"):',
        wrong="each process gets a part of the gradient of a shared bias, silently",
    ),
    sharding(
        "sharding-shared-gradient-of-pairs", old="for x in value if isinstance(value, tuple) else (value,):",
        new="for x in (value,):", wrong="the gradients of shared auxiliary channels are not refused",
    ),
    sharding(
        "sharding-first-coordinate", old="mesh.get_coordinate()[axis]", new="mesh.get_coordinate()[0]",
        wrong="on a mesh of two axes all cuts go by the first",
    ),
    sharding(
        "sharding-mesh-size", old="parts = mesh.size(axis)", new="parts = mesh.size(0)",
        wrong="on a mesh of two axes all parts are as many as along the first",
    ),
    sharding(
        "sharding-uneven", old="if any(x.shape[placement.dim] % parts for x in tensors):",
        new="if tensors[0].shape[placement.dim] % parts:", wrong="keys that do not split evenly are not refused",
        tests=f"{TESTS}/test_sharding.py -k placements",
    ),
    sharding(
        "sharding-layout-items", old="_cut(layout.start, cuts), _cut(layout.count, cuts)",
        new="_cut(layout.start, cuts), layout.count", wrong="starts are cut and counts are not",
    ),
    sharding(
        "sharding-size-one-cut", old="if at >= 0 and x.shape[at] > 1:", new="if at >= 0:",
        wrong="what all share (size 1) is cut to nothing in all processes but the first",
    ),
    sharding(
        "sharding-distributed-extras-whole", old="return value.to_local()", new="return value.full_tensor()",
        wrong="distributed extras are gathered and then do not fit",
    ),
    sharding(
        "sharding-placements-not-compared", old="and x.placements == q.placements for x", new="for x",
        wrong="keys that are placed otherwise than the queries are taken",
    ),
    dispatch(
        "dispatch-failure-for-all-dtypes", old="return (call.q.device, call.q.dtype, *sizes",
        new="return (call.q.device, *sizes", wrong="one dtype's kernel failure counts for all",
    ),
    dispatch(
        "dispatch-failure-for-all-widths", old="sizes = (call.q.shape[3], call.v.shape[3],",
        new="sizes = (call.q.shape[3],", wrong="a failure counts for values of every width",
    ),
    dispatch(
        "dispatch-failure-for-all-ratios", old=", call.q.shape[1] // call.k.shape[1])", new=")",
        wrong="a failure counts for every number of heads in a group",
    ),
    dispatch(
        "dispatch-failure-with-and-without-bias", old="call.origins is None, call.key_bias is None)",
        new="call.origins is None)", wrong="a failure with a bias counts for calls without one",
    ),
    dispatch(
        "dispatch-failure-forgotten", old="_failed[_kind(call)] = error.reasons[0]", new="pass",
        wrong="a kernel that fails is tried again at every call",
    ),
    dispatch(
        "dispatch-warns-always", old="_warned.add(reason)", new="pass", wrong="a warning at every call",
    ),
    dispatch(
        "dispatch-named-falls-back", old='if impl == "triton":\n        raise error', new='if impl == "never":\n        raise error',
        wrong="a kernel that was asked for by name falls back without an error",
    ),
    dispatch(
        "dispatch-rocm-by-capability", old="torch.version.hip is None and ", new="",
        wrong="ROCm devices are judged by a CUDA capability",
    ),
    dispatch(
        "dispatch-oldest", old="OLDEST = (8, 0)", new="OLDEST = (7, 0)", wrong="devices before Ampere are accepted",
    ),
    dispatch(
        "dispatch-fp64-on-gpu", old="call.q.dtype == torch.float64", new="call.q.dtype == torch.float16",
        wrong="fp64 runs on kernels that compute in fp32",
    ),
    dispatch(
        "dispatch-lse-where-not-needed", old="lse if need_lse or lse.numel() == 0 else lse.new_empty(0)", new="lse",
        wrong="the kernels' lse comes back where the op promised an empty one",
    ),
    flash(
        "flash-gradients-nobody-wanted", file="kernels/attnzoo_kernels/cpu/path.py", old="*(grad if needed else None for grad, needed in zip(grads, need, strict=False)),",
        new="*grads,", wrong="the fused backward gives gradients that nobody asked for",
        tests=f"{TESTS}/test_dispatch.py -k fused",
    ),
    flash(
        "flash-without-dlse", old="    if dlse:\n", new="    if False:\n",
        wrong="the gradient of lse is dropped where the fused kernel takes the backward",
        tests=f"{TESTS}/cpu/test_flash.py -k log_sum_exp",
    ),
    dispatch(
        "dispatch-forced-path-falls-back", old="elif impl in PATH_NAMES and path is paths[0]:", new="elif False:",
        wrong="a path that is forced and has reasons leaves the call to the next without an error",
        tests=f"{TESTS}/cpu/test_paths.py -k raises",
    ),
    dispatch(
        "dispatch-forced-path-not-first", old="PATHS[PATH_NAMES.index(impl) :] if", new="PATHS if",
        wrong="a forced path is asked after those before it", tests=f"{TESTS}/cpu/test_paths.py -k forced",
    ),
    dispatch(
        "dispatch-results-not-kept", old='return chosen == "triton" or any(', new="return any(",
        wrong="the kernels' backward finds no results of the forward",
    ),
    workspace(
        "workspace-one-name", old="_shelf.kept.get((name, dtype))", new='_shelf.kept.get(("", dtype))',
        wrong="nothing is ever found again: fresh memory at every call",
    ),
    workspace(
        "workspace-shared-by-names", old="_shelf.kept[(name, dtype)] = kept",
        new="_shelf.kept.update({(n, dtype): kept for n in ('a', 'b', name)})", wrong="two names share memory",
    ),
    workspace(
        "workspace-shared-by-threads", old="class _Shelf(threading.local):", new="class _Shelf:",
        wrong="threads compute in each other's memory",
    ),
    workspace(
        "workspace-inference-memory", old="with torch.inference_mode(False):", new="if True:",
        wrong="memory from inference mode breaks the next training step",
    ),
    workspace(
        "workspace-cap-in-elements", old="size * dtype.itemsize > CAP_BYTES", new="size > CAP_BYTES",
        wrong="the cap counts elements, not bytes",
    ),
    workspace(
        "workspace-never-grows", old="if kept is None or kept.numel() < size:", new="if kept is None:",
        wrong="a larger request after a smaller one fails",
    ),
    workspace(
        "workspace-kept-off-cpu", old='device.type != "cpu" or ', new="", wrong="other devices get CPU memory",
    ),
    workspace(
        "workspace-not-freed", old="_shelf.kept.clear()", new="_shelf.kept.copy()", wrong="clearing frees nothing",
        within="clear_scratch",
    ),
    flops(
        "flops-one-product", old="return 2 * (q.shape[3] + v.shape[3])", new="return 2 * v.shape[3]",
        wrong="the forward counts one of its two products",
    ),
    flops(
        "flops-backward-without-recompute", old="3 * q.shape[3] + 2 * v.shape[3]", new="2 * q.shape[3] + 2 * v.shape[3]",
        wrong="the backward's recomputed scores are not counted",
    ),
    flops(
        "flops-shared-lists-once", old="entries * shared * math.prod(blocks)", new="entries * math.prod(blocks)",
        wrong="a list that heads share is counted once",
    ),
    flops(
        "flops-running-counter", old="mode.counter.flop_registry.update(counter.flop_registry)", new="pass",
        wrong="a counter that runs already counts nothing of the first call",
    ),
    density(
        "density-sink-twice", old="joined = (lo >= hi) | (sink >= lo)", new="joined = lo >= hi",
        wrong="sink keys inside the window are counted twice",
    ),
    density(
        "density-heads-that-differ", old="heads if call.rule.is_per_head or len(sizes) > 2 else max(sizes)",
        new="max(sizes)", wrong="heads that differ in windows are counted as one",
    ),
    density(
        "density-landmark-counts", old="alive & (slot % call.block_k != call.block_k - 1)", new="alive",
        wrong="landmarks count as pairs",
    ),
    density(
        "density-own-twice", old="is_listed & ~is_counted & (pos >= 0)", new="is_listed & (pos >= 0)",
        wrong="a row's own block is counted twice where its landmark is seen",
    ),
    density(
        "density-bias-by-remainder", old=".long()).repeat_interleave(src_heads // bias.shape[1], 1)",
        new=".long()).repeat(1, src_heads // bias.shape[1], 1)",
        wrong="a bias by group goes to heads by remainder in the dense call",
        tests=f"{TESTS}/layouts/test_density.py {TESTS}/op/test_surface.py",
    ),
    density(
        "density-dense-with-window", old="_, end = rule.span(pos, None, seq_k)",
        new="_, end = rule.span(pos, rule.window, seq_k)", within="_dense_pairs",
        wrong="the dense call it is compared with has a window too",
    ),
    memo(
        "memo-without-sink", old="        rule.sink,\n", new="", wrong="calls that differ in the sink share a plan",
    ),
    memo(
        "memo-without-shape", old="        *call.shape,\n", new="        *call.shape[3:],\n",
        wrong="calls that differ in batch or heads share a plan",
    ),
    memo(
        "memo-without-window", old="        rule.window,\n", new="", wrong="calls that differ in the window share a plan",
    ),
    memo(
        "memo-stale-lists", old="known is origin and self.versions == _versions(lists, origin)", new="known is origin",
        wrong="lists that were written to keep their old plan",
    ),
    memo(
        "memo-of-tensors", old="if not call.rule.is_static:", new="if call.rule.q_pos is not None:",
        wrong="windows in tensors are remembered by identity",
    ),
    registration(
        "registration-saves-inference-tensors", old="x.clone() if x is not None and x.is_inference() else x",
        new="x", wrong="a layout made in inference mode cannot be trained with",
        tests=f"{TESTS}/op/test_state.py -k inference",
    ),
    registration(
        "registration-batched-lists", old="x.repeat(size, 1, 1) for x in (start, count)",
        new="x.repeat_interleave(size, 0) for x in (start, count)",
        wrong="vmap gives items each other's layouts",
    ),
    registration(
        "registration-second-derivative", old="if _differentiable(args[: _COUNT + 4]):", new="if False:",
        wrong="a second derivative is silently zero",
    ),
    registration(
        "registration-fake-lse-dtype", old="acc = torch.float64 if q.dtype == torch.float64 else torch.float32",
        new="acc = torch.float32", wrong="the meta function promises the wrong dtype of lse",
        tests=f"{TESTS}/op/test_composability.py -k 'meta or forward_op'",
    ),
    registration(
        "registration-lse-gradient", old="dlse = dlse if ctx.need_lse else None", new="dlse = None",
        wrong="the gradient of lse is dropped", tests=f"{TESTS}/op/test_agreement.py -k alone",
    ),
    registration(
        "registration-autocast-inside", file=f"{FOLDER}/runtime/autocast.py", old="torch.autocast(device, enabled=False)", new="torch.autocast(device)",
        wrong="scores and accumulators are rounded by autocast",
        tests=f"{TESTS}/op/test_state.py {TESTS}/op/test_agreement.py -k 'autocast or dtype_goes'",
    ),
    registration(
        "registration-sink-tensor-lost", old="sink_size if sink is None else sink", new="sink_size",
        wrong="sinks by head are lost between op and kernel", tests=f"{TESTS}/op/test_metamorphic.py -k one_number",
    ),
    op(
        "op-scale-of-values", old="q.shape[3] ** -0.5", new="v.shape[3] ** -0.5",
        wrong="the default scale is that of the values' width",
    ),
    op(
        "op-autocast-doubles", file=f"{FOLDER}/runtime/autocast.py",
        old="x if x.dtype == torch.float64 else x.to(", new="x.to(",
        wrong="autocast rounds double precision", tests=f"{TESTS}/op/test_state.py -k autocast",
    ),
    op(
        "autocast-mixed-doubles", file=f"{FOLDER}/checks.py",
        old="and all(x.dtype != torch.float64 for x in tensors)", new="",
        wrong="autocast takes doubles beside singles, which it will not bring to one dtype", tests=f"{TESTS}/op/test_state.py -k autocast",
    ),
    op(
        "autocast-mixed-refused", file=f"{FOLDER}/checks.py",
        old="    return autocasts(tensors[0].device.type) and", new="    return False and",
        wrong="autocast does not bring queries, keys and values to one dtype", tests=f"{TESTS}/op/test_state.py -k autocast",
    ),
    op(
        "op-rope-without-origin", old='extras.precision == "fast",', new="True,",
        wrong="precise calls round their scores",
    ),
    op(
        "op-reasons-of-auto", old="reasons = reasons_against(impl, call, need_lse=need_lse)", new="reasons = ()",
        wrong="a named implementation that cannot run is not refused", tests=f"{TESTS}/op/test_errors.py -k 'triton_on or no_reason'",
    ),
    op(
        "op-groups-of-layout", old="groups = layout.start.shape[1]", new="groups = 1",
        wrong="pairs of layouts that differ by group are counted with one KV head",
        survives="heads are counted from the layout's own lists; the number of KV heads of the empty keys plays no part.",
    ),
)  # fmt: skip
