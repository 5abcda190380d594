"""Of what layers are made of: rotation, choice, routing, rows that are left out, landmarks, distances, convolutions."""

from __future__ import annotations

from functools import partial

from tests.mutants.record import Mutant

TESTS, VARIANTS = "tests/attnzoo", "tests/attnzoo/variants"
rope = partial(Mutant, file="attnzoo/base/rope.py", tests=f"{TESTS}/base/test_rope.py")
select = partial(Mutant, file="attnzoo/topk.py", tests=f"{TESTS}/test_topk.py")
routing = partial(
    Mutant,
    file="attnzoo/variants/moh/router.py",
    tests=f"{VARIANTS}/test_moh.py -k 'oracle or ties or shares or balance or straight or gates'",
)
compaction = partial(
    Mutant,
    file="attnzoo/variants/moh/routed_rows.py",
    tests=f"{VARIANTS}/test_moh.py -k 'both_ways or gathered or oracle or density'",
)
landmarks = partial(
    Mutant, file="attnzoo/variants/landmark/tokens.py", tests=f"{TESTS}/variants/test_landmark_tokens.py"
)
retrieval = partial(
    Mutant,
    file="attnzoo/variants/landmark/retrieval.py",
    tests=f"{VARIANTS}/test_landmark.py -k 'its_oracle or any_blocks or front or parts'",
)
relative = partial(
    Mutant,
    file="attnzoo/variants/rcmha/relative.py",
    tests=f"{TESTS}/variants/test_rcmha_relative.py {VARIANTS}/test_rcmha.py -k 'channels or its_oracle or definition'",
)
convolution = partial(
    Mutant, file="attnzoo/variants/rcmha/convolution.py", tests=f"{TESTS}/variants/test_rcmha_convolution.py"
)
align = partial(Mutant, file="attnzoo/base/padding.py", tests=f"{TESTS}/base/test_padding.py")
offload = partial(
    Mutant,
    file="attnzoo/selection/offloaded_blocks.py",
    tests=f"{TESTS}/selection/test_offloaded_blocks.py -k 'whole_call or order or refused'",
)
layouts = partial(Mutant, file="attnzoo/base/shared_layouts.py", tests=f"{TESTS}/base/test_shared_layouts.py")

