"""Of hosts whose projections are fused, transposed or scaled: the order of rows, the way back, and what is rotated."""

from __future__ import annotations

from functools import partial

from tests.mutants.record import Mutant

FAMILIES = "attnzoo/surgery/hosts/families"
TESTS = "tests/attnzoo/surgery/families/test_fused.py"
CONFORMANCE = "tests/attnzoo/surgery/families/test_conformance.py"
fused = partial(Mutant, file=f"{FAMILIES}/fused.py")
projections = partial(Mutant, file="attnzoo/surgery/hosts/projections.py")

MUTANTS = (
    fused(
        "fused-values-for-keys", old="q, k, v = y.unflatten(-1, (self.heads, 3,", new="q, v, k = y.unflatten(-1, (self.heads, 3,",
        wrong="keys and values of a head change places", tests=f"{TESTS} -k 'order_of_roles or by_role'",
    ),
    fused(
        "fused-heads-by-roles", old="(self.heads, 3, self.head_dim)).unbind(-2)", new="(3, self.heads, self.head_dim)).unbind(-3)",
        wrong="rows in the order of heads are taken for blocks of roles", tests=f"{TESTS} -k 'order_of_roles or by_role'",
    ),
    fused(
        "fused-again-by-roles", old="torch.stack(parts, -2).flatten(-3)", new="torch.stack(parts, -3).flatten(-3)",
        wrong="heads are put together again in the order of roles", tests=f"{TESTS} -k 'order_of_roles or to_the_bit'",
    ),
    fused(
        "fused-heads-of-before", old="rows = replace(_rows(names, host), kv_heads=p.num_kv_heads)", new="rows = replace(_rows(names, host), order=\"roles\")",
        wrong="one class is put together in the order of another", tests=f"{TESTS} -k to_the_bit",
    ),
    projections(
        "conv1d-read-as-stored", old="return child.weight.T, child.bias", new="return child.weight, child.bias",
        wrong="transposed weights are read as they are stored", tests=f"{TESTS} -k by_role",
    ),
    projections(
        "conv1d-stored-as-read", old="stored = weight.T if is_conv1d(product) else weight", new="stored = weight",
        wrong="transposed weights are stored as others are", tests=f"{TESTS} -k to_the_bit",
    ),
    Mutant(
        "opt-scaled-twice", file=f"{FAMILIES}/opt.py", old="query_factor=float(host.scaling),", new="query_factor=1.0,",
        wrong="queries that are scaled already are scaled again", tests=f"{CONFORMANCE} -k 'refused_by_name and mha and OPT'",
    ),
    Mutant(
        "opt-half-a-scale", file="attnzoo/surgery/replacements/spec.py", old="scale=block.scale,", new="scale=block.asked_scale,",
        wrong="layers in a block's place know a part of the factor on scores",
        tests="tests/attnzoo/surgery/families/test_longheads_hosts.py -k 'definition and OPT'",
    ),
    Mutant(
        "opt-seen-unscaled", file="attnzoo/surgery/capture.py", old="return q if block.query_factor == 1 else q * block.query_factor, k", new="return q, k",
        wrong="queries before rotation are not those that attention has", tests=f"{TESTS} -k 'turned_back and opt'",
    ),
    Mutant(
        "phi3-without-its-window", file=f"{FAMILIES}/fused.py", old='window=getattr(host.config, "sliding_window", None),', new="window=None,",
        wrong="a window of the model's own is forgotten where it is converted", tests=f"{CONFORMANCE} -k 'Phi-3 and window and refused_by_name'",
    ),
    Mutant(
        "grouped-without-factor", file=f"{FAMILIES}/grouped.py", old="self.query_factor = p.scale / self.scaling", new="self.query_factor = 1.0",
        wrong="merged heads forget that the host scales its queries", tests=f"{TESTS} -k 'without_loss and opt'",
    ),
    Mutant(
        "unrotated-once-more", file="attnzoo/surgery/hosts/positions.py", old="cos / lengths, -sin / lengths", new="cos / lengths, sin / lengths",
        wrong="what is turned back is turned on", tests=f"{TESTS} -k turned_back",
    ),
    Mutant(
        "landmarks-number-slots", file="attnzoo/surgery/replacements/landmark_tokens.py",
        old="if real is None or self.numbers == \"slots\":", new="if True:",
        wrong="padding counts where a host numbers tokens alone", tests=f"{TESTS} -k by_its_mask",
    ),
    Mutant(
        "gptj-sines-for-cosines", file=f"{FAMILIES}/gptj.py", old="sin, cos = tables", new="cos, sin = tables",
        wrong="merged heads of a host whose tables begin with sines are rotated by others", tests=f"{TESTS} -k 'gptj and (turned_back or without_loss)'",
    ),
    Mutant(
        "gptj-tables-of-policies", file="attnzoo/surgery/hosts/caches/evicting_calls.py", old="pattern.tables(tables)", new="tables",
        wrong="a policy that scores what is unrotated takes sines for cosines", tests=f"{TESTS} -k 'gptj and retaining'",
    ),
    fused(
        "fused-window-forgotten", old='window=getattr(host.config, "sliding_window", None),', new="window=None,",
        wrong="a block's own window is not said, and lost by what replaces it", tests="tests/attnzoo/surgery/families/test_conformance.py -k 'Phi-3 and window and refused'",
    ),
    Mutant(
        "starcoder2-drops-nothing", file=f"{FAMILIES}/llama.py", old='return float(getattr(host, "residual_dropout", 0.0))', new="return 0.0",
        wrong="outputs that the host drops in training are not", tests=f"{TESTS} -k starcoder2",
    ),
)  # fmt: skip
