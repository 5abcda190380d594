"""Of edits of heads and what they do: whose heads, which rows, in which order, and what is left behind."""

from __future__ import annotations

from functools import partial

from tests.mutants.record import Mutant

LAWS = "tests/attnzoo/heads/edits/laws"
EDITS = "attnzoo/surgery/edits"
CAUSAL = "attnzoo/heads/causal"
CALLS = f"{LAWS}/test_outputs.py -k of_a_call"
edit = partial(Mutant, file=f"{EDITS}/edit.py")
outputs = partial(Mutant, file=f"{EDITS}/outputs.py", tests=CALLS)
reads = partial(Mutant, file=f"{EDITS}/reading.py")
fold = partial(
    Mutant, file=f"{EDITS}/fold.py", tests=f"{LAWS}/test_folded.py -k 'oracles or (hooked and (Llama or GPT))'"
)
patching = partial(Mutant, file=f"{CAUSAL}/patching.py")
attribution = partial(Mutant, file=f"{CAUSAL}/attribution.py", tests=f"{LAWS}/test_effects.py -k attribution")

MUTANTS = (
    edit(
        "edits-first-of-a-group", old="for i in range(group))", new="for i in range(1))", within="HeadEdit.query_heads",
        wrong="of a KV head's group one head is edited", tests=f"{LAWS}/test_families.py -k 'group_is_its_heads and Llama'",
    ),
    edit(
        "edits-next-group", old="tuple(head * group + i for", new="tuple((head + 1) * group + i for", within="HeadEdit.query_heads",
        wrong="heads of the next group are edited", tests=f"{LAWS}/test_families.py -k 'group_is_its_heads and Llama'",
    ),
    outputs(
        "edits-heads-across", old="joined.unflatten(-1, (site.heads, site.head_dim))", new="joined.unflatten(-1, (site.head_dim, site.heads)).transpose(-1, -2)",
        wrong="a head is every H-th value",
    ),
    outputs("edits-decode-everywhere", old="(tokens > 1) == (where", new="(tokens > 0) == (where", wrong="the first call of one token is a prefill"
        , tests=f"{LAWS}/test_outputs.py -k rows_of_generation"),
    outputs("edits-outside-rows", old="new = torch.where(rows[..., None, None], new, old)", new="pass", wrong="rows that are not named are edited"),
    outputs(
        "edits-value-of-the-first", old="value = self._of_heads(edit, tensors[\"value\"], x)", new="value = self._of_heads(edit, tensors[\"value\"], x)[..., :1, :]",
        wrong="all heads get the first one's value",
    ),
    Mutant(
        "edits-inner-first", f"{EDITS}/edited.py", old="register_forward_pre_hook(hook, with_kwargs=True)", new="register_forward_pre_hook(hook, with_kwargs=True, prepend=True)",
        wrong="an inner context's edits come before the outer one's", tests=f"{LAWS}/test_outputs.py -k contexts",
    ),
    fold("fold-rows", old="module.weight.T if is_conv1d(module) else module.weight,", new="module.weight if is_conv1d(module) else module.weight.T,", wrong="rows of the projection are scaled"),
    fold("fold-bias-stays", old="*([module.bias] if change.needs_bias else [])", new="*([])", wrong="undo leaves what was added to the bias"),
    fold("fold-offset-not-scaled", old="        offset[heads] *= factor\n", new="", wrong="a later scale leaves what was added before"),
    patching(
        "path-live-receivers", old="for layer, z in mixed.items()]", new="for layer, z in mixed.items() if layer not in {x for x, _ in receiving or ()}]",
        wrong="layers with receivers answer each other while it is noted what they give", tests=f"{LAWS}/test_effects.py -k passes_by",
    ),
    patching(
        "path-edited-notes", old="with capture(model, (\"z\",)) as noted, edited(model, frozen):", new="with edited(model, frozen), capture(model, (\"z\",)) as noted:",
        wrong="receivers give what they were made to give", tests=f"{LAWS}/test_effects.py -k test_paths",
    ),
    patching("patch-melts", old="if layer > place.layer]", new="if layer > place.layer + 1]", wrong="the next layer's heads answer", tests=f"{LAWS}/test_effects.py -k test_patching"),
    patching("patch-neighbour", old="other[place.layer][:, :, head : head + 1]", new="other[place.layer][:, :, head - 1 : head or None]", wrong="a head gets its neighbour's output", tests=f"{LAWS}/test_effects.py -k test_patching"),
    attribution("attribution-sign", old="z - other[place.layer]", new="other[place.layer] - z", wrong="what is gained is called lost"),
    attribution("attribution-neighbours", old="(gradient.double() * less.double()).sum((0, 1, 3))", new="(gradient.double() * less.double().roll(1, 1)).sum((0, 1, 3))", wrong="slopes of a row meet another row's outputs"),
    Mutant(
        "divergence-from-the-start", f"{CAUSAL}/divergence.py", old="return own[-same:], other[-same:]", new="return own[:same], other[:same]",
        wrong="rows are compared from the first one on", tests=f"{LAWS}/test_effects.py -k divergence",
    ),
    Mutant(
        "ablation-of-the-next", f"{CAUSAL}/each_head.py", old="rows[copy] = True", new="rows[copy - 1] = True",
        wrong="scores of a layer's heads are shifted by one", tests=f"{LAWS}/test_effects.py -k 'ablation and zero'",
    ),
    Mutant(
        "capture-pattern-of-one-chunk", f"{CAUSAL}/patterns.py", old="range(0, slots, width)", new="range(0, min(slots, width), width)",
        wrong="weights beyond the first keys are lost", tests=f"{LAWS}/test_reads_in_families.py -k 'uniform and Llama'",
    ),
    reads("reads-decode-in-prefill", old="(tokens > 1) == (where", new="(tokens > 0) == (where", wrong="the first call of one token reads as a prefill", tests=f"{LAWS}/test_reads.py -k calls_of_one"),
    reads("reads-others-alone", old="(0.0, bias) if given.others", new="(bias, 0.0) if given.others", wrong="what alone was to be seen is hidden", tests=f"{LAWS}/test_reads_in_families.py -k 'changes_no_bit and Llama'"),
    reads("reads-stay", old="if other is not one)", new="if other is one)", within="_take_off", wrong="own layers go on reading so", tests=f"{LAWS}/test_reads_in_families.py -k 'own_layers and mha'"),
    Mutant(
        "reads-beta-of-the-others", "attnzoo/base/editing/operation.py", old="share * read.states.beta", new="share * (1 - read.states.beta)",
        wrong="sinks lose what they should keep", tests=f"{LAWS}/test_reads.py -k calls_of_one",
    ),
    Mutant(
        "contributions-without-gain", "attnzoo/heads/decoder.py", old="self.less_mean(weight * self.gain)", new="self.less_mean(weight)",
        wrong="the last norm's weights are forgotten", tests=f"{LAWS}/test_effects.py -k contributions",
    ),
    Mutant(
        "contributions-of-other-heads", "attnzoo/heads/causal/contributions.py", old=".unflatten(-1, z.shape[-2:])", new=".unflatten(-1, z.shape[:-3:-1]).transpose(-1, -2)",
        wrong="a head meets every H-th column of the projection", tests=f"{LAWS}/test_effects.py -k contributions",
    ),
)  # fmt: skip
