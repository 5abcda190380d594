"""Of torch's multi-head attention: masks, what calls are taken for, and modules in the places of torch's."""

from __future__ import annotations

from functools import partial

from tests.mutants.record import Mutant

FOLDER, TESTS = "attnzoo/torch_mha", "tests/attnzoo/torch_mha"
options = partial(Mutant, tests=f"{TESTS}/test_torch_options.py")
variants = partial(Mutant, tests=f"{TESTS}/test_torch_variants.py")

MUTANTS = (
    options(
        "torch-empty-rows",
        file=f"{FOLDER}/dense.py",
        old="scores = scores.masked_fill(nothing, 0.0)",
        new="scores = scores * 1",
        wrong="a row with nothing to read has a gradient that is no number",
    ),
    options(
        "torch-more-keys-hidden",
        file=f"{FOLDER}/masks.py",
        old="pad(mask, (0, more))",
        new="pad(mask, (0, more), value=1)",
        wrong="masks hide or move the learned key and the one of zeros",
    ),
    options(
        "torch-order-of-weights",
        file=f"{FOLDER}/packed.py",
        old="nn.init.xavier_normal_(weight)",
        new="nn.init.xavier_uniform_(weight)",
        wrong="the same seed gives other weights than torch's",
        tests=f"{TESTS}/test_torch_options.py -k 'begin'",
    ),
    variants(
        "torch-any-mask-is-causal",
        file=f"{FOLDER}/masks.py",
        old='return "causal" if bool((mask == expected).all()) else "other"',
        new='return "causal"',
        wrong="a variant takes any mask for the causal one",
        tests=f"{TESTS}/test_torch_variants.py -k honour",
    ),
    variants(
        "torch-moved-keys-dropped",
        file=f"{FOLDER}/masks.py",
        old="fits = ((padding == 0) | hidden).all()",
        new="fits = (padding == padding).all()",
        wrong="numbers added to keys vanish in a variant",
        tests=f"{TESTS}/test_torch_variants.py -k honour",
    ),
    variants(
        "torch-twin-not-causal",
        file=f"{FOLDER}/inside.py",
        old="twin.config = config",
        new="twin.config = layer.config",
        wrong="a causal call reads what comes later",
        tests=f"{TESTS}/test_torch_variants.py -k own_layer",
    ),
    Mutant(
        "torch-parents-fast-path",
        file=f"{FOLDER}/module.py",
        old='which ``nn.TransformerEncoderLayer`` knows that it must call this module."""\n        return False',
        new='which ``nn.TransformerEncoderLayer`` knows that it must call this module."""\n        return True',
        wrong="torch's fused layer computes plain attention whatever is inside",
        tests="tests/attnzoo/surgery/hosts/test_torch_mha.py -k 'undo or nested'",
    ),
    Mutant(
        "torch-refusals-untold",
        file="attnzoo/surgery/kinds/torch_modules.py",
        old="return (*refused, *super()",
        new="return (*(), *super()",
        wrong="a table says that modules can become what is refused",
        tests="tests/attnzoo/surgery/hosts/test_torch_mha.py -k none_for_these",
    ),
)
