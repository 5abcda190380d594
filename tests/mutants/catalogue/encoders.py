"""Of encoders: blocks that read ahead, and what cannot be done with them."""

from __future__ import annotations

from functools import partial

from tests.mutants.record import Mutant

FOLDER, TESTS = "attnzoo/surgery", "tests/attnzoo/surgery/families/test_encoders.py"
family = partial(Mutant, file=f"{FOLDER}/hosts/families/encoders.py", tests=TESTS)

MUTANTS = (
    Mutant(
        "encoders-causal-rule", file=f"{FOLDER}/kinds/reading.py", old="causal=block.causal,", new="causal=True,",
        wrong="an encoder's window looks back alone", tests=f"{TESTS} -k rule",
    ),
    Mutant(
        "encoders-padding-behind", file="attnzoo/base/layer.py", old=", key_bias=made.key_bias)", new=")",
        wrong="tokens read the padding behind the last of them", tests=f"{TESTS} -k padding",
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
        wrong="a policy is put where there is no cache", tests=f"{TESTS} -k refused_by_name",
    ),
)  # fmt: skip
