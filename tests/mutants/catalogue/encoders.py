"""Of encoders: blocks that read ahead, and what cannot be done with them."""

from __future__ import annotations

from functools import partial

from tests.mutants.record import Mutant

FOLDER, TESTS = "attnzoo/surgery", "tests/attnzoo/surgery/families/test_encoders.py"
CONFORMANCE = "tests/attnzoo/surgery/families/test_conformance.py"
family = partial(Mutant, file=f"{FOLDER}/hosts/families/bidirectional/encoders.py", tests=TESTS)

MUTANTS = (
    Mutant(
        "encoders-causal-rule", file=f"{FOLDER}/kinds/reading.py", old="causal=block.causal,", new="causal=True,",
        wrong="an encoder's window looks back alone", tests=f"{TESTS} -k rule",
    ),
    Mutant(
        "encoders-padding-behind", file="attnzoo/base/layer.py", old=", key_bias=made.key_bias)", new=")",
        wrong="tokens read the padding behind the last of them",
        tests=f"{CONFORMANCE} -k 'padding and left and BERT and mha'",
    ),
    Mutant(
        "encoders-mask-of-another-kind", file=f"{FOLDER}/hosts/geometry.py",
        old="if attention_mask.causal != causal:", new="if False:",
        wrong="a causal mask is read as none", tests="tests/attnzoo/surgery/hosts/test_transformers.py -k not_causal",
    ),
    family(
        "encoders-decoder", old='elif getattr(module, "is_causal", False):', new="elif False:",
        wrong="a decoder is converted as an encoder", tests=f"{TESTS} -k decoders",
    ),
    Mutant(
        "encoders-policy", file=f"{FOLDER}/kinds/policy.py", old="if not block_of(module).causal:", new="if False:",
        wrong="a policy is put where there is no cache", tests=f"{CONFORMANCE} -k 'refused_by_name and policy and BERT'",
    ),
    Mutant(
        "encoders-heads-in-place", file=f"{FOLDER}/hosts/families/bidirectional/grouped_encoder.py",
        old="return heads.index_select(2, self.place).flatten(2)", new="return heads.flatten(2)",
        wrong="merged heads come out in another order than the host expects", tests=f"{TESTS} -k repeated",
    ),
    Mutant(
        "encoders-one-application", file=f"{FOLDER}/lowrank/calibration.py",
        old="for call, x in enumerate(self.inputs[path]):", new="for call, x in enumerate(self.inputs[path][:1]):",
        wrong="statistics are of the first application of a shared block", tests=f"{TESTS} -k application",
    ),
    Mutant(
        "own-inspected-as-causal", file=f"{FOLDER}/kinds/own_layers.py",
        old="() if variant == POLICY else spec.against_causality(module, variant)", new="()",
        wrong="inspection promises layers that read ahead what chooses from the past",
        tests=f"{CONFORMANCE} -k 'inspection and causal'",
    ),
    Mutant(
        "torch-inspected-as-any", file=f"{FOLDER}/kinds/torch_modules.py",
        old="(_REFUSED[variant],) if variant in _REFUSED else ()", new="()",
        wrong="inspection promises torch's modules what they cannot be", tests=f"{CONFORMANCE} -k 'inspection and Transformer'",
    ),
    Mutant(
        "own-policy-not-asked", file=f"{FOLDER}/replacements/own_layers.py",
        old="policy=self.policy if policy is None else policy", new="policy=policy",
        wrong="caches of a layer with a policy keep everything",
        tests="tests/attnzoo/surgery/families/test_own_layers.py -k policy",
    ),
    Mutant(
        "own-weights-lost", file=f"{FOLDER}/hosts/families/own.py", old="    if own:\n", new="    if False:\n",
        wrong="a router is thrown away", tests="tests/attnzoo/surgery/families/test_own_layers.py -k refused",
    ),
    Mutant(
        "timm-norm-of-keys", file=f"{FOLDER}/hosts/families/bidirectional/timm_like.py", old="            k = norm(k)\n",
        new="            pass\n", wrong="keys are not normalised",
        tests="tests/attnzoo/surgery/families/test_timm_like.py -k begin",
    ),
)  # fmt: skip
