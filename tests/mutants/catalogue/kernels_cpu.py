"""Of the operation on CPUs: lists, schedules, packed heads, gathering, gates, row tiles and products; and of its meaning."""

from __future__ import annotations

from functools import partial

from tests.mutants.record import Mutant

FOLDER, TESTS = "kernels/attnzoo_kernels", "tests/attnzoo_kernels"
RIGHT = f"{TESTS}/test_mutants.py -k passes_every_check"
entries = partial(Mutant, file=f"{FOLDER}/layouts/entries.py", tests=RIGHT)
schedule = partial(Mutant, file=f"{FOLDER}/cpu/schedule.py", tests=RIGHT)
pack_gqa = partial(Mutant, file=f"{FOLDER}/cpu/pack_gqa.py", tests=RIGHT)
tiles = partial(Mutant, file=f"{FOLDER}/cpu/gather.py", tests=RIGHT)
gating = partial(Mutant, file=f"{FOLDER}/blocks/gates.py", tests=RIGHT)
scores = partial(Mutant, file=f"{FOLDER}/cpu/scores.py", tests=RIGHT)
rotating = partial(Mutant, file=f"{FOLDER}/blocks/rotation.py", tests=RIGHT)
blocked = partial(Mutant, file=f"{FOLDER}/cpu/blocked.py", tests=RIGHT)
rule = partial(Mutant, file=f"{FOLDER}/spec/token_rule.py", tests=RIGHT)
reference = partial(Mutant, file=f"{FOLDER}/reference.py", tests=RIGHT)
row_tiles = partial(Mutant, file=f"{FOLDER}/cpu/row_tiles.py", tests=f"{TESTS}/cpu/test_flash.py")
row_spans = partial(Mutant, file=f"{FOLDER}/layouts/row_spans.py", tests=f"{TESTS}/cpu/test_flash.py -k 'sink'")
fused = partial(Mutant, file=f"{FOLDER}/cpu/flash.py", tests=f"{TESTS}/cpu/test_flash.py")
half = partial(Mutant, file=f"{FOLDER}/cpu/bf16.py", tests=f"{TESTS}/cpu/test_bf16.py")

