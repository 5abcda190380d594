"""Of layers: the base, caches and pools, configurations and their registry, records, and what each variant plans."""

from __future__ import annotations

from functools import partial

from tests.mutants.record import Mutant

TESTS, VARIANTS = "tests/attnzoo", "tests/attnzoo/variants"
MHA = "mha and not rcmha"
base = partial(Mutant, file="attnzoo/base/layer.py", tests=f"{TESTS}/laws/test_contract.py -k '{MHA}'")
cache = partial(
    Mutant,
    file="attnzoo/cache/kv_cache.py",
    tests=f"{TESTS}/laws/test_contract_memory.py {TESTS}/cache/test_kv_cache.py -k '({MHA}) or test_kv_cache'",
)
streams = partial(
    Mutant,
    file="attnzoo/cache/streams.py",
    tests=f"{TESTS}/cache/test_streams.py {TESTS}/laws/test_contract_memory.py -k 'rcmha or longheads or test_streams'",
)
evicting = partial(
    Mutant,
    file="attnzoo/cache/evicting/regions.py",
    tests=f"{VARIANTS}/test_s2_evict.py -k 'right_one or every_pattern or largest or fall or refused'",
)
quick = partial(
    Mutant,
    file="attnzoo/base/decoding/step.py",
    tests=f"{TESTS}/laws/test_quick_step.py -k 'own or wants or quick_again or ({MHA})'",
)
rotation = partial(Mutant, file="attnzoo/base/decoding/rotation.py", tests=f"{TESTS}/base/decoding/test_rotation.py")
inputs = partial(Mutant, file="attnzoo/base/inputs.py", tests=f"{TESTS}/laws/test_contract.py -k '{MHA}'")
records = partial(Mutant, file="attnzoo/base/steps.py", tests=f"{TESTS}/laws/test_contract.py -k 'density or sparse'")
record = partial(
    Mutant,
    file="attnzoo/base/recording.py",
    tests=f"{TESTS}/laws/test_contract_module.py -k 'record and ({MHA} or moh or record_)'",
)
config = partial(
    Mutant, file="attnzoo/base/config.py", tests=f"{TESTS}/laws/test_contract_module.py -k 'refused or json'"
)
factory = partial(
    Mutant,
    file="attnzoo/factory.py",
    tests=f"{TESTS}/laws/test_contract_module.py -k 'zoo or unknown or refused or class_statement'",
)
mha = partial(Mutant, file="attnzoo/variants/mha.py", tests=f"{VARIANTS}/test_mha.py")
s2 = partial(Mutant, file="attnzoo/variants/s2/layer.py", tests=f"{VARIANTS}/test_s2.py")
lowrank = partial(Mutant, file="attnzoo/variants/lowrank_gqa.py", tests=f"{VARIANTS}/test_lowrank_gqa.py")
rcmha = partial(
    Mutant,
    file="attnzoo/variants/rcmha/layer.py",
    tests=f"{VARIANTS}/test_rcmha.py -k 'oracle or definition or padding or host or offset or table'",
)
longheads = partial(
    Mutant,
    file="attnzoo/variants/longheads/layer.py",
    tests=f"{VARIANTS}/test_longheads.py -k 'oracle or threshold or edge or earliest or quirks'",
)
landmark = partial(
    Mutant,
    file="attnzoo/variants/landmark/layer.py",
    tests=f"{VARIANTS}/test_landmark.py -k 'oracle or front or modes or irregular'",
)

