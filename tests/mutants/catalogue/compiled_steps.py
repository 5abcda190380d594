"""Of compiled decoding steps: what is hidden from the compiler says what a step without one says."""

from __future__ import annotations

from functools import partial

from tests.mutants.record import Mutant

TESTS = "tests/attnzoo/laws/test_compiled_steps.py"
step = partial(Mutant, file="attnzoo/base/decoding/step.py", tests=f"{TESTS} -k 'something_else or ones_own'")
hidden = partial(Mutant, file="attnzoo/base/decoding/compiled.py", tests=f"{TESTS} -k 'as_text or takes_it_for'")

MUTANTS = (
    step(
        "compiled-autocast",
        old='not cache.offloads and not torch.is_autocast_enabled("cpu")',
        new="not cache.offloads",
        wrong="a step under autocast is computed in a precision that nobody asked for",
    ),
    step(
        "compiled-offloaded",
        old="self.row_options is not None and not cache.offloads and",
        new="self.row_options is not None and",
        wrong="what is kept in CPU memory is read where it lies",
    ),
    step(
        "compiled-inherited",
        old="            cls.compiles_rows = False\n",
        new="            pass\n",
        wrong="a compiled step of the class before stands for hooks of a subclass",
    ),
    hidden(
        "compiled-text-of-another",
        old="return text if _config(text) == config else None",
        new="return text",
        wrong="a configuration of somebody's own is taken for the one that its text gives",
    ),
    Mutant(
        "compiled-latent-places",
        file="attnzoo/variants/lowrank_gqa.py",
        within="_attend_latents",
        old="torch.equal(places, torch.arange(row.held, device=q.device).expand_as(places))",
        new="places.numel()",
        wrong="keys of a compiled step are rotated by their slots where positions were given",
        tests=f"{TESTS} -k 'rotated_by_them'",
    ),
    Mutant(
        "compiled-s2-own-token",
        file="attnzoo/variants/s2/layer.py",
        within="_attend_row",
        old="row.held, q.device",
        new="row.held - 1, q.device",
        wrong="a compiled step of s2 does not read its own token",
        tests=f"{TESTS} -k 'few_programs and s2'",
    ),
)
