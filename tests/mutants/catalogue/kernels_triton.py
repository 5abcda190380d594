"""Of the Triton kernels and what starts them; the probes are those of the mutants that patch them in place."""

from __future__ import annotations

from functools import partial

from tests.mutants.record import Mutant

FOLDER, TESTS = "kernels/attnzoo_kernels/_triton", "tests/attnzoo_kernels"
PROBES = f"{TESTS}/triton/test_mutants.py -k pass_every_probe"
tiles = partial(Mutant, file=f"{FOLDER}/primitives.py", tests=PROBES)
forward = partial(Mutant, file=f"{FOLDER}/forward.py", tests=PROBES)
backward = partial(Mutant, file=f"{FOLDER}/backward.py", tests=PROBES)
plan = partial(Mutant, file=f"{FOLDER}/block_lists.py", tests=PROBES)
launch = partial(Mutant, file=f"{FOLDER}/launch.py", tests=PROBES)
specialize = partial(Mutant, file=f"{FOLDER}/specialize.py", tests=PROBES)
config = partial(Mutant, file=f"{FOLDER}/tile_table.py", tests=f"{TESTS}/triton/test_tile_table.py")

MUTANTS = (
    tiles(
        "triton-group-of-head", old="index = index * groups + h // c.PER", new="index = index * groups + h % c.PER",
        wrong="lists of groups are found by remainder",
    ),
    tiles(
        "triton-sink-later", old="keep = keep | (s < kept(rows.sink, AXIS))", new="keep = keep | (s <= kept(rows.sink, AXIS))",
        wrong="the sink has one key more",
    ),
    tiles(
        "triton-gate-shift", old="shift = tl.where(own, 0.0, mix * (logit - lse))", new="shift = tl.where(own, 0.0, (1.0 - mix) * (logit - lse))",
        wrong="the gate's share and the block's are swapped",
    ),
    tiles(
        "triton-own-truncates", old="tl.where(pos < 0, -1, pos // c.BLOCK_K)", new="pos // c.BLOCK_K",
        wrong="rows before the first slot own the first block",
        tests=f"{TESTS}/triton/test_switches.py -k gates_of_every",
    ),
    tiles(
        "triton-partner", old="tl.where(d < c.ROTARY, d + c.ROTARY,", new="tl.where(d < c.ROTARY, d + c.ROTARY - 1,",
        wrong="planes pair the wrong dimensions",
    ),
    forward(
        "triton-last-block-short", old="tl.minimum(tl.maximum(block, 0), blocks_k - 1)", new="tl.minimum(tl.maximum(block, 0), blocks_k - 2)",
        wrong="the last key block is never read",
    ),
    forward(
        "triton-alpha-of-values", old="state.acc * alpha[:, None], c)", new="state.acc, c)", wrong="values so far are not rescaled as the maximum rises",
    ),
    forward(
        "triton-heads-of-a-pack", old="return b, h // c.PER, h, m, part, index + m", new="return b, h // c.PACK_GQA, h, m, part, index + m",
        wrong="keys are those of the pack instead of the group",
    ),
    forward(
        "triton-join-lse", old="m_i + tl.log2(l_i) * LN2", new="m_i + tl.log2(l_i)", wrong="the joined lse mixes bases",
    ),
    backward(
        "triton-delta-of-lse", old="change -= tl.load(dlse + row", new="change += tl.load(dlse + row", wrong="the gradient of lse has the wrong sign",
    ),
    backward(
        "triton-aux-unscaled", old="store_rows(dq_aux, dq_aux_acc * natural", new="store_rows(dq_aux, dq_aux_acc", wrong="gradients of auxiliary queries lack the scale",
    ),
    backward(
        "triton-bias-of-last-pack", old="dbias_acc += tl.sum(ds, 1)", new="dbias_acc = tl.sum(ds, 1)", wrong="the gradient of the bias is that of the last tile of rows",
    ),
    backward(
        "triton-dead-rows-in-keys", old="keep = visible(first, within, rows, 0, c) & live[None, :]", new="keep = visible(first, within, rows, 0, c)",
        wrong="rows that see nothing reach the gradients of keys",
        tests=f"{TESTS}/triton/test_mutants.py -k 'pass_every_probe and (absent or bias)'",
        survives="such a row's lse is taken for 0 and its queries and gradients are loaded as zeros: it adds zeros.",
    ),
    plan(
        "triton-plan-full-and-partial", old="torch.where(full, 0, 1)", new="torch.where(full, 1, 0)", wrong="partial blocks go without a mask",
    ),
    plan(
        "triton-plan-transposed-origins", old="keys = _sorted(column, state, there, (batch, heads, blocks_k), (entries.row % blocks_q, origin))",
        new="keys = _sorted(column, state, there, (batch, heads, blocks_k), (entries.row % blocks_q, None if origin is None else origin.flip(0)))",
        wrong="transposed lists have other entries' origins",
    ),
    plan(
        "triton-plan-order", old="descending=True, stable=True)", new="descending=False, stable=True)", wrong="the shortest lists are started first",
        survives="the order in which programs start changes no number; that it is quicker is shown on GPUs alone.",
    ),
    specialize(
        "triton-specialize-window-tensor", old="window = call.rule.window if isinstance(call.rule.window, int) else 1", new="window = 1",
        wrong="one window for all heads is taken for 1",
    ),
    launch(
        "triton-launch-gradient-dtype", old="return x.to(like.dtype)", new="return x", wrong="gradients have the accumulator's dtype",
        tests=f"{TESTS}/triton/test_agreement.py -k 'mean_error'",
        survives="autograd casts a gradient to its input's dtype by itself.",
    ),
    launch(
        "triton-launch-shared-gradient", old="x = x.sum_to_size(like.shape)", new="x = x[:1].sum_to_size(like.shape)",
        wrong="the gradient of what items share is that of the first", tests=f"{TESTS}/triton/test_agreement.py -k 'bias_alone'",
    ),
    specialize(
        "triton-specialize-raising", old='"RAISING": call.scale > LEAST_RAISING and', new='"RAISING": call.scale != 0 and', wrong="with a negative scale the maximum is the minimum",
        tests=f"{TESTS}/triton/test_switches.py -k below_zero",
    ),
    launch(
        "triton-launch-empty", old="return out.zero_().to(dtype), lse.fill_(-torch.inf)", new="return out.to(dtype), lse.fill_(-torch.inf)",
        wrong="calls without keys give what memory held", tests=f"{TESTS}/triton/test_agreement.py -k nothing_in {TESTS}/triton/test_tile_table.py",
    ),
    config(
        "triton-config-padded", old="max(16, 1 << (width - 1).bit_length())", new="max(16, 1 << width.bit_length())", wrong="powers of two are padded to the next",
    ),
    config(
        "triton-config-bytes", old="min(max(size, 2), 4)", new="min(size, 4)", wrong="one-byte values have no tiles",
    ),
    config(
        "triton-config-consumer", old='"sm_80" if (major, minor) == (8, 0) else "sm_89"', new='"sm_80" if major == 8 else "sm_89"',
        wrong="consumer chips get tiles that their memory does not hold",
    ),
    config(
        "triton-config-unknown", old='every.get(architecture, every["default"])', new='every[architecture]', wrong="an architecture without a table is an error",
    ),
)  # fmt: skip
