"""Of what heads do to a model: who is edited, what runs again, and what is read from weights."""

from __future__ import annotations

from functools import partial

from tests.mutants.record import Mutant

CAUSAL = "attnzoo/heads/causal"
TESTS = "tests/attnzoo/heads"
effects = partial(Mutant, tests=f"{TESTS}/causal/test_effects.py")
weights = partial(Mutant, tests=f"{TESTS}/scores/test_weight_scores.py")

MUTANTS = (
    effects(
        "effects-edited-layer-remembered", file=f"{CAUSAL}/layer_memory.py", old="self._layers[:layer] if", new="self._layers[: layer + 1] if",
        wrong="the layer of the edited head gives what it gave without the edit",
    ),
    effects(
        "effects-every-copy-edited", file=f"{CAUSAL}/each_head.py", old="rows[copy] = True", new="rows[:] = True",
        wrong="each copy of the batch loses the heads of all",
    ),
    Mutant(
        "effects-means-stay", file="attnzoo/heads/decoder.py", old="return self.less_mean(weight * self.gain)", new="return weight * self.gain",
        wrong="what a centred norm reads has its mean", tests=f"{TESTS}/causal/test_contributions.py -k GPT-2",
    ),
    Mutant(
        "effects-scale-thaws", file=f"{CAUSAL}/contributions.py", old="layer.output.read_by(u) * layer.output.scale(out.to(u.dtype))", new="layer.output.read_by(u)",
        wrong="the norm behind attention has no scale", tests=f"{TESTS}/causal/test_contributions.py -k Gemma",
    ),
    weights(
        "effects-one-distance", file="attnzoo/heads/scores/compositions.py", old="queries = other.q @ other.q.mT", new="queries = other.q[:1] @ other.q[:1].mT",
        wrong="keys are composed with queries of one distance",
    ),
    weights(
        "effects-values-of-other-groups", file="attnzoo/heads/scores/token_maps.py", old="values.repeat_interleave(p.num_heads // p.num_kv_heads, 1)",
        new="values.repeat(1, p.num_heads // p.num_kv_heads, 1)", wrong="heads read values of other groups",
    ),
    Mutant(
        "effects-first-rows-again", file="attnzoo/heads/scores/repeated.py", old="rows - (tokens - length)]", new="rows - rows[0]]",
        wrong="later chunks of rows look for the tokens of the first", tests=f"{TESTS}/scores/test_named_scores.py",
    ),
)  # fmt: skip