MUTANTS = (
    entries(
        "entries-layout-heads", old="x.long().repeat_interleave(repeat, 1)", new="x.long().repeat(1, repeat, 1)",
        wrong="layout heads go to query heads by remainder",
    ),
    entries(
        "entries-index", old="index = start[row] + within", new="index = (ends - count)[row] + within",
        wrong="lists are taken to lie one after the other without gaps",
    ),
    entries(
        "entries-ragged-tail", old=".clamp(max=max(seq_q - 1, 0))", new=".clamp(max=max(seq_q, 0))",
        wrong="rows behind the last have positions of their own, out of range",
    ),
    entries(
        "entries-full-without-window", old="((last <= lowest_hi) & in_window)", new="(last <= lowest_hi)",
        wrong="blocks that the window cuts below count as seen in full",
    ),
    entries(
        "entries-read-first-row", old="hi.amax(1)[entries.row]) & (last", new="hi.amin(1)[entries.row]) & (last",
        wrong="what only the later rows of a block see is not read",
    ),
    entries(
        "entries-sink-not-read", old="read |= first < sink.amax(1)[entries.row]", new="pass",
        wrong="sink blocks outside the window are not read",
    ),
    entries(
        "entries-short-block-full", old="full = (last - first == call.block_k) & ", new="full = ",
        wrong="a ragged last block counts as whole",
    ),
    schedule(
        "schedule-partial-first", old="torch.argsort(row * 2 + partial, stable=True)",
        new="torch.argsort(row * 2 + ~partial, stable=True)", wrong="partial blocks come first and the mask goes to the last",
    ),
    schedule(
        "schedule-limits-of-first-row", old="end.index_select(0, source)", new="end[:1]",
        wrong="all rows get the limits of the first",
    ),
    schedule(
        "schedule-chunk-origins", old="None if origin is None else origin[i], self.partial", new="None if origin is None else origin[0], self.partial",
        wrong="later chunks turn by the first chunk's origins", tests=f"{TESTS}/op/test_unseen.py",
    ),
    schedule(
        "schedule-chunk-limits", old="None if limits is None else limits[i]", new="None if limits is None else limits[0]",
        wrong="later chunks have the first chunk's limits",
    ),
    schedule(
        "schedule-positions-by-item", old="at_batch = head // heads if batch > 1", new="at_batch = head % batch if batch > 1",
        wrong="positions that differ by item go to the wrong ones", tests=f"{TESTS}/op/test_unseen.py",
    ),
    schedule(
        "schedule-sink-end", old="within(spans.sink) if has_sink else None", new="None",
        wrong="the limits of sinks are lost",
    ),
    schedule(
        "schedule-group-of-items", old="group = (head // heads) * groups + ", new="group = ",
        wrong="every item reads the first one's keys",
    ),
    schedule(
        "schedule-safe", old="(~sources.safe[origin]).long()", new="(sources.safe[origin]).long()",
        wrong="rows that may see nothing are taken for safe",
    ),
    pack_gqa(
        "pack-gqa-absent", old="packed, 1, absent=-1)", new="packed, 1, absent=0)",
        wrong="rows that fill a packed block stand at slot 0 instead of nowhere",
        tests=f"{TESTS}/op/test_unseen.py",
    ),
    pack_gqa(
        "pack-gqa-lists-by-head", old="call.start.shape[1] in (1, groups)", new="call.start.shape[1] >= 1",
        wrong="heads that read different blocks are packed together",
    ),
    pack_gqa(
        "pack-gqa-bias-by-head", old="bias is None or bias.shape[1] in (1, groups)", new="bias is None or bias.shape[1] >= 1",
        wrong="heads with different biases are packed together",
    ),
    pack_gqa(
        "pack-gqa-windows-by-head", old="and not call.rule.is_per_head", new="", wrong="heads with different windows are packed together",
    ),
    pack_gqa(
        "pack-gqa-mix-by-head", old="and (gate is None or not isinstance(gate.mix, Tensor))", new="",
        wrong="heads with different mixes are packed together", tests=f"{TESTS}/op/test_switches.py -k 'gates_of_every'",
    ),
    pack_gqa(
        "pack-gqa-heads-and-blocks-swapped", old=".expand(-1, -1, heads, -1, -1, -1).transpose(2, 3)", new=".expand(-1, -1, heads, -1, -1, -1)",
        wrong="rows are laid head by head instead of block by block",
    ),
    pack_gqa(
        "pack-gqa-tall-rows", old="* block // call.block_q", new="// call.block_q",
        wrong="shorter query blocks take the lists of the wrong tall ones", tests=f"{TESTS}/op/test_regressions.py -k tall",
    ),
    tiles(
        "tiles-tail-row", old="slot.clamp_(max=self.length - 1)", new="slot.clamp_(max=self.length)",
        wrong="a ragged block reads behind the tensor's end",
    ),
    tiles(
        "tiles-stride-of-heads", old="torch.arange(self.heads, device=x.device) * steps[1]", new="torch.arange(self.heads, device=x.device) * steps[2]",
        wrong="heads begin a row and not a head apart", tests=f"{TESTS}/op/test_agreement.py -k 'definition_in_double'",
    ),
    tiles(
        "tiles-view-offset", old="x.storage_offset() + offsets[0]", new="offsets[0]",
        wrong="views of slices begin at the start of the memory", tests=f"{TESTS}/op/test_surface.py",
    ),
    tiles(
        "tiles-view-converts", old="if x.dtype != self.dtype or x.numel() == 0", new="if x.numel() == 0",
        wrong="values that have to be converted are viewed as they are", tests=f"{TESTS}/op/test_in_place.py",
    ),
    gating(
        "gating-mix-swapped", old="mix * logits + (1 - mix) * total", new="(1 - mix) * logits + mix * total",
        wrong="the gate's share and the block's are swapped",
    ),
    gating(
        "gating-lse-of-inner", old="change += dlse", new="change -= dlse",
        wrong="the gradient of lse enters gated calls with the wrong sign",
    ),
    gating(
        "gating-empty-blocks", old="mixed.masked_fill_(empty, -torch.inf)", new="pass",
        wrong="a block without an ordinary key takes weight from the others", tests=f"{TESTS}/op/test_switches.py -k gates_of_every",
    ),
    gating(
        "gating-own-through-gate", old="torch.where(gated.own, 0.0, change * gated.mix)", new="change * gated.mix",
        wrong="the own block's gate gets a gradient",
    ),
    scores(
        "scores-sink-hidden", old="torch.maximum(out, other, out=out)", new="torch.minimum(out, other, out=out)",
        wrong="the sink hides instead of showing",
    ),
    scores(
        "scores-blocks-of-shared-heads", old="(head % heads) * source.heads // heads", new="(head % heads) % source.heads",
        wrong="a bias by group goes to heads by remainder", tests=f"{TESTS}/op/test_unseen.py",
    ),
    rotating(
        "scores-pairs-of-odd-widths", old="self.padded = self.full + self.full % 2", new="self.padded = self.full",
        wrong="origins at odd widths have no complex view", tests=f"{TESTS}/op/test_switches.py -k turn_any_width",
    ),
    blocked(
        "blocked-needs", old="k=zeros(need[1], keys", new="k=zeros(need[0], keys",
        wrong="keys get a gradient where queries want one", tests=f"{TESTS}/op/test_agreement.py -k asked_for",
    ),
    blocked(
        "blocked-bias-summed-over-keys", old="dscores.sum(1))", new="dscores.sum(1) * call.scale)",
        wrong="the gradient of the bias is scaled",
    ),
    blocked(
        "blocked-dead-dlse", old="None if dlse_rows is None else dlse_rows.masked_fill(chunk.dead, 0.0)", new="dlse_rows",
        wrong="the gradient of lse of rows that see nothing reaches keys", tests=f"{TESTS}/op/test_unseen.py",
        survives="a shortcut: gradients that are no numbers are computed again with care, which drops it",
    ),
    blocked(
        "blocked-gate-key-unscaled", old="multiply(\"dgate\", dgates.transpose(1, 2), chunk.q, scale=call.scale)",
        new="multiply(\"dgate\", dgates.transpose(1, 2), chunk.q, scale=1.0)", wrong="the gradient of gate keys lacks the scale",
    ),
    rule(
        "rule-window-ahead", old="unbounded if window is None else pos + window", new="unbounded if window is None else pos + window + 1",
        wrong="a window without causality ends one key late",
    ),
    rule(
        "rule-absent-sink", old="torch.where(pos < 0, 0, end) if self.q_pos is not None else end", new="end",
        wrong="absent rows without causality see the sink", tests=f"{TESTS}/op/test_agreement.py -k 'definition_in_double' {TESTS}/op/test_visibility.py",
    ),
    rule(
        "rule-sink-beyond-position", old="end = torch.minimum(end, pos + 1) if self.causal else end", new="end = end + 0",
        wrong="early rows see sink keys of the future",
    ),
    rule(
        "rule-per-head-positions", old="(self.q_pos is not None and self.q_pos.shape[1] > 1)", new="False",
        wrong="positions by head count as shared", tests=f"{TESTS}/op/test_unseen.py",
    ),
    rule(
        "rule-packed-tail", old=".clamp_(max=tokens - 1)", new=".clamp_(max=tokens)",
        wrong="rows behind the last see one key more, and a block counts as seen in full by fewer rows",
        survives="rows behind the last are cut off; that they stand one slot further costs a mask at most.",
    ),
    reference(
        "reference-bias-of-groups", old="bias.repeat_interleave(heads // bias.shape[1], 1)", new="bias.repeat(1, heads // bias.shape[1], 1)",
        wrong="a bias by group goes to heads by remainder", tests=f"{TESTS}/op/test_agreement.py -k 'definition_in_double'",
    ),
    reference(
        "reference-ragged-gate", old="(0, beyond)).unflatten(-1, (blocks_k, call.block_k))\n    if gate",
        new="(0, beyond), value=1).unflatten(-1, (blocks_k, call.block_k))\n    if gate",
        wrong="slots behind the last key count as seen in gated blocks",
    ),
    reference(
        "reference-spoilt-everywhere", old="torch.where(touched, clean + (spoilt - clean).detach(), clean)", new="clean",
        wrong="NaN values that a row reads do not show", tests=f"{TESTS}/op/test_surface.py",
    ),
    row_tiles(
        "row-tiles-window-begins", old="begin = highest + 1 if first < highest else first",
        new="begin = highest if first < highest else first",
        wrong="a range holds no slot of the row that begins last", tests=f"{TESTS}/cpu/test_key_ranges.py",
    ),
    row_tiles(
        "row-tiles-window-ends", old="end = least - 1 if least < last else last", new="end = least + 1 if least < last else last",
        wrong="the unmasked range ends behind what all rows see", tests=f"{TESTS}/cpu/test_key_ranges.py",
    ),
    row_tiles(
        "row-tiles-heads-of-a-group", old="x.unflatten(1, (-1, self.ratio))[:, self.groups, self.head]", new="x.unflatten(1, (self.ratio, -1))[:, self.head, self.groups]",
        wrong="query heads belong to KV heads by remainder", tests=f"{TESTS}/cpu/test_flash.py -k 'dense or runs'",
    ),
    row_tiles(
        "row-tiles-least-side", old="torch.where(live, lo, far), torch.where(live, -lo, far), torch.where(live, hi, far), torch.where(live, -hi, far)",
        new="torch.where(live, lo, far), torch.where(live, lo, far), torch.where(live, hi, far), torch.where(live, -hi, far)",
        wrong="where the last row begins is taken from the first", tests=f"{TESTS}/cpu/test_flash.py -k 'runs or cut'",
    ),
    row_tiles(
        "row-tiles-sink-of-all", old="sink=spans.sink if beside else 0", new="sink=spans.sink",
        wrong="rows whose window holds the sink see it twice", tests=f"{TESTS}/cpu/test_flash.py -k 'sink'",
    ),
    row_tiles(
        "row-tiles-no-triangle", old="KeyRange(end, last, causal=straight, early=not straight)", new="KeyRange(end, last, early=not straight)",
        wrong="rows behind a window see the tokens of their tile that follow them", tests=f"{TESTS}/cpu/test_flash.py -k 'sink'",
    ),
    row_tiles(
        "row-tiles-one-segment", old="if jumped or row > borders[-1] + 1:", new="if jumped:",
        wrong="rows before and behind a window's first move are taken for one course", tests=f"{TESTS}/cpu/test_flash.py -k 'sink or runs'",
    ),
    row_spans(
        "row-spans-window-that-meets-its-sink", old="lo = lo.masked_fill(meets, 0)", new="lo = lo.clone()",
        wrong="rows whose window reaches the sink see no more of it than the window does",
    ),
    row_spans(
        "row-spans-gap-behind-a-sink", old="joined = (sinks > 0) & ((count == 0) | (first == sink_last))", new="joined = sinks > 0",
        wrong="what lies between a sink's blocks and those of the window counts as listed",
    ),
    row_spans(
        "row-spans-sink-that-is-not-listed", old="torch.where(first > 0, 0, torch.minimum(end, last))", new="torch.minimum(end, last)",
        wrong="a sink that no list holds is read",
    ),
    row_spans(
        "row-tiles-runs-with-gaps", old="((last - first).clamp(min=0) == count)", new="((last - first).clamp(min=0) >= count)",
        wrong="lists with gaps are taken for runs", tests=f"{TESTS}/cpu/test_flash.py -k 'gap or other_calls'",
    ),
    fused(
        "fused-merge-share", old="(other[1] - one[1]).sigmoid_()", new="(one[1] - other[1]).sigmoid_()",
        wrong="two key ranges are weighed with each other's weights", tests=f"{TESTS}/cpu/test_flash.py -k 'runs'",
    ),
    fused(
        "fused-dead-lse", old="lse = lse.masked_fill(tiles.dead, torch.inf)", new="pass",
        wrong="rows that see nothing have weights in the backward", tests=f"{TESTS}/cpu/test_flash.py -k 'runs or nobody_sees'",
    ),
    fused(
        "fused-key-gradients-of-last-range", old="for x, grad in zip((total, total_k, total_v), grads, strict=True):\n                    x.add_(grad)",
        new="for x, grad in zip((total, total_k, total_v), grads, strict=True):\n                    x.copy_(grad)",
        wrong="each range's gradients replace those before", tests=f"{TESTS}/cpu/test_flash.py -k 'runs'",
    ),
    half(
        "half-mask-of-full-blocks", old="mask[..., :-hidden] = 0.0", new="pass",
        wrong="what scratch memory holds is added to scores of full blocks", tests=f"{TESTS}/cpu/test_bf16.py -k 'definition'",
    ),
    half(
        "half-not-finite", old="if bool(out.sum().isfinite()) else None", new="",
        wrong="what is hidden spoils results in bf16", tests=f"{TESTS}/cpu/test_bf16.py -k 'spoils'",
    ),
    half(
        "half-widths", old="if call.q.shape[3] != call.v.shape[3]:", new="if False:",
        wrong="values of another width are taken", tests=f"{TESTS}/cpu/test_bf16.py -k 'otherwise or definition'",
    ),
)  # fmt: skip