MUTANTS = (
    base(
        "base-values-from-queries-side", old='source if name != "q_proj" else x', new='source if name == "k_proj" else x', wrong="values of a context come from the own tokens",
        file="attnzoo/base/weights.py", tests=f"{VARIANTS}/test_mha.py -k context",
    ),
    base(
        "base-ragged-first", old="torch.where(lengths.holds(token), token + first, -1)", new="torch.where(lengths.holds(token), token, -1)",
        wrong="rows of later calls stand at the beginning", tests=f"{TESTS}/laws/test_contract_memory.py -k '({MHA}) and different_lengths'",
    ),
    base(
        "base-padding-comes-out", old="return result.masked_fill(step.padding.unsqueeze(-1), 0)", new="return result", wrong="padding comes out as whatever lies in its row",
    ),
    rotation(
        "base-rotate-in-half", old="dtype = torch.promote_types(like.dtype, torch.float32)", new="dtype = like.dtype",
        wrong="half-precision layers rotate by half-precision tables", tests=f"{TESTS}/base/test_layer_parts.py",
    ),
    rotation(
        "rotation-slice-from-zero", old="return cos[positions.start : positions.stop], sin[positions.start : positions.stop]", new="return cos[: len(positions)], sin[: len(positions)]",
        wrong="a chunk is rotated as if it were the first",
    ),
    rotation(
        "rotation-forgets-length", old="_kept_tables(config, head_dim, rows_for(positions.stop), dtype, like.device, length)", new="_kept_tables(config, head_dim, rows_for(positions.stop), dtype, like.device, None)",
        wrong="forms that depend on a length share one table",
    ),
    rotation(
        "rotation-reads-before-the-first", old="if least >= 0 and", new="if", wrong="negative positions read a table from its end",
    ),
    rotation(
        "rotation-one-row-turns-back", old="torch.cat((-sin, sin), -1)", new="torch.cat((sin, -sin), -1)", wrong="a decoding step's row is rotated the other way",
    ),
    rotation(
        "rotation-keeps-any-size", old="return size * LARGEST_SHARE <= memory_limit()", new="return True", wrong="tables that cannot be kept are made whole for each call",
    ),
    quick(
        "quick-one-behind", old="slots = self.row_slots(row.position + 1, row.x.device)", new="slots = self.row_slots(max(1, row.position), row.x.device)",
        wrong="a decoding step does not read its own token",
    ),
    quick(
        "quick-ignores-steps", old="return all(getattr(cls, name) is step for name, step in known)", new="return True",
        wrong="a step that was replaced on the class is left out",
    ),
    quick(
        "quick-for-any-subclass", old="        if not STEPS.isdisjoint(vars(base)):\n            return False\n", new="",
        wrong="a subclass's own steps are left out in decoding",
    ),
    quick(
        "quick-with-gradients", old="if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.used_parameters())):", new="if torch.is_grad_enabled() and x.requires_grad:",
        wrong="a decoding step that trains has no gradient",
    ),
    quick(
        "quick-compiled-with-gradients", old="return not torch.is_grad_enabled() and x.dtype in COMPUTED", new="return x.dtype in COMPUTED",
        wrong="a compiled step that may train has no plan", tests=f"{TESTS}/laws/test_compiled_lengths.py -k without_a_plan",
    ),
    quick(
        "quick-unrecorded", old="is_wanted = bool(self.recordings or self.read_editors)", new="is_wanted = bool(self.read_editors)",
        wrong="decoding steps are missing from a record",
    ),
    quick(
        "quick-in-other-precision", old='(values.dtype == x.dtype or not values.is_floating_point())', new="True",
        wrong="a cache of another dtype is read as if it had the layer's", file="attnzoo/cache/rows.py",
    ),
    quick(
        "quick-past-hooks", old='if held["_forward_hooks"] or held["_forward_pre_hooks"]:', new="if False:", within="are_products", file="attnzoo/base/projections.py",
        wrong="a projection that somebody watches is taken for a product",
    ),
    quick(
        "mha-row-window", old="(held - window, held)), device)", new="(held - window - 1, held)), device)", tests=f"{TESTS}/laws/test_quick_step.py -k 'quick_step and mha'",
        wrong="a decoding step's window is one token longer",
    ),
    quick(
        "s2-row-own-block", old="(slots.runs[-1][0], held))", new="slots.runs[-1])", file="attnzoo/variants/s2/blocks_of_row.py",
        wrong="a decoding step reads what lies behind its token", tests=f"{TESTS}/laws/test_quick_step.py -k '(says_what or hidden) and s2'",
    ),
    quick(
        "s2-row-repeats", old="< count).to(device)", new=">= 0).to(device)", file="attnzoo/variants/s2/blocks_of_row.py",
        wrong="a head with fewer blocks counts one of its slots several times", tests=f"{TESTS}/laws/test_quick_step.py -k 'says_what and s2'",
    ),
    quick(
        "moh-row-needed", old=".unflatten(1, (-1, each)).any(2).tolist()", new=".unflatten(1, (-1, each)).all(2).tolist()", file="attnzoo/variants/moh/divided.py",
        wrong="a KV head is read only where all of its query heads are active", tests=f"{TESTS}/laws/test_quick_step.py -k 'says_what and moh'",
    ),
    quick(
        "rcmha-row-taps", old="past.narrow(2, len(taps) - 1 - r, 1)", new="past.narrow(2, r - 1, 1)", file="attnzoo/variants/rcmha/convolution.py",
        wrong="a decoding step convolves the tokens before it in the other order", tests=f"{TESTS}/laws/test_quick_step.py -k 'says_what and rcmha'",
    ),
    quick(
        "rcmha-row-far", old="tau[..., reach:].expand", new="tau[..., :1].expand", file="attnzoo/variants/rcmha/relative.py",
        wrong="far tokens are scored as the nearest", tests=f"{TESTS}/laws/test_quick_step.py -k 'says_what and rcmha'",
    ),
    quick(
        "ring-recent-wraps", old="(shared - count) % self.rows + count > self.rows", new="False", file="attnzoo/cache/streams.py",
        wrong="a ring that comes round is read past its end", tests=f"{TESTS}/laws/test_quick_step.py -k 'rings'",
    ),
    base(
        "base-rotates-chunks-from-zero", old="range(step.first, step.first + step.x.shape[1])", new="range(0, step.x.shape[1])",
        wrong="each call's tokens are rotated as if they were the first", tests=f"{TESTS}/laws/test_contract_memory.py -k '{MHA} and chunks'",
    ),
    base(
        "base-overridden-rotation", old='if step.first is None or not self.runs_own("rotate", AttentionLayer):', new="if step.first is None:",
        wrong="a rotation of one's own is left out", tests=f"{TESTS}/base/decoding/test_rotation.py",
    ),
    base(
        "base-full-reads-padding", old="bias = None if self.config.causal else _hide(slot >= lengths.column() + first, q.dtype)", new="bias = None",
        wrong="layers without causality read the rows behind an item's last token", tests=f"{VARIANTS}/test_mha.py {TESTS}/laws/test_contract.py -k '{MHA}'",
    ),
    base(
        "base-not-all-or-nothing", old="with cache.all_or_nothing():", new="if True:", wrong="a call that fails leaves its tokens in the cache",
        tests=f"{TESTS}/base/test_layer_parts.py",
    ),
    base(
        "base-head-weight-of-tokens", old="out = out * plan.head_weight", new="out = out * plan.head_weight.mean(1, keepdim=True)",
        wrong="all heads get the mean of their weights", tests=f"{VARIANTS}/test_moh.py -k oracle",
    ),
    base(
        "base-owner-not-checked", old="cache.check((self._identity, self.config), x.shape[0], x.device)", new="cache.check((cache._owner, self.config), x.shape[0], x.device)",
        wrong="a cache of another layer is taken", tests=f"{TESTS}/laws/test_contract_memory.py -k '({MHA}) and another_layer'",
    ),
    cache(
        "cache-ragged-slot", old="slot = torch.where(Lengths(lengths).holds(token), before.unsqueeze(1) + token, self.bound)", new="slot = torch.where(Lengths(lengths).holds(token), before.unsqueeze(1) + token, 0)",
        wrong="rows without a token overwrite an item's first token",
    ),
    cache(
        "cache-crop-not-cleared", file="attnzoo/cache/editing.py", old="        self._count_left(left, most)\n        self._clear_behind()", new="        self._count_left(left, most)",
        wrong="what was cropped is handed on where lengths differ",
    ),
    cache(
        "cache-reorder-lengths", file="attnzoo/cache/editing.py", old="self._lengths = self._lengths.index_select(0, index)", new="pass", wrong="chosen items keep the lengths of those before",
    ),
    cache(
        "cache-fork-shares", file="attnzoo/cache/editing.py", old="copy._buffers = self._as_placed({name: x.clone() for name, x in self._buffers.items()})", new="copy._buffers = self._as_placed(dict(self._buffers))",
        wrong="a fork writes into its original",
    ),
    cache(
        "cache-views-in-training", old="            if differentiable:\n                seen[name] = torch.cat((held", new="            if False:\n                seen[name] = torch.cat((held",
        wrong="the current tokens are not in the graph, and later writes break earlier backwards",
    ),
    cache(
        "cache-full-by-one", old="if longest > self.max_length:", new="if longest > self.max_length + 1:", wrong="one token too many is taken",
    ),
    cache(
        "cache-ragged-bound", old="self.bound = min(self.bound + tokens, self.max_length)", new="self.bound = min(self.bound + tokens, self.max_length - 1)",
        wrong="the last slot of a ragged cache is never read", tests=f"{TESTS}/cache/test_stream_parts.py",
    ),
    streams(
        "ring-row", old="begin = (held + first) % self.rows", new="begin = held % self.rows", wrong="a call longer than a ring is written from the wrong row",
    ),
    streams(
        "ring-oldest", old="self.oldest = self._later(held + tokens - self.rows)", new="self.oldest = self._later(held - self.rows)", wrong="a ring promises tokens that it has overwritten",
    ),
    streams(
        "ring-zeros-before", old="return seen if shared >= count else seen.masked_fill((token < 0).view(1, 1, -1, 1), 0)", new="return seen",
        wrong="before the first token there is what the ring held", tests=f"{TESTS}/cache/test_stream_parts.py",
    ),
    streams(
        "ring-select-oldest", old="Lengths(self.oldest).select(index).value", new="self.oldest",
        wrong="chosen items keep the margins of those before", tests=f"{TESTS}/cache/test_stream_parts.py",
    ),
    streams(
        "groups-incomplete", old="torch.where(first + rows < behind, first + rows, last)", new="torch.where(first + rows <= behind, first + rows, last)",
        wrong="a group that is not complete is written",
    ),
    streams(
        "ring-restore", old="        if values is not self.values:\n            self.values = values\n            self.oldest = oldest", new="        self.oldest = oldest",
        wrong="a long call that fails leaves its tokens in a ring",
    ),
    evicting(
        "evicting-runs-begin-late", old="                first = end\n", new="                first = end + 1\n", wrong="heads that keep fewer blocks are not those behind the ones that keep more",
    ),
    evicting(
        "evicting-near-by-one", old="is_ring = (at >= 0) & (at < self.places) & (last > current - self.local)", new="is_ring = (at >= 0) & (at < self.places) & (last > current - self.local + 1)",
        wrong="the oldest near block is not written by a chunk",
    ),
    evicting(
        "evicting-ring-shifted", old="near = self.margin + block % max(self.places, 1) * self.block", new="near = self.margin + (block + 1) % max(self.places, 1) * self.block",
        wrong="near blocks are looked for one place further in their ring",
    ),
    evicting(
        "evicting-crop", file="attnzoo/cache/evicting/cache.py", old='raise UnsupportedError(\n                "crop: a cache', new='return  # type: ignore[misc]\n            raise UnsupportedError(\n                "crop: a cache', wrong="a crop is ignored silently",
    ),
    inputs(
        "inputs-positions-not-moved", old="places = positions.expand(x.shape[0], -1).gather(1, moved.order)", new="places = positions.expand(x.shape[0], -1)",
        wrong="positions stay where padding was while tokens move",
    ),
    inputs(
        "inputs-offset-of-positions", old="return token + Lengths(offset).column()", new="return token",
        wrong="later calls count positions from the beginning", tests=f"{TESTS}/laws/test_contract_memory.py -k '({MHA}) and (token_by_token or chunks)'",
    ),
    inputs(
        "inputs-padded-rows-kept", old="take_rows(x.masked_fill(key_padding.unsqueeze(-1), 0), moved.order)", new="take_rows(x, moved.order)",
        wrong="padded rows may hold NaN and are computed with",
    ),
    inputs(
        "inputs-context-padding", old="context = context.masked_fill(key_padding.unsqueeze(-1), 0)", new="pass", wrong="NaN in a context's padding spoils everything",
        tests=f"{VARIANTS}/test_mha.py -k context",
    ),
    records(
        "records-front-rows", old="q_pos = torch.where(rows < self.front, -1, rows", new="q_pos = torch.where(rows < 0, -1, rows", wrong="density counts the rows in front",
        tests=f"{TESTS}/base/test_layer_parts.py",
    ),
    record(
        "record-losses-of-last", old="for plans in self.plans.values() for plan in plans if plan.aux_loss is not None]", new="for plans in self.plans.values() for plan in plans[-1:] if plan.aux_loss is not None]",
        wrong="auxiliary losses of earlier calls are lost", tests=f"{TESTS}/base/test_layer_parts.py",
    ),
    record(
        "record-recomputed", old="if is_replay():", new="if False:", wrong="recomputed calls are recorded twice",
        tests=f"{TESTS}/laws/test_contract_module.py -k 'checkpointing and ({MHA})'",
    ),
    record(
        "record-outer-ends", old="tuple(other for other in layer.recordings if other is not recording)", new="()", wrong="an inner record ends the outer one",
        tests=f"{TESTS}/laws/test_contract_module.py -k 'nest'",
    ),
    config(
        "config-bool-is-int", old="value not in words and (type(value) is not int or value < least)", new="value not in words and (not isinstance(value, int) or value < least)",
        wrong="True is taken for 1",
    ),
    config(
        "config-scaling-lost", old='values["scaling"] = RotaryScaling(**scaling)', new='values["scaling"] = None', wrong="a configuration that was saved loses its scaling",
        tests=f"{TESTS}/base/test_layer_parts.py",
    ),
    config(
        "config-head-width", old="return self.dim // self.num_heads if self.head_dim is None else self.head_dim", new="return self.dim // self.kv_heads if self.head_dim is None else self.head_dim",
        wrong="heads are as wide as KV heads would be", tests=f"{VARIANTS}/test_mha.py",
    ),
    factory(
        "registry-options-beside-config", old="config = replace(variant, **options) if options else variant", new="config = variant", wrong="options beside a configuration are dropped",
        tests=f"{TESTS}/base/test_layer_parts.py",
    ),
    factory(
        "registry-values", old='named = {"true": True, "false": False, "none": None}', new='named = {"true": True, "false": False}', wrong="none is read as text",
        tests=f"{TESTS}/base/test_layer_parts.py",
    ),
    mha(
        "mha-sink", old="extras = Extras(window=config.window, sink=config.sink)", new="extras = Extras(window=config.window)", wrong="the sink is listed and not seen",
    ),
    mha(
        "mha-offset", old="cover = Cover(config.window, config.sink, config.causal, step.offset)", new="cover = Cover(config.window, config.sink, config.causal, 0)",
        wrong="chunks and steps list the window of the first tokens", tests=f"{TESTS}/base/test_layer_parts.py",
    ),
    s2(
        "s2-dense-heads", old="dense = [n >= config.kv_heads - config.num_dense_heads for n in heads]", new="dense = [n >= config.num_dense_heads for n in heads]", wrong="the wrong heads are dense",
    ),
    s2(
        "s2-front", old="return Plan(build(config, extent, inputs.q.device), Extras(), config.causal, front=front)", new="return Plan(build(config, extent, inputs.q.device), Extras(), config.causal, front=0)",
        wrong="query blocks of a chunk lie off the sequence's grid", tests=f"{TESTS}/laws/test_contract_memory.py -k 's2 and (chunks or token)'",
    ),
    s2(
        "s2-head-offset", old="shift=[n * step + config.head_offset for n in", new="shift=[n * step for n in", wrong="the heads' offset is lost",
    ),
    s2(
        "s2-commit-late", file="attnzoo/base/evicting/layer.py", old="            step.cache.commit()", new="            pass", wrong="an evicting cache remembers nothing", tests=f"{VARIANTS}/test_s2_evict.py -k right_one",
        survives="a call that is not compiled is written at the end of all_or_nothing too; of a compiled one this is the only end",
    ),
    lowrank(
        "lowrank-halves-swapped", old="keys, values = heads.chunk(2, dim=1)", new="values, keys = heads.chunk(2, dim=1)", wrong="keys and values of the latent are swapped",
    ),
    lowrank(
        "lowrank-keys-by-own-positions", old="self.rotate(positions, k)", new="self.rotate(positions - positions[:, :1], k)",
        wrong="keys are rotated from the first one on",
    ),
    rcmha(
        "rcmha-content-bias", old="q = q + self.rel_u.unsqueeze(1).to(q.dtype)", new="q = q - self.rel_u.unsqueeze(1).to(q.dtype)", wrong="the content's bias has the wrong sign",
    ),
    rcmha(
        "rcmha-distance-bias", old="q = heads.q + self.rel_v.unsqueeze(1)", new="q = heads.q + self.rel_u.unsqueeze(1)", wrong="distances are scored with the content's bias",
    ),
    rcmha(
        "rcmha-padding-convolved", old="x = x.masked_fill(absent[:, None, :, None], 0)", new="pass", wrong="without causality the rows behind an item's last token are convolved", tests=f"{TESTS}/base/test_layer_parts.py",
    ),
    rcmha(
        "rcmha-history-of-one", old="history = step.cache.history(stream, self.config.conv_size - 1)", new="history = None", wrong="convolutions forget earlier calls",
        tests=f"{TESTS}/laws/test_contract_memory.py -k 'rcmha and (token_by_token or chunks)'",
    ),
    longheads(
        "longheads-first-chunk", file="attnzoo/variants/longheads/chunks.py", old="allowed = (chunk >= 1) & (chunk < last[:, None, :, None])", new="allowed = (chunk >= 0) & (chunk < last[:, None, :, None])", wrong="the first chunk is chosen a second time",
    ),
    longheads(
        "longheads-moved", old="moved = own - (config.slots - 1)", new="moved = own - config.slots", wrong="queries stand one slot too far from what they read",
    ),
    longheads(
        "longheads-group-select", file="attnzoo/variants/longheads/chunks.py", old="scores = scores.unflatten(1, (asking.groups, -1)).sum(2)", new="scores = scores.unflatten(1, (asking.groups, -1))[:, :, 0]",
        wrong="a group's first head chooses for all",
    ),
    landmark(
        "landmark-positions", file="attnzoo/base/decoding/step.py", old="torch.div(slots + 1, every", new="torch.div(slots, every",
        wrong="a landmark takes a position of its own after all",
    ),
    landmark(
        "landmark-training-retrieves", old='return self.mode or ("soft" if self.training else "topk")', new='return self.mode or ("topk" if self.training else "soft")', wrong="training retrieves and evaluation reads everything",
        tests=f"{VARIANTS}/test_landmark.py -k 'unless_told'",
    ),
    landmark(
        "landmark-few-blocks", old="slots <= (self.config.top_k + 1) * self.config.block_size", new="slots <= (self.config.top_k + 2) * self.config.block_size", wrong="one block more is read softly than are chosen",
    ),
)  # fmt: skip