MUTANTS = (
    rope(
        "rope-second-half", old="torch.cat((a * cos - b * sin, b * cos + a * sin), -1)", new="torch.cat((a * cos - b * sin, b * cos - a * sin), -1)",
        wrong="the second half of each plane turns the other way",
    ),
    rope(
        "rope-interleaved-order", old="a = turned[..., 0::2]\n        b = turned[..., 1::2]", new="a = turned[..., 1::2]\n        b = turned[..., 0::2]",
        wrong="neighbours of a plane are swapped",
    ),
    rope(
        "rope-dynamic-stretch", old="length, original) / original - (factor - 1)", new="length, original) / original - factor",
        wrong="dynamic NTK stretches too little, and the original length too",
    ),
    rope(
        "rope-longrope-threshold", old="scaling.long_factor if length > original", new="scaling.long_factor if length >= original",
        wrong="the original length already takes the long factors",
    ),
    rope(
        "rope-yarn-ends", old="low = math.floor(low)\n        high = math.ceil(high)", new="low = math.ceil(low)\n        high = math.floor(high)",
        wrong="YaRN's ramp is rounded inwards",
    ),
    rope(
        "rope-llama3-shares", old="plain * keep + plain / factor * (1 - keep)", new="plain * (1 - keep) + plain / factor * keep",
        wrong="fast planes are interpolated and slow ones kept",
    ),
    rope(
        "rope-attention-factor", old="sin = sin * config.scaling.table_factor", new="sin = sin",
        wrong="the attention factor is on the cosines alone",
    ),
    rope(
        "rope-angles-in-table-dtype", old="positions.to(torch.float64).unsqueeze(-1) * frequencies", new="positions.to(dtype).unsqueeze(-1) * frequencies.to(dtype)",
        wrong="angles are rounded before their cosine is taken",
    ),
    rope(
        "rope-yarn-factor-of-positions", old='if kind in ("yarn", "longrope"):', new='if kind == "yarn":',
        wrong="longrope without a factor has none instead of that of its lengths",
    ),
    select(
        "select-unstable", old="descending=True, stable=True)", new="descending=True)", wrong="ties go anywhere",
    ),
    select(
        "select-nan-wins", old="nan=-largest", new="nan=largest", wrong="NaN is taken for the largest score", tests=f"{TESTS}/test_topk_nan.py",
    ),
    select(
        "select-forced-not-allowed", old="    if allowed is not None:\n        key = key.masked_fill(~allowed, -torch.inf)\n    if forced is not None:\n        key = key.masked_fill(forced, torch.inf)",
        new="    if forced is not None:\n        key = key.masked_fill(forced, torch.inf)\n    if allowed is not None:\n        key = key.masked_fill(~allowed, -torch.inf)",
        wrong="forced blocks that are not allowed are left out",
    ),
    select(
        "select-infinite-scores", old="neginf=-largest", new="neginf=-torch.inf", wrong="blocks whose score is -inf count as not allowed",
    ),
    select(
        "select-unsorted", old="masked_fill(value == -torch.inf, blocks).sort(-1).values", new="masked_fill(value == -torch.inf, blocks)",
        wrong="blocks come in the order of their scores",
    ),
    routing(
        "routing-ties-highest", old="units.argsort(dim=-1, descending=True, stable=True)", new="units.flip(-1).argsort(dim=-1, descending=True, stable=True).neg().add(units.shape[-1] - 1)",
        wrong="among equal heads the highest is taken",
    ),
    routing(
        "routing-unit-size", old="counts.active // counts.unit", new="counts.active", wrong="as many units as heads are active",
    ),
    routing(
        "routing-types-swapped", old="shared = shared * types[..., :1]\n        routed = routed * types[..., 1:]", new="shared = shared * types[..., 1:]\n        routed = routed * types[..., :1]",
        wrong="the weights of shared and routed heads are swapped",
    ),
    routing(
        "routing-loss-both-gradients", old="used = routing.active[..., counts.shared :]", new="used = routing.active[..., : counts.routed]",
        wrong="the loss counts the use of shared heads as that of routed ones",
    ),
    routing(
        "routing-loss-padding", old="share = (used * weight)", new="share = used",
        wrong="padding counts as use of heads", tests=f"{VARIANTS}/test_moh.py -k 'oracle or balance' {TESTS}/oracles/test_oracles.py",
    ),
    routing(
        "routing-straight-through", old="opinion = coefficient * (probs - probs.detach())", new="opinion = coefficient * (probs.detach() - probs)",
        wrong="the straight-through gradient has the wrong sign",
    ),
    routing(
        "routing-paper-total", old="shares(of_types, 2 if code else 1)", new="shares(of_types, 2)",
        wrong="the paper's form weighs kinds of heads twice as high",
    ),
    compaction(
        "compaction-scatter-order", old="self._flat(heads_first=False), size)", new="self._flat(heads_first=True), size)",
        wrong="rows are written back as if heads came first",
    ),
    compaction(
        "compaction-absent-position", old="return torch.where(self.present, of_item, -1)", new="return of_item",
        wrong="absent rows stand where a head's first token stands", tests=f"{TESTS}/laws/test_contract.py -k 'density and moh'",
    ),
    compaction(
        "compaction-first-slot", old="torch.where(self.present, self.token + first, -1)", new="torch.where(self.present, self.token, -1)",
        wrong="rows of a chunk stand at the beginning of the memory", tests=f"{VARIANTS}/test_moh.py -k 'decoding or prefill' {VARIANTS}/test_moh_mutants.py -k 'right_one'",
    ),
    compaction(
        "compaction-earliest", old="earliest = torch.where(tile < 0, slots, tile).amin(-1)", new="earliest = tile.clamp(min=0).amin(-1)",
        wrong="a tile with absent rows reads from the first slot on",
        survives="more blocks are listed than rows can see; the token rule hides them, so that results are the same and only time is lost.",
    ),
    compaction(
        "compaction-window-low", old="earliest - window + 1", new="earliest - window + block_k + 1",
        wrong="the windowed layout begins a block too late",
    ),
    compaction(
        "compaction-product-weights", old="of_head.flatten(0, 1) @ weight.t()", new="of_head.flatten(0, 1) @ weight.t() * (index.flatten() > 0).unsqueeze(1)",
        wrong="the first token of a batch gets no product", tests=f"{VARIANTS}/test_moh_projection.py -k 'alone'",
    ),
    landmarks(
        "landmarks-block-count", old="closes = real & (count % fill == 0)", new="closes = real & (count % block_size == 0)",
        wrong="a landmark comes after w ordinary tokens instead of w - 1",
    ),
    landmarks(
        "landmarks-offset", old="start = before.column()", new="start = 0",
        wrong="later calls count their blocks from the beginning",
    ),
    landmarks(
        "landmarks-padding-counts", old="torch.ones(batch, length, dtype=torch.bool, device=device) if key_padding is None else ~key_padding",
        new="torch.ones(batch, length, dtype=torch.bool, device=device)", wrong="padding counts for blocks",
    ),
    landmarks(
        "landmarks-labels", old="put(labels, landmark_label, -100)", new="put(labels, landmark_label, 0)",
        wrong="padding is trained to say token 0",
    ),
    landmarks(
        "landmarks-shared-position", old="(source + torch.roll(source, 1, 1) * ends)", new="(source + torch.roll(source, -1, 1) * ends)",
        wrong="a landmark has the position of the token behind it",
    ),
    landmarks(
        "landmarks-mean-in-half", old="torch.promote_types(weight.dtype, torch.float32)", new="weight.dtype",
        wrong="the mean of half-precision embeddings is added up in half precision",
        survives="torch adds up means of half-precision tensors in fp32 by itself.",
    ),
    landmarks(
        "landmarks-grid-holes", old="slot = number * block + torch.where(ends, block - 1, within)", new="slot = number * block + within",
        wrong="a short block's landmark does not lie in the last slot",
    ),
    retrieval(
        "retrieval-shift-of-new", old="+ (taken >= older).long() - taken", new="- taken", wrong="recent blocks are moved by one place",
    ),
    retrieval(
        "retrieval-older", old="older = (complete - top_k).clamp(min=0)  # [B|1, T]", new="older = (complete - top_k + 1).clamp(min=0)  # [B|1, T]",
        wrong="one recent block is scored as if it were packed",
    ),
    retrieval(
        "retrieval-group", old="q.to(acc).unflatten(1, (keys.shape[1], -1))", new="q.to(acc).unflatten(1, (-1, keys.shape[1])).transpose(1, 2)",
        wrong="query heads score the landmarks of the wrong KV heads",
    ),
    retrieval(
        "retrieval-turn-sign", old="-self.sin[blocks])", new="self.sin[blocks])", wrong="blocks are rotated forth instead of back",
    ),
    retrieval(
        "retrieval-shared-max", old="share.amax(2, keepdim=True)", new="share.mean(2, keepdim=True)", wrong="the shared choice goes by the mean and not the largest share", tests=f"{VARIANTS}/test_landmark_published.py -k call_by_call",
    ),
    retrieval(
        "retrieval-ties", old="slack = rounding(q, keys, complete, scale)", new="slack = 0 * rounding(q, keys, complete, scale)",
        wrong="equal landmarks are told apart by rounding", tests=f"{VARIANTS}/test_landmark.py -k 'front or order'",
    ),
    relative(
        "relative-signs", old="torch.cat((a * sin + c * cos, c * sin - a * cos), -1)", new="torch.cat((a * sin + c * cos, a * cos - c * sin), -1)",
        wrong="half of the addition theorem has the wrong sign",
    ),
    relative(
        "relative-rows", old="table[slots - gamma.shape[2] :] if q_pos is None", new="table[: gamma.shape[2]] if q_pos is None",
        wrong="rows stand at the first slots instead of the last",
    ),
    relative(
        "relative-far-shift", old="return out, lse + call.scale * shift.to(lse.dtype)", new="return out, lse + shift.to(lse.dtype)",
        wrong="what all far keys share is added behind the scale",
    ),
    relative(
        "relative-near-window", old="extras=replace(call.extras, q_pos=q_pos, window=reach,", new="extras=replace(call.extras, q_pos=q_pos, window=reach + 1,",
        wrong="the key at the clipping distance is read twice",
    ),
    relative(
        "relative-absent-last", old="torch.where(present, rows, least)", new="rows", wrong="positions of padding count as the last",
        survives="places are counted from some number: which one changes rounding at most, as only differences matter.",
    ),
    convolution(
        "convolution-centre", old="self.centre = 0 if causal else (size - 1) // 2", new="self.centre = 0 if causal else size // 2",
        wrong="even kernels are centred one token late",
        survives="kernels that look both ways have an odd size: rcmha refuses others, and for odd ones the centre is the same.",
    ),
    convolution(
        "convolution-taps-reversed", old="wide[:, :, size - 1 - r :][:, :, :tokens] * taps[r]", new="wide[:, :, size - 1 - r :][:, :, :tokens] * taps[-r]",
        wrong="taps meet the tokens in the opposite order",
    ),
    convolution(
        "convolution-history", old="wide = torch.cat((history.to(acc), wide), 2)", new="wide = torch.cat((torch.zeros_like(history).to(acc), wide), 2)",
        wrong="earlier tokens are taken for zeros", tests=f"{VARIANTS}/test_rcmha.py -k 'its_oracle or split or segments'",
    ),
    align(
        "align-order", old="torch.argsort(padding.to(torch.uint8), dim=1, stable=True)", new="torch.argsort(padding.to(torch.uint8), dim=1, stable=True, descending=True)",
        wrong="padding comes first",
    ),
    align(
        "align-front-absent", old="return torch.where(present.unsqueeze(1), moved, -1)", new="return moved",
        wrong="rows in front of an item stand where its first token stands",
    ),
    align(
        "align-drop", old="index = torch.arange(tokens, device=out.device) + absent.column()", new="index = torch.arange(tokens, device=out.device) + 0 * absent.column()",
        wrong="rows in front of an item are given out for its tokens",
    ),
    align(
        "align-pad-behind", old="pad(q_pos, (absent.shared, rows - absent.shared - tokens), value=-1)", new="pad(q_pos, (absent.shared, rows - absent.shared - tokens), value=0)",
        wrong="absent rows stand at slot 0",
    ),
    offload(
        "offload-any-head", old="used = used.unflatten(1, (groups, -1)).any(2)", new="used = used.unflatten(1, (groups, -1))[:, :, 0]",
        wrong="blocks that only a later head of a group lists are not fetched",
    ),
    offload(
        "offload-own-block", old="torch.where(here, (before - 1) * block + pos % block, before * block - 1)", new="(before - 1) * block + pos % block",
        wrong="a row whose own block is not fetched sees too little of those before it",
    ),
    offload(
        "offload-bias", old="(extras.window, extras.key_bias, extras.aux,", new="(extras.window, None, extras.aux,",
        wrong="a bias by slot goes to the wrong fetched keys",
    ),
    offload(
        "offload-origins", old="layout.count, col, layout.origin)", new="layout.count, col, None)",
        wrong="fetched blocks lose their origins", tests=f"{TESTS}/selection/test_offloaded_blocks.py {VARIANTS}/test_landmark_offload.py -k 'whole_call or any_calls or prefill'",
    ),
    layouts(
        "layouts-first-slot", old="q_start=cover.first,", new="q_start=None,", wrong="every window is aligned at the last key",
    ),
    layouts(
        "layouts-full-window-causal", old="causal=cover.causal,", new="causal=True,", wrong="windows without causality list blocks of the past alone",
    ),
    layouts(
        "layouts-made-in-inference", old="with torch.inference_mode(False):\n        return BlockLayout.dense(", new="if True:\n        return BlockLayout.dense(",
        wrong="a layout first used in inference mode serves training",
    ),
    layouts(
        "layouts-lists-of-each-length", old="_dense_blocks(block, -(-tokens // block), -(-slots // block), device).with_lengths(tokens, slots)",
        new="BlockLayout.dense(block, block, tokens, slots, device=device)",
        wrong="every decoding step looks at its lists anew",
    ),
    layouts(
        "layouts-sink-inside-window", old="before = min(sinks, low) if", new="before = sinks if",
        wrong="a sink block within the window is listed twice",
    ),
    layouts(
        "layouts-fresh-each-time", old="    if may_share(like):\n        return _shared_dense(", new="    if not may_share(like):\n        return _shared_dense(",
        wrong="layers share no layout, and every call plans anew",
    ),
)  # fmt: skip
