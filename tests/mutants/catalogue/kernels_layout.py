"""Of layouts: how they are built, drawn, exchanged with FlexAttention; and the checks of the operation's arguments."""

from __future__ import annotations

from functools import partial

from tests.mutants.record import Mutant

FOLDER, TESTS = "kernels/attnzoo_kernels", "tests/attnzoo_kernels"
build = partial(
    Mutant,
    file=f"{FOLDER}/layouts/build.py",
    tests=f"{TESTS}/layouts/test_layout.py -k 'window or strided or mask or indices'",
)
layout = partial(Mutant, file=f"{FOLDER}/layouts/layout.py", tests=f"{TESTS}/layouts/test_layout.py")
flex = partial(Mutant, file=f"{FOLDER}/layouts/flex.py", tests=f"{TESTS}/layouts/test_flex.py")
picture = partial(Mutant, file=f"{FOLDER}/layouts/picture.py", tests=f"{TESTS}/layouts/test_layout.py -k print")
checks = partial(Mutant, file=f"{FOLDER}/checks.py", tests=f"{TESTS}/op/test_errors.py")

MUTANTS = (
    build(
        "build-window-back", old="    back = window - 1\n", new="    back = window\n",
        wrong="a window reaches one slot too far back and lists a block too many",
    ),
    build(
        "build-window-width", old="max(seq_k, 1) - 1) // block_k + 2", new="max(seq_k, 1) - 1) // block_k + 1",
        wrong="a window that begins inside a block misses its last block",
    ),
    build(
        "build-sink-twice", old="beside = (sinks < low) & (high >= 0) if causal", new="beside = (sinks <= low) & (high >= 0) if causal",
        wrong="a sink block at the window's edge is listed twice", tests=f"{TESTS}/layouts/test_layout_moves.py",
    ),
    build(
        "build-stride-shift", old="(block + moved) % stride == 0", new="(block - moved) % stride == 0",
        wrong="strided heads shift the other way",
    ),
    build(
        "build-local", old="first_own - block < local", new="first_own - block <= local", wrong="one local block too many",
    ),
    build(
        "build-future", old="keep & (block <= own)", new="keep", wrong="dense and strided heads list blocks of the future",
    ),
    build(
        "build-index-order", old="torch.argsort((index < 0).to(torch.uint8), dim=-1, stable=True)",
        new="torch.argsort((index >= 0).to(torch.uint8), dim=-1, stable=True)", wrong="holes come first and are read",
    ),
    build(
        "build-origin-order", old="origin.gather(-1, order).to(torch.int32)", new="origin.to(torch.int32)",
        wrong="origins do not move with their blocks", tests=f"{TESTS}/layouts/test_layout.py -k origins",
    ),
    build(
        "build-compact-origin", old="origin = None if lists.origin is None else lists.origin[index]", new="origin = lists.origin",
        wrong="compacting leaves origins where they were", tests=f"{TESTS}/layouts/test_layout.py -k 'compact or origins'",
    ),
    build(
        "build-duplicates", old="bool((key[1:] == key[:-1]).any())", new="bool((key[2:] == key[:-2]).any())",
        wrong="a block may stand twice in a list", tests=f"{TESTS}/layouts/test_layout.py -k refused",
    ),
    build(
        "build-start-of-item", old="first_slot = first.view(-1, 1, 1, 1)", new="first_slot = first[:1].view(-1, 1, 1, 1)",
        wrong="all items begin where the first one does", tests=f"{TESTS}/layouts/test_layout.py -k each_item",
    ),
    layout(
        "layout-not-copied", old="value.detach().clone())", new="value.detach())",
        wrong="changing what a layout was made of changes the layout", tests=f"{TESTS}/op/test_state.py -k 'made_of'",
    ),
    layout(
        "layout-kv-rows", file=f"{FOLDER}/layouts/density.py", old="block_k).clamp(max=block_k)", new="block_k)",
        wrong="whole blocks count all rows up to the last", tests=f"{TESTS}/layouts/test_layout.py -k kv_rows",
    ),
    layout(
        "layout-to-origin", file=f"{FOLDER}/layouts/build.py",
        old="origin = None if lists.origin is None else lists.origin.to(device)", new="origin = None",
        wrong="moving a layout loses its origins", tests=f"{TESTS}/layouts/test_layout.py {TESTS}/layouts/test_layout_moves.py -k 'origin or moves'",
    ),
    layout(
        "layout-and-is-or", old="self._combine(other, torch.logical_and)", new="self._combine(other, torch.logical_or)",
        wrong="& reads what either reads", tests=f"{TESTS}/layouts/test_layout.py -k or_and",
    ),
    layout(
        "layout-density-full", old="layout_density(self.lists, self.sizes, causal=causal)",
        new="layout_density(self.lists, self.sizes, causal=True)",
        wrong="density is always that of the causal rule", tests=f"{TESTS}/layouts/test_layout.py -k density",
    ),
    Mutant(
        "layout-pytree-names", f"{FOLDER}/layouts/pytree.py", old="zip(NAMES, leaves", new='zip(("count", "start", "col", "origin"), leaves',
        within="_flatten_with_keys", wrong="a pytree names the lists' tensors wrongly", tests=f"{TESTS}/layouts/test_layout_moves.py",
    ),
    flex(
        "flex-causality", old="listed = listed & (s <= position)", new="listed = listed & (s < position)",
        wrong="FlexAttention is told to hide the own key",
    ),
    flex(
        "flex-positions-of-items", old="position = pos[b if at[2] else 0,", new="position = pos[0,",
        wrong="all items get the first one's positions inside FlexAttention's rule",
    ),
    flex(
        "flex-blocks-of-items", old="listed = keep[b if at[0] else 0,", new="listed = keep[0,",
        wrong="all items get the first one's blocks inside FlexAttention's rule",
    ),
    picture(
        "picture-more-heads", old="heads - MOST_HEADS} more heads", new="heads} more heads",
        wrong="the number of heads that are not drawn is that of all", tests=f"{TESTS}/layouts/test_layout_moves.py",
    ),
    picture(
        "picture-density", old="density {layout.density(causal=True):.3f}", new="density {layout.density(causal=False):.3f}",
        wrong="the printed density is not the causal one that it says", tests=f"{TESTS}/layouts/test_layout_moves.py",
    ),
    checks(
        "checks-heads-multiple", old="heads % groups != 0", new="groups % heads != 0", wrong="heads that do not fit KV heads are taken",
    ),
    checks(
        "checks-widest", old="MAX_WIDTH = 256", new="MAX_WIDTH = 512", wrong="heads wider than the kernels hold are taken",
    ),
    checks(
        "checks-aux-widths", old='expect("k_aux", k_aux, ((batch, 1), (*room.groups, 1), (seq_k,), widths)',
        new='expect("k_aux", k_aux, ((batch, 1), (*room.groups, 1), (seq_k,), tuple(k_aux.shape[3:]))',
        wrong="auxiliary queries and keys of different widths are taken",
    ),
    checks(
        "checks-origin-table", old="int(listed.max()) < positions", new="int(listed.max()) <= positions",
        wrong="an origin behind the table is taken", tests=f"{TESTS}/op/test_switches_torch.py -k origin",
    ),
    checks(
        "checks-rope-gradient", old='_check_constant(name, table, "a table")',
        new='_check_constant(name, table if name == "rope cos" else cos.detach(), "a table")',
        wrong="a rope table that wants a gradient gets none, silently", tests=f"{TESTS}/op/test_constants.py -k gradient",
    ),
)  # fmt: skip
